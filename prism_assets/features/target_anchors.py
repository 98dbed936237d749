"""The asset `target_anchors`: the target examples that directions are made of, with the unwanted answers that they are
compared with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dagster as dg

from prism_assets.corpus.encoding import encoder_of
from prism_assets.errors import UnusableTargets
from prism_assets.features.anchor_artifacts import MADE, anchors_kind, anchors_recipe, is_removal
from prism_assets.features.gradient_pass import GradientPass, gradient_pass
from prism_assets.identity import target_of_split
from prism_assets.metadata import preview
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, Rows
from prism_assets.stage import Made, Stage
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.corpus.anchors import Anchor, Anchored

ALL_ANCHORED = Check("all_targets_anchored", "Every target example has an unwanted answer, where some are asked for.")


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "target_anchors",
        group="features",
        kinds={"parquet"},
        deps=["targets", "warmup_checkpoints"],
        checks=[ALL_ANCHORED],
        loads_model=True,
    )
    def target_anchors(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Target examples as directions use them: plain, or pairs whose unwanted answer is the record's own, another
        option, another example's answer or what the warmed-up model says. Where rows are to be removed the unwanted
        answer stands in the place of the wanted one: what raises its preference is harmful."""
        stage = stage_of(project, context)
        with gradient_pass(stage) as work:
            return each_partition(context, stage, lambda name: _target(work, name))

    return target_anchors


def _target(work: GradientPass, name: str) -> Outcome:
    stage = work.stage
    table, computed = make_anchors(work, stage.shown("targets", name), name)
    stage.show(table, name)
    left_out = table.notes.get("left_out", {})
    rows = stage.lake.read_table(table, ["prompt", "completion", "rejected"]).slice(0, 8)
    metadata: dict[str, Any] = {
        "dagster/row_count": table.notes["rows"],
        "anchors": dg.MetadataValue.json(table.notes.get("anchors", {})),
        "left_out": dg.MetadataValue.json(left_out),
        "rows": preview(rows.to_pylist()),
    }
    number = sum(left_out.values())
    return Outcome([table], computed, metadata, [ALL_ANCHORED(not number, left_out=number, **_reasons(left_out))])


def _reasons(left_out: dict[str, int]) -> dict[str, Any]:
    return {"reasons": "; ".join(f"{reason}: {count}" for reason, count in left_out.items())} if left_out else {}


def make_anchors(work: GradientPass, targets: Artifact, name: str) -> Made:
    """The target examples with the anchors that the settings ask for; `name` is the target, or its split.

    Raises UnusableTargets where no example has one, MixedTargets where some have one of their own and no others are
    asked for.
    """
    return work.stage.make(anchors_recipe(work.stage, targets, name), lambda: _anchored(work, targets, name))


def _anchored(work: GradientPass, targets: Artifact, name: str) -> Rows:
    found = _as_wanted(work, targets, name)
    if not is_removal(work.stage, name):
        return found
    from prism_assets.corpus.anchors import swapped

    table = cast("pa.Table", found.table)
    if table["rejected"].null_count:
        raise UnusableTargets(
            f"targets.{name}: use: remove needs pairs of a wanted and an unwanted answer, and the records of "
            f"{_file(work.stage, name)} have none of the second: give them `rejected`, or ask for anchors "
            "(choices, generated, shuffled)."
        )
    return Rows(swapped(table), found.notes)


def _as_wanted(work: GradientPass, targets: Artifact, name: str) -> Rows:
    """The target examples with their anchors, the wanted answer first."""
    from prism_assets.corpus import anchors
    from prism_assets.corpus.files import require_one_kind
    from prism_assets.corpus.token_tables import choices_of

    stage = work.stage
    table, kind = stage.lake.read_table(targets), anchors_kind(stage, name)
    if kind == "none":
        return Rows(anchors.without_anchors(table))
    if kind not in MADE:
        pairs = [one is not None for one in table["rejected"].to_pylist()]
        require_one_kind(_file(stage, name), list(zip(table["line"].to_pylist(), pairs, strict=True)))
        if kind == "given" and not all(pairs):
            raise UnusableTargets(
                f"targets.{name}: anchors: given, and the records of {_file(stage, name)} have no unwanted answer: "
                "give them one (rejected), or ask for choices, generated or shuffled."
            )
        return Rows(table, {"anchors": {"given": table.num_rows}} if all(pairs) else {})

    def made(rows: "pa.Table") -> "list[Anchor]":
        completions = rows["completion"].to_pylist()
        if kind == "shuffled":
            return anchors.shuffled(completions, rows["id"].to_pylist())
        if kind == "choices":
            return anchors.other_choices(completions, choices_of(rows))
        return anchors.checked(completions, _generated(work, rows))

    found = anchors.anchored(table, kind, made, encoder_of(stage))
    if not found.table.num_rows:
        raise UnusableTargets(_nothing_left(stage, name, kind, found))
    return Rows(found.table, {"anchors": found.kinds, "left_out": found.left_out})


def _file(stage: Stage, name: str) -> Path:
    return stage.settings.targets[target_of_split(name)].examples


def _nothing_left(stage: Stage, name: str, kind: str, found: "Anchored") -> str:
    reasons = "; ".join(f"{reason} ({count})" for reason, count in found.left_out.items())
    return (
        f"targets.{name}: no example of {_file(stage, name)} has an anchor of the kind {kind!r}: {reasons}. Choose "
        f"another kind for targets.{name}.anchors."
    )


def _generated(work: GradientPass, rows: "pa.Table") -> list[str]:
    """What the model answers at the last warm-up checkpoint, greedily, each answer as many tokens as the wanted one at
    most."""
    import numpy as np

    from prism_assets.corpus.token_tables import from_table, prompt_tokens
    from prism_assets.sft.generation import generate, pad_token_id

    stage = work.stage
    if not rows.num_rows:
        return []
    peft_model, tokenizer = work.at(work.checkpoints[-1]).model, stage.model.tokenizer()
    examples, lengths = from_table(rows), np.array(rows["completion_tokens"].to_pylist())
    texts = [""] * len(examples)
    batch = stage.settings.evaluation.batch_size
    order = np.argsort(lengths, kind="stable")
    with stage.progress("anchors", len(examples)) as progress:
        for start in range(0, len(order), batch):
            positions = order[start : start + batch]
            generated = generate(
                peft_model,
                [prompt_tokens(examples[position]) for position in positions],
                pad_token_id=pad_token_id(tokenizer),
                eos_token_id=list(encoder_of(stage).stop_token_ids),
                max_new_tokens=int(lengths[positions].max()),
                batch_size=batch,
            )
            for position, tokens in zip(positions, generated, strict=True):
                texts[position] = str(tokenizer.decode(tokens[: lengths[position]], skip_special_tokens=True)).strip()
            progress.advance(len(positions))
    return texts
