"""Evaluation: every adapter on its target's held-out records, and the report that puts the strategies side by side."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version, encoder_of
from prism_assets.features.assets import feature_version, target_set
from prism_assets.partitions import target_strategies_of, targets_of
from prism_assets.reference.assets import adapted, lora_identity, pad_token_id, warmup_scope
from prism_assets.selection.assets import join_key, json_lines_of, split_key
from prism_assets.settings import Settings
from prism_assets.training.assets import seed_partition
from prism_assets.trust.verdict import findings
from resources.lake import Artifact, Lake, Recipe
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import pyarrow as pa
    from peft import PeftModel

    from prism_assets.evaluation.benchmarks import Score, Task

EVALUATION_VERSION = 1
BENCHMARK_VERSION = 1
REPORT_VERSION = 2

GROUP = "evaluation"
METRICS = ("target_preference", "mean_log_prob", "exact_match")


def build_evaluation(settings: Settings) -> dg.AssetsDefinition:
    """The asset `evaluation`, one partition per target and strategy of the settings."""

    @dg.asset(
        partitions_def=target_strategies_of(settings),
        group_name=GROUP,
        kinds={"pytorch", "parquet"},
        code_version=str(EVALUATION_VERSION),
        deps=["adapter", dg.AssetDep("targets")],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        check_specs=[
            dg.AssetCheckSpec(
                "better_than_base",
                asset="evaluation",
                description="Fine-tuning raised the mean log-probability of the held-out records above the base model's.",
            )
        ],
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
    ) -> dg.MaterializeResult:
        """Held-out mean log-probability, target preference (τ = 1) and exact match of each seed's adapter.

        Where the settings name benchmarks, their scores too.
        """
        tasks = benchmark_tasks(settings)

        def evaluate(key: str) -> stage.Outcome:
            target, strategy = split_key(key)
            records = lake.require("eval_examples", target, corpus_version(settings, language_model))
            base, computed = publish_scores(context, settings, lake, language_model, records, None, key)
            lake.point(base, f"base|{target}", run_id=context.run_id)
            published = []
            for seed in settings.seeds:
                trained = lake.require("adapters", seed_partition(key, seed))
                scores, made = publish_scores(context, settings, lake, language_model, records, trained, key)
                lake.point(scores, seed_partition(key, seed), run_id=context.run_id)
                published.append(scores)
                computed += made
            # After our own measures: data of a benchmark that cannot be downloaded keep nothing of these back.
            computed += _publish_benchmarks(context, settings, lake, language_model, tasks, None, f"base|{target}")
            for seed in settings.seeds:
                head = seed_partition(key, seed)
                trained = lake.require("adapters", head)
                computed += _publish_benchmarks(context, settings, lake, language_model, tasks, trained, head)
            outcome = _evaluation_outcome(strategy, base, published, computed, settings)
            return _with_benchmarks(outcome, settings, lake, key) if tasks else outcome

        return stage.each_partition(context, evaluate)

    return evaluation


def publish_scores(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    records: Artifact,
    adapter: Artifact | None,
    key: str,
) -> tuple[Artifact, int]:
    """One row per held-out record under one adapter (None: where fine-tuning starts), and the means in the notes."""
    import pyarrow as pa

    recipe = Recipe(
        "evaluations",
        EVALUATION_VERSION,
        {
            "max_new_tokens": settings.evaluation.max_new_tokens,
            "lora": lora_identity(settings),
            "dtype": str(model.torch_dtype()),
        },
        {"model": model.identify().fingerprint, "records": records, "adapter": adapter or "none"},
        partition=key if adapter else f"base|{split_key(key)[0]}",
    )
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    table = lake.read_table(records)
    with ExitStack() as stack:
        state = adapter_state(adapter) if adapter else None
        peft_model = stack.enter_context(adapted(settings, model, state=state))
        stopwatch = stage.Stopwatch()
        columns, means = score_records(peft_model, table, settings, model)
        cost = stopwatch.cost()
    rows = pa.table({"id": table["id"], **columns})
    seed = {"seed": adapter.notes["seed"]} if adapter else {}
    return lake.publish_table(recipe, rows, run_id=context.run_id, notes={**means, **seed, "cost": cost}), 1


def adapter_state(adapter: Artifact) -> Mapping[str, Any]:
    """The LoRA tensors of an adapter, by parameter name."""
    from safetensors.torch import load_file

    return load_file(adapter.path / "adapter_model.safetensors")


def score_records(
    peft_model: "PeftModel", table: Any, settings: Settings, model: LanguageModel
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns [n] and means of the metrics over held-out records; exact match is None where no record has an answer."""
    import numpy as np
    import pyarrow as pa

    from prism_assets.corpus.tokenization import prompt_tokens
    from prism_assets.evaluation import metrics
    from prism_assets.features.gradients import GradientEngine

    records = target_set(table)
    engine = GradientEngine(peft_model, token_budget=settings.features.token_budget)
    log_probs = engine.mean_log_probs(records.examples)
    chosen = log_probs[: records.size]
    margins = records.scores(log_probs) if records.pairs else None
    means: dict[str, Any] = {**metrics.held_out(chosen, margins), "exact_match": None, "records": records.size}
    predictions: list[str | None] = [None] * records.size
    matches: list[bool | None] = [None] * records.size
    answers = table["answers"].to_pylist()
    asked = [position for position, one in enumerate(answers) if one]
    if asked:
        encoder = encoder_of(settings, model)
        generated = metrics.generate(
            peft_model,
            [prompt_tokens(records.examples[position]) for position in asked],
            pad_token_id=pad_token_id(model),
            eos_token_id=list(encoder.stop_token_ids),
            max_new_tokens=settings.evaluation.max_new_tokens,
            batch_size=settings.evaluation.batch_size,
        )
        for position, tokens in zip(asked, generated, strict=True):
            predictions[position] = model.tokenizer().decode(tokens, skip_special_tokens=True)
            matches[position] = metrics.exact_match(predictions[position], answers[position])
        means["exact_match"] = float(np.mean([matches[position] for position in asked]))
    columns = {
        "mean_log_prob": pa.array(chosen, pa.float64()),
        "margin": pa.array(margins, pa.float64()) if margins is not None else pa.nulls(records.size, pa.float64()),
        "prediction": pa.array(predictions, pa.string()),
        "exact_match": pa.array(matches, pa.bool_()),
    }
    return columns, means


def _evaluation_outcome(
    strategy: str, base: Artifact, published: Sequence[Artifact], computed: int, settings: Settings
) -> stage.Outcome:
    from prism_assets.evaluation.metrics import summarize
    from prism_assets.evaluation.plots import as_markdown_image, strategies_comparison

    summary = {name: summarize([one.notes[name] for one in published]) for name in METRICS}
    before = {name: base.notes[name] for name in METRICS}
    rows = [{"model": "base", **before}]
    rows += [
        {"model": f"seed {seed}", **{name: one.notes[name] for name in METRICS}}
        for seed, one in zip(settings.seeds, published, strict=True)
    ]
    gain = summary["mean_log_prob"]["mean"] - before["mean_log_prob"]
    return stage.Outcome(
        list(published),
        computed,
        {
            **{name: value["mean"] for name, value in summary.items() if value},
            "summary": dg.MetadataValue.json(summary),
            "rows": stage.preview(rows),
            "comparison": dg.MetadataValue.md(
                as_markdown_image(strategies_comparison({strategy: summary}, before), "held-out metrics")
            ),
        },
        {"better_than_base": (gain > 0, {"gain_in_mean_log_prob": gain})},
    )


# -- benchmarks --------------------------------------------------------------------------------------------------


def benchmark_tasks(settings: Settings) -> "list[Task]":
    """The tasks of `evaluation.benchmarks`. Raises UnusableBenchmark."""
    if not settings.evaluation.benchmarks:
        return []
    from prism_assets.evaluation.benchmarks import read_tasks

    return read_tasks(settings.evaluation.benchmarks)


def _publish_benchmarks(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    tasks: "Sequence[Task]",
    adapter: Artifact | None,
    head: str,
) -> int:
    """One row per metric of each task, for one adapter (None: where fine-tuning starts); the head points at them.

    Returns how many artefacts were made. Without tasks nothing is done, and no head is left to be shown.
    """
    import pyarrow as pa

    from prism_assets.evaluation.benchmarks import harness_version, run_tasks

    if not tasks:
        lake.retire("benchmarks", head)
        return 0
    recipe = Recipe(
        "benchmarks",
        BENCHMARK_VERSION,
        {
            "tasks": [task.name for task in tasks],
            "limit": settings.evaluation.benchmark_limit,
            "lm_eval": harness_version(),
            "lora": lora_identity(settings),
            "dtype": str(model.torch_dtype()),
        },
        {
            "model": model.identify().fingerprint,
            "adapter": adapter or "none",
            **{f"task file {task.name}": task.content for task in tasks if task.content},
        },
        partition=head,
    )
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        context.log.info(f"Benchmarks of {head}: {', '.join(task.name for task in tasks)}")
        with adapted(settings, model, state=adapter_state(adapter) if adapter else None) as peft_model:
            scores = run_tasks(
                peft_model,
                model.tokenizer(),
                tasks,
                batch_size=settings.evaluation.batch_size,
                limit=settings.evaluation.benchmark_limit,
            )
        rows = pa.Table.from_pylist([score._asdict() for score in scores], schema=_score_columns())
        seed = {"seed": adapter.notes["seed"]} if adapter else {}
        artifact = lake.publish_table(recipe, rows, run_id=context.run_id, notes=seed)
    lake.point(artifact, head, run_id=context.run_id)
    return int(computed)


def _score_columns() -> "pa.Schema":
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    return pa.schema(
        {
            **{"task": text, "metric": text, "filter": text, "value": pa.float64(), "higher_is_better": pa.bool_()},
            **{"documents": number, "shots": number, "task_version": text, "asked": pa.bool_()},
        }
    )


def shown_scores(lake: Lake, artifact: Artifact) -> "dict[str, Score]":
    """Label and score of every metric that the settings ask for."""
    from prism_assets.evaluation.benchmarks import Score

    scores = [Score(**row) for row in lake.read_table(artifact).to_pylist()]
    return {score.label: score for score in scores if score.asked}


def benchmarks_of(settings: Settings, lake: Lake, key: str) -> tuple[dict[str, Any], list[Artifact]]:
    """Mean and std over seeds of each benchmark metric of a target and strategy, and the artefacts they are from."""
    from prism_assets.evaluation.metrics import summarize

    artifacts = [lake.require("benchmarks", seed_partition(key, seed)) for seed in settings.seeds]
    scores = [shown_scores(lake, one) for one in artifacts]
    return {label: summarize([one[label].value for one in scores]) for label in scores[0]}, artifacts


def _with_benchmarks(outcome: stage.Outcome, settings: Settings, lake: Lake, key: str) -> stage.Outcome:
    """The outcome with the benchmarks' scores: their content is part of the evaluation's data version."""
    summary, artifacts = benchmarks_of(settings, lake, key)
    base = shown_scores(lake, lake.require("benchmarks", f"base|{split_key(key)[0]}"))
    rows = [
        {"benchmark": label, "base": base[label].value, "mean": value["mean"], "std": value["std"]}
        for label, value in summary.items()
    ]
    return stage.Outcome(
        [*outcome.artifacts, *artifacts],
        outcome.computed,
        {**outcome.metadata, "benchmarks": stage.preview(rows, limit=50)},
        outcome.checks,
    )


# -- report ------------------------------------------------------------------------------------------------------


def build_report_asset(settings: Settings) -> dg.AssetsDefinition:
    """The asset `report`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"html"},
        code_version=str(REPORT_VERSION),
        deps=["evaluation", "selection", "target_direction", "live_pool"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        # The weekly refresh makes it at least once in seven days.
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(days=9), warn_window=timedelta(days=8)
        ),
    )
    def report(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
        vector_store: VectorStore,
    ) -> dg.MaterializeResult:
        """One page per target: strategies side by side, what was selected and why, and where every number came from."""
        result = stage.each_partition(
            context, lambda name: _publish_report(context.run_id, settings, lake, language_model, vector_store, name)
        )
        combined = write_combined_report(settings, lake, language_model)
        context.log.info(f"The report over all targets is at {combined}.")
        return result

    return report


def _publish_report(
    run_id: str, settings: Settings, lake: Lake, model: LanguageModel, store: VectorStore, name: str
) -> stage.Outcome:
    from prism_assets.evaluation.plots import as_markdown_image, strategies_comparison
    from prism_assets.evaluation.report import build_report, verdict_sentences

    content, inputs = _target_content(settings, lake, model, name)
    # A report shows names: equal inputs under another name, or of other strategies, are another report.
    shown = {"target": name, "strategies": settings.strategies, "seeds": settings.seeds}
    recipe = Recipe("report", REPORT_VERSION, shown, inputs, partition=name)
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        content["explanations"] = _explanations(settings, lake, model, store, name)
        data = _report_data(settings, lake, model, {name: content})

        def write(folder: Path) -> None:
            (folder / "report.json").write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
            (folder / "report.html").write_text(build_report(data), encoding="utf-8")

        artifact = lake.publish_folder(recipe, write, run_id=run_id)
    lake.point(artifact, name, run_id=run_id)
    rows = [
        {"strategy": strategy, **{metric: (entry[metric] or {}).get("mean") for metric in METRICS}}
        for strategy, entry in content["strategies"].items()
    ]
    return stage.Outcome(
        [artifact],
        int(computed),
        {
            "report": dg.MetadataValue.path(str(artifact.path / "report.html")),
            "rows": stage.preview([{"strategy": "base", **content["base"]}, *rows]),
            "verdict": dg.MetadataValue.md("\n".join(f"- {one}" for one in verdict_sentences(content))),
            "comparison": dg.MetadataValue.md(
                as_markdown_image(strategies_comparison(content["strategies"], content["base"]), "comparison")
            ),
        },
    )


def _explanations(
    settings: Settings, lake: Lake, model: LanguageModel, store: VectorStore, name: str
) -> list[dict[str, Any]]:
    """Why the top rows of PRISM stand there, and a few surprising ones: what it alone takes, what it alone leaves."""
    from prism_assets.explanation import CannotExplain, Explainer

    asked = _worth_explaining(settings, lake, name)
    if not asked:
        return []
    explained = []
    with Explainer(settings, lake, model, store, target=name, strategy="prism") as explainer:
        for reason, example in asked:
            try:
                found = explainer.explain(example, neighbours=3)
            except CannotExplain as error:
                explained.append({"reason": reason, "id": example, "error": str(error)})
                continue
            explained.append(
                {
                    "reason": reason,
                    **{key: getattr(found, key) for key in ("id", "source", "prompt", "completion", "score", "exact_score")},
                    "score_rows": found.score_rows(limit=6),
                    "ranks": [one._asdict() for one in found.ranks],
                    "neighbours": [one._asdict() for one in found.neighbours],
                }
            )
    return explained


def _worth_explaining(settings: Settings, lake: Lake, target: str, each: int = 3) -> list[tuple[str, str]]:
    """(why, example id) of the rows that the report explains; none where PRISM is not among the strategies."""
    if "prism" not in settings.strategies:
        return []
    ids = {
        strategy: lake.read_table(lake.require("selection", join_key(target, strategy)), ["id"])["id"].to_pylist()
        for strategy in settings.strategies
        if strategy in ("prism", "uniform", "less")
    }
    others = {name: set(rows) for name, rows in ids.items() if name != "prism"}
    taken_by_others = set().union(*others.values())
    asked = [("top of prism", one) for one in ids["prism"][:each]]
    if others:
        alone = [one for one in ids["prism"] if one not in taken_by_others]
        asked += [(f"selected by prism, not by {' or '.join(others)}", one) for one in alone[:each]]
    for name in others:
        left = [one for one in ids[name] if one not in set(ids["prism"])]
        asked += [(f"selected by {name}, not by prism", one) for one in left[:1]]
    return list({example: (reason, example) for reason, example in reversed(asked)}.values())[::-1]


def _target_content(
    settings: Settings, lake: Lake, model: LanguageModel, name: str
) -> tuple[dict[str, Any], dict[str, Artifact | list[Artifact]]]:
    """One target's part of report.json, and the artefacts that it shows."""
    version = feature_version(settings, lake, model)
    corpus = corpus_version(settings, model)
    weights = lake.require("target_weights", name, version)
    pool = lake.require("live_pool", None, corpus)
    base = lake.require("evaluations", f"base|{name}")
    notes = weights.notes
    strategies, shown = {}, [weights, pool, base]
    for strategy in settings.strategies:
        entry, artifacts = _strategy_content(settings, lake, name, strategy)
        strategies[strategy] = entry
        shown += artifacts
    rows = lake.read_table(weights, None).to_pylist()
    eval_rows = lake.require("eval_examples", name, corpus).notes["rows"]
    directions = [key for key in notes["effective_number_of_targets"]]
    measured = _trust_in(lake, weights, name, version)
    shown += [measured] if measured is not None else []
    content = {
        "kind": notes["kind"],
        "number_of_targets": notes["number_of_targets"],
        "number_of_eval": eval_rows,
        "pool": {
            "rows": sum(lake.read_table(pool, ["rows"])["rows"].to_pylist()),
            "canonical": pool.notes["canonical_rows"],
            "sources": pool.notes["sources"],
        },
        "direction": {
            **{key: notes[key] for key in ("effective_number_of_targets", "temperature", "log_z", "checkpoints")},
            "weight_rank_agreement": notes["weight_rank_agreement"],
            "first_order": notes["first_order"],
            "weights": [
                {key: row[key] for key in ("id", "preference", "score", "prompt", *directions)}
                for row in sorted(rows, key=lambda row: -(row["prism"] or 0))
            ],
        },
        "base": {metric: base.notes[metric] for metric in METRICS},
        "strategies": strategies,
        "trust": None if measured is None else [one._asdict() for one in findings(measured.notes)],
    }
    if settings.evaluation.benchmarks:
        content["benchmarks"], scored = _benchmark_content(settings, lake, name)
        shown += scored
    return content, {"shown": shown}


def _trust_in(lake: Lake, weights: Artifact, target: str, version: str) -> Artifact | None:
    """What was measured of the trust in a target; None where nothing was, or for other weights or directions than today's."""
    found = lake.head("trust", target, version)
    if found is None or found.header["inputs"]["weights"]["content_hash"] != weights.content_hash:
        return None
    same = all(
        found.header["inputs"][name]["content_hash"] == weights.header["inputs"][name]["content_hash"]
        for name in ("prism", "uniform")
    )
    return found if same else None


def _benchmark_content(settings: Settings, lake: Lake, target: str) -> tuple[dict[str, Any], list[Artifact]]:
    """Every benchmark metric of the base model and, as mean and std over seeds, of each strategy."""
    base = lake.require("benchmarks", f"base|{target}")
    artifacts, strategies = [base], {}
    for strategy in settings.strategies:
        strategies[strategy], scored = benchmarks_of(settings, lake, join_key(target, strategy))
        artifacts += scored
    content = {
        "lm_eval": base.header["settings"]["lm_eval"],
        "limit": base.header["settings"]["limit"],
        "metrics": {
            label: {
                "base": score.value,
                "higher_is_better": score.higher_is_better,
                **{"documents": score.documents, "shots": score.shots, "version": score.task_version},
                "strategies": {strategy: summary.get(label) for strategy, summary in strategies.items()},
            }
            for label, score in shown_scores(lake, base).items()
        },
    }
    return content, artifacts


def _strategy_content(
    settings: Settings, lake: Lake, target: str, strategy: str
) -> tuple[dict[str, Any], list[Artifact]]:
    from prism_assets.evaluation.metrics import summarize

    key = join_key(target, strategy)
    selection = lake.require("selection", key)
    seeds = [lake.require("evaluations", seed_partition(key, seed)) for seed in settings.seeds]
    adapters = [lake.require("adapters", seed_partition(key, seed)) for seed in settings.seeds]
    notes = selection.notes
    columns = ["rank", "score", "source", "prompt", "completion"]
    entry = {
        **{metric: summarize([one.notes[metric] for one in seeds]) for metric in METRICS},
        "per_seed": [
            {"seed": seed, **{metric: one.notes[metric] for metric in METRICS}}
            for seed, one in zip(settings.seeds, seeds, strict=True)
        ],
        "selected": str(selection.path),
        "selected_jsonl": str(json_lines_of(selection)),
        "adapter": str(adapters[0].path),
        "rows": notes["rows"],
        "completion_tokens": notes["completion_tokens"],
        "steps": adapters[0].notes["steps"],
        "seconds": sum(one.notes["seconds"] for one in adapters),
        "composition": notes["composition"],
        "non_positive_influence": notes["non_positive_influence"],
        "score_histogram": notes.get("score_histogram"),
        "examples": lake.read_table(selection, columns).slice(0, 20).to_pylist(),
        "fingerprint": selection.fingerprint,
        "run_id": selection.header["run_id"],
    }
    return {name: value for name, value in entry.items() if value is not None or name in METRICS}, [
        selection, *adapters, *seeds
    ]  # fmt: skip


def _report_data(
    settings: Settings, lake: Lake, model: LanguageModel, targets: Mapping[str, Any]
) -> dict[str, Any]:
    """report.json around the targets' parts."""
    corpus = corpus_version(settings, model)
    pool = lake.require("live_pool", None, corpus)
    warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))
    rejects: list[dict[str, Any]] = []
    for shard in lake.read_table(pool, ["shard"])["shard"].to_pylist():
        refused = lake.head("rejects", shard, corpus)
        if refused is not None:
            rejects += [{"shard": shard, **row} for row in lake.read_table(refused).to_pylist()]
    return {
        **stage.page_head(settings, model),
        "lineage": {
            one.table: {"fingerprint": one.fingerprint, "content_hash": one.content_hash, "run_id": one.header["run_id"]}
            for one in (pool, warmup)
        },
        "feature_version": feature_version(settings, lake, model),
        "rejects": rejects,
        "contamination": pool.notes["contaminated"],
        "duplicates": pool.notes["duplicates"],
        "targets": dict(targets),
    }


def write_combined_report(settings: Settings, lake: Lake, model: LanguageModel) -> Path:
    """The report over all targets that have one, renamed into place at `storage.report`; returns the page's path."""
    from prism_assets.evaluation.report import build_report

    found = {name: lake.head("report", name) for name in settings.targets}
    parts: dict[str, Any] = {}
    for name, artifact in found.items():
        if artifact is not None:
            parts |= json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))["targets"]
    data = _report_data(settings, lake, model, parts)
    texts = {"report.json": json.dumps(data, indent=1, ensure_ascii=False), "report.html": build_report(data)}
    return stage.replace_texts(settings.storage.report, texts) / "report.html"
