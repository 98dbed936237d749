"""The results of one target's trials: means, paired differences with intervals, and costs.

Plain data in, plain data out: what `summarize_trials` returns is one target's part of experiment.json.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prism_assets.report.comparison import METRIC_LABELS, shown_metrics
from prism_assets.report.wording import mean_and_std
from prism_assets.stats.seeds import paired_difference, summarize_seeds

# Always run; every strategy is compared with them.
COMPARED_WITH = ("uniform", "less", "random")
STAGES = ("target features", "direction", "selection", "fine-tuning", "evaluation")


class Cost(NamedTuple):
    """What making one artefact took; None where its maker did not record it."""

    stage: str
    artifact: str  # fingerprint: an artefact that several trials share was made once
    cpu_seconds: float | None
    gpu_seconds: float | None


class Trial(NamedTuple):
    """One adapter on the held-out records of its split, and the model that it was trained from on the same ones."""

    strategy: str
    split: int
    seed: int
    metrics: Mapping[str, float | None]
    base: Mapping[str, float | None]
    rows: int  # selected
    completion_tokens: int
    costs: Sequence[Cost]


def summarize_trials(trials: Sequence[Trial], redraw: str) -> dict[str, Any]:
    """Means, paired differences to `COMPARED_WITH`, costs by stage.

    The unit of all statistics is a split, which counts as the mean of its seeds; where there is one split only, it is a
    seed. `redraw` names how splits were drawn. Raises ValueError where a strategy lacks the trial of a split and seed.
    """
    strategies = list(dict.fromkeys(one.strategy for one in trials))
    splits = sorted({one.split for one in trials})
    seeds = list(dict.fromkeys(one.seed for one in trials))
    by_place = {(one.strategy, one.split, one.seed): one for one in trials}
    missing = [(s, p, q) for s in strategies for p in splits for q in seeds if (s, p, q) not in by_place]
    if missing:
        raise ValueError(f"differences are paired: there is no trial of {', '.join(map(str, missing[:5]))}")
    unit = "split" if len(splits) > 1 else "seed"
    # [units][trials of the unit] as (split, seed)
    units = [[(p, q) for q in seeds] for p in splits] if unit == "split" else [[(splits[0], q)] for q in seeds]

    def values(strategy: str, metric: str) -> list[float] | None:
        """One number per unit; None where the target's records have no such metric."""
        means = []
        for its in units:
            found = _known([by_place[strategy, *place].metrics.get(metric) for place in its])
            if found is None:
                return None
            means.append(_mean(found))
        return means

    measured = {name: {metric: values(name, metric) for metric in METRIC_LABELS} for name in strategies}
    base = {
        metric: _described(_known([by_place[strategies[0], p, seeds[0]].base.get(metric) for p in splits]))
        for metric in METRIC_LABELS
    }
    differences = {
        name: {
            other: {metric: _difference(measured[name][metric], measured[other][metric]) for metric in METRIC_LABELS}
            for other in _others(name)
            if other in strategies
        }
        for name in strategies
    }
    return {
        "splits": len(splits),
        "seeds": seeds,
        "redraw": redraw,
        "unit": unit,
        "units": len(units),
        "base": base,
        "strategies": {
            name: {
                **{metric: _described(measured[name][metric]) for metric in METRIC_LABELS},
                "rows": _mean([one.rows for one in trials if one.strategy == name]),
                "completion_tokens": _mean([one.completion_tokens for one in trials if one.strategy == name]),
                "cost": cost_by_stage(cost for one in trials if one.strategy == name for cost in one.costs),
            }
            for name in strategies
        },
        "differences": differences,
        "cost": cost_by_stage(cost for one in trials for cost in one.costs),
        "trials": [{"strategy": one.strategy, "split": one.split, "seed": one.seed, **one.metrics} for one in trials],
    }


def _others(name: str) -> Sequence[str]:
    """What a strategy is compared with; two of these are compared once, not both ways."""
    return COMPARED_WITH[COMPARED_WITH.index(name) + 1 :] if name in COMPARED_WITH else COMPARED_WITH


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [one for one in values if one is not None]
    return known if len(known) == len(values) else None


def _described(values: Sequence[float] | None) -> dict[str, Any] | None:
    return None if values is None else {**summarize_seeds(values)._asdict(), "values": list(values)}


def _difference(left: Sequence[float] | None, right: Sequence[float] | None) -> dict[str, Any] | None:
    if left is None or right is None:
        return None
    each = [one - other for one, other in zip(left, right, strict=True)]
    return {**paired_difference(left, right)._asdict(), "values": each}


def cost_by_stage(costs: Iterable[Cost]) -> dict[str, dict[str, float | int | None]]:
    """Stage -> CPU and GPU seconds, every artefact once; `unknown` counts those whose cost was not recorded."""
    stages: dict[str, dict[str, Any]] = {}
    for one in {cost.artifact: cost for cost in costs}.values():
        its = stages.setdefault(one.stage, {"cpu_seconds": 0.0, "gpu_seconds": None, "unknown": 0})
        if one.cpu_seconds is None:
            its["unknown"] += 1
            continue
        its["cpu_seconds"] += one.cpu_seconds
        if one.gpu_seconds is not None:
            its["gpu_seconds"] = (its["gpu_seconds"] or 0.0) + one.gpu_seconds
    return stages


def total_cost(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sum over stages, in the form of one of them."""
    gpu = [one["gpu_seconds"] for one in stages.values() if one["gpu_seconds"] is not None]
    return {
        "cpu_seconds": sum(one["cpu_seconds"] for one in stages.values()),
        "gpu_seconds": sum(gpu) if gpu else None,
        "unknown": sum(one["unknown"] for one in stages.values()),
    }


def share_cost(
    content: dict[str, Any], shared: Mapping[str, Mapping[str, Any]], needed: Mapping[str, Sequence[str]]
) -> None:
    """Add to what `summarize_trials` returned the stages that trials share, and what each strategy would cost by
    itself.

    `needed`: strategy -> the shared stages that it could not do without. They are paid once for all targets and
    strategies, so the sums `with_shared` overlap.
    """
    content["shared_cost"] = dict(shared)
    for name, entry in content["strategies"].items():
        its = {stage: shared[stage] for stage in needed[name] if stage in shared}
        entry["with_shared"] = total_cost({**entry["cost"], **its})


def table(targets: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The results as text: a header row, then per target the base model and each strategy.

    Means ± standard deviations over units; then the paired differences in target preference with 95% intervals; then
    what the strategy's trials cost, and that with the work that strategies share (`share_cost`).
    """
    metrics = shown_metrics(targets.values())
    rows = [
        [
            "target",
            "strategy",
            *(METRIC_LABELS[one] for one in metrics),
            *(f"− {other}" for other in COMPARED_WITH),
            "cost",
            "with shared",
        ]
    ]
    for name, content in targets.items():
        blank = [""] * len(COMPARED_WITH)
        rows.append([name, "base", *(mean_and_std(content["base"], metric) for metric in metrics), *blank, "", ""])
        for strategy, entry in content["strategies"].items():
            against = content["differences"][strategy]
            rows.append(
                [
                    name,
                    strategy,
                    *(mean_and_std(entry, metric) for metric in metrics),
                    *(
                        with_interval(against[other]["target_preference"]) if other in against else ""
                        for other in COMPARED_WITH
                    ),
                    cost_text(total_cost(entry["cost"])),
                    cost_text(entry.get("with_shared")),
                ]
            )
    return rows


def with_interval(entry: Mapping[str, Any] | None) -> str:
    """`+0.120 [+0.010, +0.230]`."""
    if entry is None:
        return "–"
    text = f"{entry['mean']:+.3f}"
    if entry["interval"] is not None:
        low, high = entry["interval"]
        text += f" [{low:+.3f}, {high:+.3f}]"
    return text.replace("-", "−")


def cost_text(cost: Mapping[str, Any] | None) -> str:
    """`12.3 CPU s`, with the GPU's where there are any, and how many artefacts have no recorded cost."""
    if cost is None:
        return "–"
    text = f"{cost['cpu_seconds']:,.1f} CPU s"
    if cost["gpu_seconds"] is not None:
        text += f", {cost['gpu_seconds']:,.1f} GPU s"
    return text + (f" ({cost['unknown']} not recorded)" if cost["unknown"] else "")


def long_table(target: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per strategy and metric (`other` null) and per paired difference, for SQL."""
    rows = []
    for strategy, entry in content["strategies"].items():
        found = {None: entry, **content["differences"][strategy]}
        for other, metrics in found.items():
            for metric in METRIC_LABELS:
                if metrics[metric] is None:
                    continue
                low, high = metrics[metric]["interval"] or (None, None)
                rows.append(
                    {
                        "target": target,
                        "strategy": strategy,
                        "other": other,
                        "metric": metric,
                        **{key: metrics[metric][key] for key in ("mean", "std")},
                        "low": low,
                        "high": high,
                        "units": content["units"],
                        "unit": content["unit"],
                    }
                )
    return rows
