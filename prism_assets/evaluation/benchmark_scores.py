"""Scores on benchmarks of lm-eval, as artefacts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prism_assets.evaluation.scores import seed_note
from prism_assets.identity import base_key, seed_partition, split_key
from prism_assets.resources.lake import Artifact, Lake, Rows
from prism_assets.stage import Stage
from prism_assets.tables import schema_of
from prism_assets.training.adapter import adapter_state

if TYPE_CHECKING:
    from prism_assets.evaluation.benchmarks import Score, Task
    from prism_assets.settings import Settings


def benchmark_tasks(settings: "Settings") -> "list[Task]":
    """The tasks of `evaluation.benchmarks`. Raises UnusableBenchmark."""
    if not settings.evaluation.benchmarks:
        return []
    from prism_assets.evaluation.benchmarks import read_tasks

    return read_tasks(settings.evaluation.benchmarks)


def make_benchmarks(stage: Stage, tasks: "Sequence[Task]", key: str) -> int:
    """One row per metric of each task, for the base model and for each seed's adapter; how many artefacts were made.

    Without tasks nothing is done, and no head is left to be shown.
    """
    base = base_key(split_key(key)[0])
    heads = [base, *(seed_partition(key, seed) for seed in stage.settings.seeds)]
    if not tasks:
        for head in heads:
            stage.retire("benchmarks", head)
        return 0
    return sum(_make(stage, tasks, None if head == base else stage.shown("adapters", head), head) for head in heads)


def _make(stage: Stage, tasks: "Sequence[Task]", adapter: Artifact | None, head: str) -> int:
    """The scores of one adapter (None: where fine-tuning starts); the head points at them."""
    from prism_assets.evaluation.benchmarks import harness_version

    recipe = stage.recipe(
        "benchmarks",
        {
            "tasks": [task.name for task in tasks],
            "limit": stage.settings.evaluation.benchmark_limit,
            "lm_eval": harness_version(),
            "lora": stage.lora_identity,
            "dtype": stage.dtype,
        },
        {
            "model": stage.model_identity.fingerprint,
            "adapter": adapter or "none",
            **{f"task file {task.name}": task.content for task in tasks if task.content},
        },
        partition=head,
    )
    scores, computed = stage.make(recipe, lambda: _run(stage, tasks, adapter, head))
    stage.show(scores, head)
    return computed


def _run(stage: Stage, tasks: "Sequence[Task]", adapter: Artifact | None, head: str) -> Rows:
    import pyarrow as pa

    from prism_assets.evaluation.benchmarks import run_tasks

    stage.log.info(f"Benchmarks of {head}: {', '.join(task.name for task in tasks)}")
    with stage.adapted(state=adapter_state(stage.lake, adapter) if adapter else None) as peft_model:
        scores = run_tasks(
            peft_model,
            stage.model.tokenizer(),
            tasks,
            batch_size=stage.settings.evaluation.batch_size,
            limit=stage.settings.evaluation.benchmark_limit,
        )
    schema = schema_of("benchmarks")
    return Rows(pa.Table.from_pylist([score._asdict() for score in scores], schema=schema), seed_note(adapter))


def shown_scores(lake: Lake, artifact: Artifact) -> "dict[str, Score]":
    """Label and score of every metric that the settings ask for."""
    from prism_assets.evaluation.benchmarks import Score

    scores = [Score(**row) for row in lake.read_table(artifact).to_pylist()]
    return {score.label: score for score in scores if score.asked}


def benchmarks_of(stage: Stage, key: str) -> tuple[dict[str, Any], list[Artifact]]:
    """Mean and std over seeds of each benchmark metric of a target and strategy, and the artefacts they are from."""
    from prism_assets.evaluation.metrics import mean_over_seeds

    artifacts = [stage.shown("benchmarks", seed_partition(key, seed)) for seed in stage.settings.seeds]
    scores = [shown_scores(stage.lake, one) for one in artifacts]
    return {label: mean_over_seeds([one[label].value for one in scores]) for label in scores[0]}, artifacts
