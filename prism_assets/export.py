"""`prism export`: an adapter and the data that it was trained on, each with a card, as folders to hand on.

    <folder>/adapter/   adapter_model.safetensors, adapter_config.json, README.md: what PeftModel.from_pretrained reads
    <folder>/data/      train.parquet, README.md: what datasets.load_dataset reads

Adapters in the lake are shared by strategies that select equal rows, so they say nothing of how their rows were found;
a card does, and is written here only. `export` is the door: it reads from the lake and writes files. `adapter_card` and
`data_card` turn what it found into text.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.evaluation.report import METRICS
from prism_assets.selection.assets import join_key, split_key
from prism_assets.settings import Settings
from prism_assets.training.assets import seed_partition
from resources.lake import Artifact, Lake, hash_table

if TYPE_CHECKING:
    import pyarrow as pa

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
DATA_FILES = ("train.parquet", "README.md")
# Of what a selection was made from, the tables that a card names one by one; the rest is one per shard.
_NAMED = (
    *("live_pool", "candidate_index", "warmup_sample", "warmup_checkpoints"),
    *("targets", "target_features", "target_directions"),
)


class CannotExport(Exception):
    """There is nothing to export, or no place for it; the message says what to do."""


class Source(NamedTuple):
    """An artefact of the lake, as a card names it."""

    what: str
    fingerprint: str
    content_hash: str
    run_id: str


class Facts(NamedTuple):
    """What the cards say."""

    target: str
    strategy: str
    budget: str
    base_model: str
    starting_adapter: str | None
    model_fingerprint: str
    feature_version: str | None  # None for strategies that read no gradient features
    composition: Mapping[str, int]  # selected rows by source
    rows: int
    completion_tokens: int
    pool_rows: int
    steps: int
    seed: int  # of the adapter that is exported
    base: Mapping[str, float | None]  # held-out metrics where fine-tuning starts
    figures: Mapping[str, Mapping[str, Any] | None]  # mean, std and seeds of the held-out metrics
    held_out_records: int
    harness: str | None  # lm-eval and its version; None where there are no benchmarks
    benchmarks: Sequence[tuple[str, float, Mapping[str, Any]]]  # label, base model, mean, std and seeds
    made_from: Sequence[Source]  # the selection, and what it was made from
    results: Sequence[Source]  # what the figures are from: adapters, evaluations and benchmarks of all seeds


# -- cards -------------------------------------------------------------------------------------------------------


def adapter_card(facts: Facts) -> str:
    """README.md of the adapter: the hub's front matter for PEFT, then data, figures and lineage."""
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        base_model=facts.base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "data-selection", "prism-assets"],
        datasets=_repository_names(facts.composition) or None,
        metrics=[metric for metric, value in facts.figures.items() if value],
    )
    start = f", with the adapter {facts.starting_adapter} to start from" if facts.starting_adapter else ""
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {facts.base_model}, fine-tuned for {facts.target} on data selected by {facts.strategy}\n",
            f"A LoRA adapter for `{facts.base_model}`{start}, trained for {facts.steps:,} optimiser steps "
            f"(seed {facts.seed}) on {_data_sentence(facts)}\n",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(facts.base_model)})",
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
            "```\n",
            *_composition_section(facts),
            "## Held-out figures\n",
            *_figure_lines(facts),
            "",
            *_lineage_section(facts, [*facts.made_from, *facts.results]),
        ]
    )


def data_card(facts: Facts) -> str:
    """README.md of the data: the hub's front matter, which names the split's file, then columns, sources and lineage."""
    from huggingface_hub import DatasetCardData

    front = DatasetCardData(
        task_categories=["text-generation"],
        tags=["data-selection", "prism-assets"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "train.parquet"}]}],
    )
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---\n",
            f"# Selected for {facts.target} by {facts.strategy}\n",
            _capital(_data_sentence(facts)) + " Licence and terms are those of the sources.\n",
            "```python",
            "from datasets import load_dataset",
            "",
            'rows = load_dataset("path/to/this/folder", split="train")',
            "```\n",
            "| column | what it is |",
            "|---|---|",
            "| `rank`, `score` | place in the strategy's ranking, from 1, and the score that ranks |",
            "| `prompt`, `completion` | the example as text |",
            "| `messages` | the example as turns of `role` and `content` |",
            "| `source`, `record_id` | what the candidate's file says of it |",
            "| `id`, `shard`, `row` | the candidate in the lake that it was selected from |",
            "| `completion_tokens` | supervised tokens under the base model's tokenizer |",
            "",
            *_composition_section(facts),
            *_lineage_section(facts, facts.made_from),
        ]
    )


def _data_sentence(facts: Facts) -> str:
    return (
        f"{facts.rows:,} examples ({facts.completion_tokens:,} completion tokens), which the strategy `{facts.strategy}` of "
        f"prism-assets selected for the target `{facts.target}` from {facts.pool_rows:,} candidates "
        f"under the budget {facts.budget}."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _composition_section(facts: Facts) -> list[str]:
    ordered = sorted(facts.composition.items(), key=lambda item: (-item[1], item[0]))
    rows = [f"| {_cell(name)} | {count:,} |" for name, count in ordered]
    return ["## Data by source\n", "| source | rows |", "|---|---|", *rows, ""]


def _figure_lines(facts: Facts) -> list[str]:
    seeds = max(value["seeds"] for value in facts.figures.values() if value)
    words = "1 seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation"
    lines = [
        f"On {facts.held_out_records:,} held-out records of `{facts.target}`; fine-tuned over {words}. "
        + f"This folder is seed {facts.seed}. "
        + (f"Benchmarks are tasks of {facts.harness}, over documents of their own.\n" if facts.benchmarks else "\n"),
        "| metric | before | fine-tuned |",
        "|---|---|---|",
    ]
    ours = [(label, facts.base.get(metric), facts.figures.get(metric)) for metric, label in METRICS.items()]
    benchmarks = [(f"lm-eval: {label}", before, value) for label, before, value in facts.benchmarks]
    for label, before, value in [*ours, *benchmarks]:
        if value is None:
            continue
        spread = "" if value["std"] is None else f" ± {value['std']:.3f}"
        lines.append(f"| {_cell(label)} | {'–' if before is None else f'{before:.3f}'} | {value['mean']:.3f}{spread} |")
    return lines


def _lineage_section(facts: Facts, sources: Sequence[Source]) -> list[str]:
    rows = [
        f"| {_cell(one.what)} | `{one.fingerprint}` | `{one.content_hash}` | {f'`{one.run_id}`' if one.run_id else '–'} |"
        for one in sources
    ]
    version = f" Gradient features are of version `{facts.feature_version}`." if facts.feature_version else ""
    return [
        "## Lineage\n",
        f"Model fingerprint `{facts.model_fingerprint}`.{version} `prism lineage FINGERPRINT` shows all of it.\n",
        "| what | fingerprint | content hash | Dagster run |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _repository_names(composition: Mapping[str, int]) -> list[str]:
    """The sources written owner/name, as data sets are on the hub. A bare word is a label: it would claim another's data."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    names = []
    for name in sorted(one for one in composition if "/" in one):
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        names.append(name)
    return names


# -- the door ----------------------------------------------------------------------------------------------------


def export(
    settings: Settings, lake: Lake, target: str, strategy: str, folder: Path, *, force: bool = False
) -> tuple[Path, Path]:
    """Write `adapter/` (the first seed's) and `data/` into `folder`; returns the two.

    With `force` folders of an earlier export are replaced. Raises CannotExport where the lake does not hold a
    selection, an adapter of exactly its rows and its evaluation, and where something else is in the way.
    """
    key = join_key(target, strategy)
    selection = _shown(lake, "selection", key, target)
    adapters = [_shown(lake, "adapters", seed_partition(key, seed), target) for seed in settings.seeds]
    evaluations = [_shown(lake, "evaluations", seed_partition(key, seed), target) for seed in settings.seeds]
    base = _shown(lake, "evaluations", f"base|{target}", target)
    rows = lake.read_table(selection)
    _check_same(rows, adapters, evaluations, base)
    facts = _facts(settings, lake, target, strategy, selection, adapters, evaluations, base)
    places = folder / "adapter", folder / "data"
    for place, known in zip(places, (ADAPTER_FILES, DATA_FILES), strict=True):
        _check_free(place, known, force)

    def write_adapter(draft: Path) -> None:
        for name in ADAPTER_FILES[:2]:
            shutil.copyfile(adapters[0].path / name, draft / name)
        (draft / "README.md").write_text(adapter_card(facts), encoding="utf-8")

    def write_data(draft: Path) -> None:
        import pyarrow.parquet as pq

        pq.write_table(data_table(rows), draft / "train.parquet")
        (draft / "README.md").write_text(data_card(facts), encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    for place, write in zip(places, (write_adapter, write_data), strict=True):
        _put(place, write)
    return places


def data_table(rows: "pa.Table") -> "pa.Table":
    """A selection without its tokens, which are the model's; turns as lists of role and content, not as JSON."""
    import pyarrow as pa

    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    messages = [
        [{"role": turn["role"], "content": turn["content"]} for turn in json.loads(text)]
        for text in rows["messages"].to_pylist()
    ]
    kept = rows.drop_columns(["input_ids", "loss_mask"]).replace_schema_metadata(None)
    return kept.set_column(kept.schema.get_field_index("messages"), "messages", pa.array(messages, turns))


def _shown(lake: Lake, table: str, partition: str, target: str) -> Artifact:
    found = lake.head(table, partition)
    if found is None:
        raise CannotExport(
            f"The lake at {lake.folder} has no {table}[{partition}] yet, so there is nothing to export: "
            f"`prism run --target {target}` makes it."
        )
    return found


def _check_same(rows: "pa.Table", adapters: Sequence[Artifact], evaluations: Sequence[Artifact], base: Artifact) -> None:
    """An adapter of other rows, or figures of another adapter, would make a card that lies."""
    content = hash_table(rows.select(["id", "input_ids", "loss_mask"]).sort_by("id"))
    records = base.header["inputs"]["records"]["content_hash"]
    for adapter, evaluation in zip(adapters, evaluations, strict=True):
        if (
            adapter.header["inputs"]["rows"]["content_hash"] != content
            or evaluation.header["inputs"]["adapter"]["content_hash"] != adapter.content_hash
            or evaluation.header["inputs"]["records"]["content_hash"] != records
        ):
            raise CannotExport(
                f"Selection, adapter and evaluation of {adapter.partition} do not belong together: one was made anew and "
                "the others were not yet. `prism run` brings them up to date."
            )


def _facts(
    settings: Settings,
    lake: Lake,
    target: str,
    strategy: str,
    selection: Artifact,
    adapters: Sequence[Artifact],
    evaluations: Sequence[Artifact],
    base: Artifact,
) -> Facts:
    from prism_assets.evaluation.metrics import summarize
    from prism_assets.lineage import trace
    from prism_assets.settings import Budget

    above = [one for one in trace(lake, selection)["artifacts"] if one["table"] in _NAMED]
    above.sort(key=lambda one: _NAMED.index(one["table"]))
    benchmarks, scored = _benchmarks(settings, lake, join_key(target, strategy), adapters)
    made = [("evaluation, before", base)]
    for seed, adapter, evaluation in zip(settings.seeds, adapters, evaluations, strict=True):
        made += [(f"adapter, seed {seed}", adapter), (f"evaluation, seed {seed}", evaluation)]
    config = json.loads((adapters[0].path / "adapter_config.json").read_text(encoding="utf-8"))
    start = settings.model.adapter
    features = [one for one in above if one["table"] == "candidate_index"]
    return Facts(
        target=target,
        strategy=strategy,
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
        figures={metric: summarize([one.notes[metric] for one in evaluations]) for metric in METRICS},
        held_out_records=base.notes["records"],
        harness=f"lm-eval {scored[0][1].header['settings']['lm_eval']}" if scored else None,
        benchmarks=benchmarks,
        made_from=[
            *(Source(_name(one), one["fingerprint"], one["content_hash"], one["run_id"] or "") for one in above),
            _source("selection", selection),
        ],
        results=[_source(what, artifact) for what, artifact in [*made, *scored]],
    )


def _benchmarks(
    settings: Settings, lake: Lake, key: str, adapters: Sequence[Artifact]
) -> tuple[list[tuple[str, float, Mapping[str, Any]]], list[tuple[str, Artifact]]]:
    """Label, figure of the base model and summary over seeds of every benchmark metric that the settings ask for.

    And the artefacts that they are from, the base model's first.
    """
    if not settings.evaluation.benchmarks:
        return [], []
    from prism_assets.evaluation.assets import benchmarks_of, shown_scores

    target, _ = split_key(key)
    base = _shown(lake, "benchmarks", f"base|{target}", target)
    for seed, adapter in zip(settings.seeds, adapters, strict=True):
        scores = _shown(lake, "benchmarks", seed_partition(key, seed), target)
        if scores.header["inputs"]["adapter"]["content_hash"] != adapter.content_hash:
            raise CannotExport(
                f"The benchmarks of {key} are those of an earlier adapter: `prism run` brings them up to date."
            )
    summary, scored = benchmarks_of(settings, lake, key)
    before = shown_scores(lake, base)
    figures = [
        (f"{label} ({before[label].documents:,} documents)", before[label].value, value)
        for label, value in summary.items()
    ]
    seeds = [(f"benchmarks, seed {seed}", one) for seed, one in zip(settings.seeds, scored, strict=True)]
    return figures, [("benchmarks, before", base), *seeds]


def _source(what: str, artifact: Artifact) -> Source:
    return Source(what, artifact.fingerprint, artifact.content_hash, artifact.header["run_id"] or "")


def _name(traced: Mapping[str, Any]) -> str:
    return f"{traced['table']}[{traced['partition']}]" if traced["partition"] else traced["table"]


def _check_free(place: Path, known: Sequence[str], force: bool) -> None:
    """Only what an export wrote is ever replaced: `--to .` must not take a project's own `data` with it."""
    if not os.path.lexists(place):
        return
    if not force:
        raise CannotExport(f"{place} is there already: name another folder, or use --force to replace an earlier export.")
    plain = place.is_dir() and not place.is_symlink()
    others = [one.name for one in place.iterdir() if one.name not in known] if plain else ["it"]
    if others:
        raise CannotExport(f"{place} was not written by an export ({others[0]} is no file of one): name another folder.")


def _put(place: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then rename into place."""
    draft = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        write(draft)
        if place.exists():
            shutil.rmtree(place)
        os.replace(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
