"""What the trials of one target come to: means, paired differences with intervals, costs, and the verdict in words.

Plain data in, plain data out: what `summarize` returns is one target's part of experiment.json.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prism_assets.evaluation.report import METRICS
from prism_assets.evaluation.statistics import Summary, compared, paired_difference, summarize_seeds

# Always run, and what every strategy is held against.
COMPARED_WITH = ("uniform", "less", "random")
STAGES = ("target features", "direction", "selection", "fine-tuning", "evaluation")
# At least so many units before an interval says much: below, it is several standard deviations wide.
FEW_UNITS = 5


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


def summarize(trials: Sequence[Trial], redraw: str) -> dict[str, Any]:
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
        found = [[by_place[strategy, *place].metrics[metric] for place in its] for its in units]
        return None if any(one is None for its in found for one in its) else [_mean(its) for its in found]

    measured = {name: {metric: values(name, metric) for metric in METRICS} for name in strategies}
    base = {
        metric: _described(_bases([by_place[strategies[0], p, seeds[0]].base[metric] for p in splits]))
        for metric in METRICS
    }
    differences = {
        name: {
            other: {
                metric: _difference(measured[name][metric], measured[other][metric])
                for metric in METRICS
            }
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
                **{metric: _described(measured[name][metric]) for metric in METRICS},
                "rows": _mean([one.rows for one in trials if one.strategy == name]),
                "completion_tokens": _mean([one.completion_tokens for one in trials if one.strategy == name]),
                "cost": cost_by_stage(cost for one in trials if one.strategy == name for cost in one.costs),
            }
            for name in strategies
        },
        "differences": differences,
        "cost": cost_by_stage(cost for one in trials for cost in one.costs),
        "trials": [
            {"strategy": one.strategy, "split": one.split, "seed": one.seed, **one.metrics} for one in trials
        ],
    }


def _others(name: str) -> Sequence[str]:
    """What a strategy is held against; two of these once, not both ways."""
    return COMPARED_WITH[COMPARED_WITH.index(name) + 1 :] if name in COMPARED_WITH else COMPARED_WITH


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bases(values: Sequence[float | None]) -> list[float] | None:
    return None if any(one is None for one in values) else list(values)


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
    """Add to what `summarize` returned the stages that trials share, and what each strategy would cost by itself.

    `needed`: strategy -> the shared stages that it could not do without. They are paid once for all targets and
    strategies, so the sums `with_shared` overlap.
    """
    content["shared_cost"] = dict(shared)
    for name, entry in content["strategies"].items():
        its = {stage: shared[stage] for stage in needed[name] if stage in shared}
        entry["with_shared"] = total_cost({**entry["cost"], **its})


# -- words -------------------------------------------------------------------------------------------------------


def verdict(content: Mapping[str, Any]) -> list[str]:
    """What the numbers of one target say, and how far they carry. `content` is what `summarize` returned."""
    sentences = [_design(content), *_best(content)]
    strategies = [name for name in content["strategies"] if name not in COMPARED_WITH]
    if "prism" in strategies:
        sentences.append(_weighting(content))
    for name in strategies:
        sentences.append(_standing(content, name))
        sentences += _against_each(content, name)
    return [*sentences, *_limits(content)]


def _design(content: Mapping[str, Any]) -> str:
    splits, seeds, unit = content["splits"], len(content["seeds"]), content["unit"]
    trials = f"{_count(splits, 'split')} × {_count(seeds, 'seed')} for each of {len(content['strategies'])} strategies"
    if unit == "split":
        counted = "a split counts as the mean of its seeds" if seeds > 1 else "one seed each"
        return f"{trials}. Means, deviations and intervals are over splits ({counted})."
    if seeds > 1:
        return (
            f"{trials}. Means, deviations and intervals are over seeds: they show the chance in training alone, on one "
            "draw of targets and held-out records."
        )
    return (
        f"{trials}. Nothing was repeated: no deviation and no interval is known, and no difference says anything about "
        "chance. Raise experiment.splits or name more seeds."
    )


def _best(content: Mapping[str, Any]) -> list[str]:
    sentences = []
    for metric, label in METRICS.items():
        means = {name: one[metric]["mean"] for name, one in content["strategies"].items() if one[metric]}
        if not means:
            continue
        best = max(means, key=means.__getitem__)
        base = content["base"][metric]["mean"]
        sentence = f"{label.capitalize()}: {best} has the highest mean, {means[best]:.3f}; the base model is at {base:.3f}"
        below = [name for name, mean in means.items() if mean < base]
        sentences.append(sentence + (f", above {_listed(below)}." if below else "."))
    return sentences


def _weighting(content: Mapping[str, Any]) -> str:
    """prism against uniform, which differs by the weights alone."""
    side = _side(content["differences"]["prism"]["uniform"]["target_preference"])
    if side == "unknown":
        return "Whether the preference weighting pays here cannot be said from one trial of each strategy."
    if side == "above":
        return "The preference weighting paid here: prism is above uniform, which differs by the weights alone."
    if side == "below":
        return "The preference weighting cost here: prism is below uniform, which differs by the weights alone. Use uniform."
    return (
        "It is not shown that the preference weighting pays here: prism and uniform, which differ by the weights alone, "
        "cannot be told apart."
    )


def _standing(content: Mapping[str, Any], name: str) -> str:
    """Where one strategy stands among those it is held against, in target preference."""
    sides: dict[str, list[str]] = {"above": [], "below": [], "apart": [], "unknown": []}
    for other, metrics in content["differences"][name].items():
        sides[_side(metrics["target_preference"])].append(other)
    if sides["unknown"]:
        return f"{name}: without repetition nothing is said about {_listed(sides['unknown'])}."
    words = {"above": "above", "below": "below", "apart": "not to be told apart from"}
    parts = [f"{text} {_listed(sides[side])}" for side, text in words.items() if sides[side]]
    return f"{name} in target preference: {'; '.join(parts)}."


def _side(difference: Mapping[str, Any]) -> str:
    if difference["interval"] is None:
        return "unknown"
    low, high = difference["interval"]
    return "above" if low > 0 else "below" if high < 0 else "apart"


def _against_each(content: Mapping[str, Any], name: str) -> list[str]:
    sentences = []
    for metric in ("target_preference", "exact_match"):
        for other, metrics in content["differences"][name].items():
            if metrics[metric] is not None:
                found = Summary(*(metrics[metric][field] for field in Summary._fields))
                sentences.append(compared(name, other, found, METRICS[metric], content["unit"]))
    return sentences


def _limits(content: Mapping[str, Any]) -> list[str]:
    sentences = []
    if content["unit"] == "split":
        sentences.append(
            "Splits are redraws of the same records, so they overlap: an interval is about redrawing these records and "
            "about training, and is too narrow for records that nobody has seen. Pool, warm-up and sketch are the same in "
            "all splits."
        )
    if 1 < content["units"] < FEW_UNITS:
        half = _interval_width(content["units"])
        sentences.append(
            f"With {content['units']} {content['unit']}s an interval reaches {half:.1f} standard deviations of the "
            f"differences to each side: only large differences show. More {content['unit']}s narrow it."
        )
    intervals = sum(
        len(others) * sum(one is not None for one in next(iter(others.values())).values())
        for others in content["differences"].values()
        if others
    )
    if content["units"] > 1:
        sentences.append(
            f"Each interval holds for itself at 95%; there are {intervals}, so one in twenty of them misses by chance alone."
        )
    return sentences


def _interval_width(units: int) -> float:
    """Half of a 95% interval of a mean of so many units, in standard deviations."""
    spread = summarize_seeds([0.0] * (units - 1) + [1.0])
    return (spread.interval[1] - spread.mean) / spread.std


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- the table ---------------------------------------------------------------------------------------------------


def table(targets: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The outcome as text: a header row, then per target the base model and each strategy.

    Means ± standard deviations over units; then the paired differences in target preference with 95% intervals; then
    what the strategy's trials cost, and that with the work that strategies share (`share_cost`).
    """
    rows = [["target", "strategy", *METRICS.values(), *(f"− {other}" for other in COMPARED_WITH), "cost", "with shared"]]
    for name, content in targets.items():
        blank = [""] * len(COMPARED_WITH)
        rows.append([name, "base", *(mean_and_std(content["base"][metric]) for metric in METRICS), *blank, "", ""])
        for strategy, entry in content["strategies"].items():
            against = content["differences"][strategy]
            rows.append(
                [
                    name,
                    strategy,
                    *(mean_and_std(entry[metric]) for metric in METRICS),
                    *(with_interval(against[other]["target_preference"]) if other in against else "" for other in COMPARED_WITH),
                    cost_text(total_cost(entry["cost"])),
                    cost_text(entry.get("with_shared")),
                ]
            )
    return rows


def mean_and_std(entry: Mapping[str, Any] | None) -> str:
    """`0.512 ± 0.031`."""
    if entry is None:
        return "–"
    text = f"{entry['mean']:.3f}" + (f" ± {entry['std']:.3f}" if entry["std"] is not None else "")
    return text.replace("-", "−")


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
            for metric in METRICS:
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
