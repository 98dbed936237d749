"""The asset `evaluation`: every seed's adapter, and the base model, on the target's held-out records."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import dagster as dg

from prism_assets.evaluation.benchmark_scores import benchmark_tasks, benchmarks_of, make_benchmarks, shown_scores
from prism_assets.evaluation.scores import make_scores
from prism_assets.identity import base_key, seed_partition, split_key
from prism_assets.metadata import picture, preview
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact
from prism_assets.stage import Stage
from prism_assets.tables import METRICS
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    from prism_assets.evaluation.benchmarks import Task

BETTER_THAN_BASE = Check(
    "better_than_base",
    "Fine-tuning raised the mean log-probability of the held-out records above the base model's.",
)


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "evaluation",
        group="evaluation",
        kinds={"pytorch", "parquet"},
        deps=["adapter", "targets"],
        checks=[BETTER_THAN_BASE],
        loads_model=True,
    )
    def evaluation(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Held-out mean log-probability, target preference (τ = 1) and exact match of each seed's adapter.

        Where the settings name benchmarks, their scores too.
        """
        stage = stage_of(project, context)
        tasks = benchmark_tasks(stage.settings)
        return each_partition(context, stage, lambda key: _evaluate(stage, tasks, key))

    return evaluation


def _evaluate(stage: Stage, tasks: "Sequence[Task]", key: str) -> Outcome:
    target, _ = split_key(key)
    records = stage.shown("eval_examples", target)
    base, computed = make_scores(stage, records, None, key)
    stage.show(base, base_key(target))
    scored = []
    for seed in stage.settings.seeds:
        head = seed_partition(key, seed)
        scores, made = make_scores(stage, records, stage.shown("adapters", head), key)
        scored.append(stage.show(scores, head))
        computed += made
    # After our own measures: data of a benchmark that cannot be downloaded keep nothing of these back.
    computed += make_benchmarks(stage, tasks, key)
    outcome = _outcome(stage, key, base, scored, computed)
    return _with_benchmarks(outcome, stage, key) if tasks else outcome


def _outcome(stage: Stage, key: str, base: Artifact, scored: Sequence[Artifact], computed: int) -> Outcome:
    from prism_assets.evaluation.metrics import mean_over_seeds
    from prism_assets.plots import strategies_comparison

    summary = {name: mean_over_seeds([one.notes[name] for one in scored]) for name in METRICS}
    before = {name: base.notes[name] for name in METRICS}
    rows = [{"model": "base", **before}]
    rows += [
        {"model": f"seed {seed}", **{name: one.notes[name] for name in METRICS}}
        for seed, one in zip(stage.settings.seeds, scored, strict=True)
    ]
    mean = summary["mean_log_prob"]
    assert mean is not None and mean["mean"] is not None
    gain = mean["mean"] - before["mean_log_prob"]
    comparison = strategies_comparison({split_key(key)[1]: summary}, before)
    return Outcome(
        scored,
        computed,
        {
            **{name: value["mean"] for name, value in summary.items() if value},
            "summary": dg.MetadataValue.json(summary),
            "rows": preview(rows),
            "comparison": picture(comparison, "held-out metrics"),
        },
        [BETTER_THAN_BASE(gain > 0, gain_in_mean_log_prob=gain)],
    )


def _with_benchmarks(outcome: Outcome, stage: Stage, key: str) -> Outcome:
    """The outcome with the benchmarks' scores: their content is part of the evaluation's data version."""
    summary, artifacts = benchmarks_of(stage, key)
    base = shown_scores(stage.lake, stage.shown("benchmarks", base_key(split_key(key)[0])))
    rows = [
        {"benchmark": label, "base": base[label].value, "mean": value["mean"], "std": value["std"]}
        for label, value in summary.items()
    ]
    return replace(
        outcome,
        artifacts=[*outcome.artifacts, *artifacts],
        metadata={**outcome.metadata, "benchmarks": preview(rows, limit=50)},
    )
