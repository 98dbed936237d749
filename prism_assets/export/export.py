"""`prism export`: an adapter and the data that it was trained on, each with a card, as folders to share.

    <folder>/adapter/   adapter_model.safetensors, adapter_config.json, README.md: what PeftModel.from_pretrained reads
    <folder>/data/      train.parquet, README.md: what datasets.load_dataset reads

Adapters in the lake are shared by strategies that select equal rows, so they say nothing of how their rows were found;
a card does, and is written here only. `export` is called from outside: it reads from the lake and writes files.
`adapter_card` and `data_card` turn what it found into text.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import CannotExport
from prism_assets.export.cards import CitedArtifact, Facts, adapter_card, data_card
from prism_assets.export.places import check_free, make_folder, put
from prism_assets.identity import base_key, join_key, seed_partition, split_key
from prism_assets.resources.lake import Artifact, hash_table
from prism_assets.settings import Budget
from prism_assets.stage import Stage
from prism_assets.tables import METRICS, tables
from prism_assets.training.adapter import trained_tokens

if TYPE_CHECKING:
    import pyarrow as pa

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
DATA_FILES = ("train.parquet", "README.md")


class Exported(NamedTuple):
    """What an export is made of."""

    target: str
    strategy: str
    selection: Artifact
    adapters: list[Artifact]  # a seed each
    evaluations: list[Artifact]
    base: Artifact  # the evaluation of the model where fine-tuning starts


def export(stage: Stage, target: str, strategy: str, folder: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write `adapter/` (the first seed's) and `data/` into `folder`; returns the two.

    With `force` folders of an earlier export are replaced. Raises CannotExport where the lake does not hold a
    selection, an adapter of exactly its rows and its evaluation, and where something else is in the way.
    """
    key = join_key(target, strategy)
    heads = [seed_partition(key, seed) for seed in stage.settings.seeds]
    exported = Exported(
        target,
        strategy,
        _shown(stage, "selection", key),
        [_shown(stage, "adapters", head) for head in heads],
        [_shown(stage, "evaluations", head) for head in heads],
        _shown(stage, "evaluations", base_key(target)),
    )
    rows = stage.lake.read_table(exported.selection)
    _check_same(rows, exported)
    facts = _facts(stage, exported)
    places = folder / "adapter", folder / "data"
    for place, known in zip(places, (ADAPTER_FILES, DATA_FILES), strict=True):
        check_free(place, known, force)

    def write_adapter(draft: Path) -> None:
        for name in ADAPTER_FILES[:2]:
            shutil.copyfile(stage.lake.local(exported.adapters[0], name), draft / name)
        (draft / "README.md").write_text(adapter_card(facts), encoding="utf-8")

    def write_data(draft: Path) -> None:
        import pyarrow.parquet as pq

        pq.write_table(data_table(rows), draft / "train.parquet")
        (draft / "README.md").write_text(data_card(facts), encoding="utf-8")

    make_folder(folder)
    for place, write in zip(places, (write_adapter, write_data), strict=True):
        put(place, write)
    return places


def data_table(rows: "pa.Table") -> "pa.Table":
    """A selection without its tokens, which are the model's; turns as lists of role and content, not as JSON. Where
    every row is a text, `text` stands in the place of prompt, completion and turns."""
    import pyarrow as pa

    if rows.num_rows and not any(rows["prompt"].to_pylist()):  # of a conversation it is never empty
        kept = rows.drop_columns(["input_ids", "loss_mask", "prompt", "messages"]).replace_schema_metadata(None)
        return kept.rename_columns({"completion": "text"})

    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    messages = [
        [{"role": turn["role"], "content": turn["content"]} for turn in json.loads(text)]
        for text in rows["messages"].to_pylist()
    ]
    kept = rows.drop_columns(["input_ids", "loss_mask"]).replace_schema_metadata(None)
    return kept.set_column(kept.schema.get_field_index("messages"), "messages", pa.array(messages, turns))


def _shown(stage: Stage, table: str, partition: str) -> Artifact:
    found = stage.shown_or_none(table, partition)
    if found is None:
        target = split_key(partition)[0].partition("/seed-")[0]
        raise CannotExport(
            f"The lake at {stage.lake.folder} has no {table}[{partition}] yet, so there is nothing to export: "
            f"`prism run --target {target}` makes it."
        )
    return found


def _check_same(rows: "pa.Table", exported: Exported) -> None:
    """An adapter of other rows, or figures of another adapter, would make a wrong card."""
    content = hash_table(trained_tokens(rows))
    records = exported.base.header["inputs"]["records"]["content_hash"]
    for adapter, evaluation in zip(exported.adapters, exported.evaluations, strict=True):
        if (
            adapter.header["inputs"]["rows"]["content_hash"] != content
            or evaluation.header["inputs"]["adapter"]["content_hash"] != adapter.content_hash
            or evaluation.header["inputs"]["records"]["content_hash"] != records
        ):
            raise CannotExport(
                f"Selection, adapter and evaluation of {adapter.partition} do not belong together: one was made again "
                "and the others were not yet. `prism run` brings them up to date."
            )


def _facts(stage: Stage, exported: Exported) -> Facts:
    from prism_assets.catalog.lineage import trace
    from prism_assets.evaluation.metrics import mean_over_seeds

    settings, selection, adapters = stage.settings, exported.selection, exported.adapters
    base, evaluations = exported.base, exported.evaluations
    # Of what a selection was made from, a card names some tables one by one; the rest is one per shard.
    named = [table.name for table in tables() if table.on_cards]
    above = [one for one in trace(stage.lake, selection)["artifacts"] if one["table"] in named]
    above.sort(key=lambda one: named.index(one["table"]))
    benchmarks, scored = _benchmarks(stage, exported)
    made = [("evaluation, before", base)]
    for seed, adapter, evaluation in zip(settings.seeds, adapters, evaluations, strict=True):
        made += [(f"adapter, seed {seed}", adapter), (f"evaluation, seed {seed}", evaluation)]
    config = json.loads(stage.lake.local(adapters[0], "adapter_config.json").read_text(encoding="utf-8"))
    start = settings.model.adapter
    features = [one for one in above if one["table"] == "candidate_index"]
    return Facts(
        target=exported.target,
        strategy=exported.strategy,
        budget=str(Budget(**selection.header["settings"]["budget"])),
        base_model=config["base_model_name_or_path"],
        starting_adapter=Path(start).name if start and Path(start).is_dir() else start,
        model_fingerprint=adapters[0].header["inputs"]["model"]["content_hash"],
        feature_version=features[0]["version"] if features else None,
        composition=selection.notes["composition"],
        rows=selection.notes["rows"],
        completion_tokens=selection.notes["completion_tokens"],
        pool_rows=selection.notes["pool_rows"],
        steps=adapters[0].notes["steps"],
        seed=settings.seeds[0],
        base={metric: base.notes[metric] for metric in METRICS},
        figures={metric: mean_over_seeds([one.notes[metric] for one in evaluations]) for metric in METRICS},
        held_out_records=base.notes["records"],
        harness=f"lm-eval {scored[0][1].header['settings']['lm_eval']}" if scored else None,
        benchmarks=benchmarks,
        made_from=[
            *(CitedArtifact(_name(one), one["fingerprint"], one["content_hash"], one["run_id"] or "") for one in above),
            _cited("selection", selection),
        ],
        results=[_cited(what, artifact) for what, artifact in [*made, *scored]],
        quantization=settings.model.quantization,
    )


def _benchmarks(
    stage: Stage, exported: Exported
) -> tuple[list[tuple[str, float, Mapping[str, Any]]], list[tuple[str, Artifact]]]:
    """Label, figure of the base model and summary over seeds of every benchmark metric that the settings ask for.

    And the artefacts that they are from, the base model's first.
    """
    settings = stage.settings
    if not settings.evaluation.benchmarks:
        return [], []
    from prism_assets.evaluation.benchmark_scores import benchmarks_of, shown_scores

    key = join_key(exported.target, exported.strategy)
    base = _shown(stage, "benchmarks", base_key(exported.target))
    for seed, adapter in zip(settings.seeds, exported.adapters, strict=True):
        scores = _shown(stage, "benchmarks", seed_partition(key, seed))
        if scores.header["inputs"]["adapter"]["content_hash"] != adapter.content_hash:
            raise CannotExport(
                f"The benchmarks of {key} are those of an earlier adapter: `prism run` brings them up to date."
            )
    summary, scored = benchmarks_of(stage, key)
    before = shown_scores(stage.lake, base)
    figures = [
        (f"{label} ({before[label].documents:,} documents)", before[label].value, value)
        for label, value in summary.items()
    ]
    seeds = [(f"benchmarks, seed {seed}", one) for seed, one in zip(settings.seeds, scored, strict=True)]
    return figures, [("benchmarks, before", base), *seeds]


def _cited(what: str, artifact: Artifact) -> CitedArtifact:
    return CitedArtifact(what, artifact.fingerprint, artifact.content_hash, artifact.header["run_id"] or "")


def _name(traced: Mapping[str, Any]) -> str:
    return f"{traced['table']}[{traced['partition']}]" if traced["partition"] else traced["table"]
