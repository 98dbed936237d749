"""Cards: the README.md of an exported adapter and of exported data."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prism_assets.report.comparison import METRIC_LABELS
from prism_assets.resources.model.quantization import ASKED
from prism_assets.text import as_cell, as_code, visible


class CitedArtifact(NamedTuple):
    """An artefact of the lake, as a card names it."""

    what: str
    fingerprint: str
    content_hash: str
    run_id: str


class Facts(NamedTuple):
    """The facts that the cards are written from."""

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
    made_from: Sequence[CitedArtifact]  # the selection, and what it was made from
    results: Sequence[CitedArtifact]  # what the figures are from: adapters, evaluations and benchmarks of all seeds
    quantization: str = "none"  # of the base model as it was loaded: the setting model.quantization


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
    start = f", with the adapter {as_code(facts.starting_adapter)} to start from" if facts.starting_adapter else ""
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {as_code(facts.base_model)}, fine-tuned for {facts.target} on data selected by {facts.strategy}\n",
            f"A LoRA adapter for {as_code(facts.base_model)}{start}, trained for {facts.steps:,} optimiser steps "
            f"(seed {facts.seed}) on {_data_sentence(facts)}\n",
            "```python",
            "from peft import PeftModel",
            *_load_base(facts),
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
            "```\n",
            *_composition_section(facts),
            "## Held-out figures\n",
            *_figure_lines(facts),
            "",
            *_lineage_section(facts, [*facts.made_from, *facts.results]),
        ]
    )


def _load_base(facts: Facts) -> list[str]:
    """Code that loads the base model as it was trained and evaluated."""
    name = json.dumps(facts.base_model)
    if facts.quantization == "none":
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({name})",
        ]
    options = ", ".join(f"{key}={value!r}" for key, value in ASKED[facts.quantization].items())
    return [
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
        "",
        f"quantized = BitsAndBytesConfig({options})",
        f"base = AutoModelForCausalLM.from_pretrained({name}, quantization_config=quantized)",
    ]


def data_card(facts: Facts) -> str:
    """README.md of the data: the hub's front matter, which names the split's file, columns, sources and lineage."""
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
        f"{facts.rows:,} examples ({facts.completion_tokens:,} completion tokens), which the strategy "
        f"`{facts.strategy}` of prism-assets selected for the target `{facts.target}` from {facts.pool_rows:,} "
        f"candidates under the budget {facts.budget}."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _composition_section(facts: Facts) -> list[str]:
    ordered = sorted(facts.composition.items(), key=lambda item: (-item[1], item[0]))
    rows = [f"| {as_cell(name)} | {count:,} |" for name, count in ordered]
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
    ours = [(label, facts.base.get(metric), facts.figures.get(metric)) for metric, label in METRIC_LABELS.items()]
    benchmarks = [(f"lm-eval: {label}", before, value) for label, before, value in facts.benchmarks]
    for label, before, value in [*ours, *benchmarks]:
        if value is None:
            continue
        spread = "" if value["std"] is None else f" ± {value['std']:.3f}"
        lines.append(f"| {_cell(label)} | {'–' if before is None else f'{before:.3f}'} | {value['mean']:.3f}{spread} |")
    return lines


def _lineage_section(facts: Facts, sources: Sequence[CitedArtifact]) -> list[str]:
    rows = [
        f"| {_cell(one.what)} | `{one.fingerprint}` | `{one.content_hash}` | "
        f"{f'`{one.run_id}`' if one.run_id else '–'} |"
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
    """A label of ours or of the harness."""
    return visible(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _repository_names(composition: Mapping[str, int]) -> list[str]:
    """The sources written owner/name, as data sets are on the hub. A bare word is a label: it would claim another's
    data."""
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
