"""The asset `targets`: target examples and held-out records, tokenised the same way."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets.corpus.encoding import encode_file, encoder_of, limits_of
from prism_assets.corpus.record_file import RecordFile
from prism_assets.corpus.target_fit import TargetFit, given_records, target_fit
from prism_assets.errors import UnusableTargets
from prism_assets.metadata import preview
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, hash_file
from prism_assets.settings import TargetSettings
from prism_assets.stage import Stage
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    from prism_assets.corpus.records import Kind

ROWS_ACCEPTED = Check("target_rows_accepted", "No target or held-out record was rejected.")
DISJOINT = Check("eval_disjoint", "No held-out record is a target example.")

# The table of each kind of file.
TABLES: "dict[Kind, str]" = {"target": "targets", "eval": "eval_examples"}


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset("targets", group="corpus", kinds={"parquet"}, deps=["base_model"], checks=[ROWS_ACCEPTED, DISJOINT])
    def targets(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Target examples (plain, or pairs of a wanted and an unwanted completion) and held-out records."""
        stage = stage_of(project, context)
        return each_partition(context, stage, lambda name: _read_target(stage, name))

    return targets


def _read_target(stage: Stage, name: str) -> Outcome:
    target = stage.settings.targets[name]
    # Before training and gradients, which would all be for less than was asked for.
    examples, computed, rejected = _read_file(stage, name, "target", target.examples)
    _require_fitting_score(stage, examples, name)
    held_out, made, more = _read_file(stage, name, "eval", target.eval)
    overlap = conversations(stage, examples) & conversations(stage, held_out)
    rows = stage.lake.read_table(examples, ["line", "prompt", "completion", "rejected"]).slice(0, 8)
    return Outcome(
        [examples, held_out],
        computed + made,
        {
            "dagster/row_count": examples.notes["rows"],
            "eval_rows": held_out.notes["rows"],
            "rejects": len(rejected + more),
            "rows": preview(rows.to_pylist()),
            "first_rejects": preview(rejected + more),
        },
        [
            ROWS_ACCEPTED(not rejected + more, rejected=len(rejected + more)),
            DISJOINT(not overlap, shared_records=len(overlap)),
        ],
    )


def _read_file(stage: Stage, name: str, kind: "Kind", path: Path) -> tuple[Artifact, int, list[dict[str, Any]]]:
    """The rows of a target's file, how many artefacts were made, and its rejects. Raises UnusableTargets."""
    if not path.is_file():
        raise UnusableTargets(f"targets.{name}: there is no file {path}")
    rows, rejects, computed = encode_file(stage, target_file(stage, name, kind))
    rejected = stage.lake.read_table(rejects).to_pylist()
    if not rows.notes["rows"]:
        why = f" The first was rejected because: {rejected[0]['reason']}." if rejected else ""
        raise UnusableTargets(f"targets.{name}: {path} holds no usable row.{why}")
    given = given_records(rows.notes["rows"], rejected)
    if given - rows.notes["rows"] > stage.settings.targets[name].max_rejected * given:
        mixed = may_be_mixed(stage.settings.targets[name], kind)
        columns = stage.settings.targets[name].columns
        fit = target_fit(path, kind, encoder_of(stage), mixed=mixed, limits=limits_of(stage), columns=columns)
        raise UnusableTargets(too_few_records(stage, name, path, fit))
    return rows, computed, [{"file": path.name, **one} for one in rejected]


def target_file(stage: Stage, name: str, kind: "Kind") -> RecordFile:
    """A target's file of target examples or of held-out records, to be read into its tables."""
    from prism_assets.corpus.files import iter_examples
    from prism_assets.corpus.token_tables import TARGET_SCHEMA

    table, target = TABLES[kind], stage.settings.targets[name]
    path = target.examples if kind == "target" else target.eval
    mixed = may_be_mixed(target, kind)
    return RecordFile(
        path=path,
        sha256=hash_file(path),
        table=table,
        rejects=f"{table}_rejects",
        partition=name,
        schema=TARGET_SCHEMA,
        read=partial(iter_examples, kind=kind, mixed=mixed, limits=limits_of(stage), columns=target.columns),
        columns=target.columns,
    )


def may_be_mixed(target: TargetSettings, kind: "Kind") -> bool:
    """Whether plain records and pairs may stand in one file: where the plain ones get an unwanted completion, or the
    pairs lose theirs."""
    return kind == "target" and target.anchors not in (None, "given")


def too_few_records(stage: Stage, name: str, path: Path, fit: TargetFit) -> str:
    """What is wrong with a file of which too much is rejected, and what to do."""
    advice = fit.advice(stage.settings.tokenization.max_length, stage.model_identity.context_length)
    allowed = stage.settings.targets[name].max_rejected
    return (
        f"targets.{name}: of the {fit.given} records in {path} {fit.used} can be used: more are rejected than "
        f"targets.{name}.max_rejected ({allowed:g}) allows. The first is {fit.first}. "
        f"{advice + '. ' if advice else ''}Repair or shorten the records, or allow it with "
        f"max_rejected: {math.ceil(100 * fit.rejected / fit.given) / 100:g}."
    )


def _require_fitting_score(stage: Stage, targets: Artifact, name: str) -> None:
    """Raise UnusableTargets for summed scores of pairs: better now than after the gradients of the whole pool."""
    if stage.settings.preference.score != "sum":
        return
    anchors = stage.settings.targets[name].anchors
    given = any(stage.lake.read_table(targets, ["rejected"])["rejected"].is_valid().to_pylist())
    if anchors in ("choices", "generated", "shuffled") or (given and anchors != "none"):
        raise UnusableTargets(
            f"targets.{name}: preference.score: sum is for plain targets, and these are pairs, whose sides have no "
            "common number of tokens. Use mean."
        )


def conversations(stage: Stage, artifact: Artifact) -> set[str]:
    """Ids of targets or held-out records as conversations: a pair counts as its wanted completion."""
    return set(stage.lake.read_table(artifact, ["conversation_id"])["conversation_id"].to_pylist())
