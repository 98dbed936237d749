"""What an experiment says, in sentences."""

from collections.abc import Mapping
from typing import Any

from prism_assets.experiment.summary import COMPARED_WITH
from prism_assets.report.comparison import METRIC_LABELS
from prism_assets.report.wording import with_highest_mean
from prism_assets.stats.seeds import Summary, compared, summarize_seeds
from prism_assets.text import listed

# At least so many units before an interval says much: below, it is several standard deviations wide.
FEW_UNITS = 5


def verdict(content: Mapping[str, Any]) -> list[str]:
    """What the numbers of one target say, and how far they carry. `content` is what `summarize_trials` returned."""
    sentences = [_design(content), *_best(content)]
    strategies = [name for name in content["strategies"] if name not in COMPARED_WITH]
    if "prism" in strategies:
        sentences.append(_weighting(content))
    for name in strategies:
        sentences.append(_comparison(content, name))
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
    for metric, label in METRIC_LABELS.items():
        means = {name: one[metric]["mean"] for name, one in content["strategies"].items() if one[metric]}
        if not means:
            continue
        best, who = with_highest_mean(means)
        base = content["base"][metric]["mean"]
        sentence = f"{label.capitalize()}: {who}, {means[best]:.3f}; the base model is at {base:.3f}"
        below = [name for name, mean in means.items() if mean < base]
        sentences.append(sentence + (f", above {listed(below)}." if below else "."))
    return sentences


def _weighting(content: Mapping[str, Any]) -> str:
    """prism against uniform, which differs by the weights alone."""
    side = _side(content["differences"]["prism"]["uniform"]["target_preference"])
    if side == "unknown":
        return "Whether the preference weighting pays here cannot be said from one trial of each strategy."
    if side == "above":
        return "The preference weighting paid here: prism is above uniform, which differs by the weights alone."
    if side == "below":
        return (
            "The preference weighting cost here: prism is below uniform, which differs by the weights alone. Use "
            "uniform."
        )
    return (
        "It is not shown that the preference weighting pays here: between prism and uniform, which differ by the "
        "weights alone, there is no significant difference (the 95% interval holds zero)."
    )


def _comparison(content: Mapping[str, Any], name: str) -> str:
    """How one strategy compares with the others, in target preference."""
    sides: dict[str, list[str]] = {"above": [], "below": [], "unclear": [], "unknown": []}
    for other, metrics in content["differences"][name].items():
        sides[_side(metrics["target_preference"])].append(other)
    if sides["unknown"]:
        return f"{name}: without repetition nothing is said about {listed(sides['unknown'])}."
    words = {"above": "above", "below": "below", "unclear": "no significant difference (95% interval) from"}
    parts = [f"{text} {listed(sides[side])}" for side, text in words.items() if sides[side]]
    return f"{name} in target preference: {'; '.join(parts)}."


def _side(difference: Mapping[str, Any]) -> str:
    if difference["interval"] is None:
        return "unknown"
    low, high = difference["interval"]
    return "above" if low > 0 else "below" if high < 0 else "unclear"


def _against_each(content: Mapping[str, Any], name: str) -> list[str]:
    sentences = []
    for metric in ("target_preference", "exact_match"):
        for other, metrics in content["differences"][name].items():
            if metrics[metric] is not None:
                found = Summary(*(metrics[metric][field] for field in Summary._fields))
                sentences.append(compared(name, other, found, METRIC_LABELS[metric], content["unit"]))
    return sentences


def _limits(content: Mapping[str, Any]) -> list[str]:
    sentences = []
    if content["unit"] == "split":
        sentences.append(
            "Splits are redraws of the same records, so they overlap: an interval is about redrawing these records and "
            "about training, and is too narrow for records that nobody has seen. Pool, warm-up and sketch are the same "
            "in all splits."
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
            f"Each interval holds for itself at 95%; there are {intervals}, so one in twenty of them misses by chance "
            "alone."
        )
    return sentences


def _interval_width(units: int) -> float:
    """Half of a 95% interval of a mean of so many units, in standard deviations."""
    spread = summarize_seeds([0.0] * (units - 1) + [1.0])
    assert spread.mean is not None and spread.std is not None and spread.interval is not None, units
    return (spread.interval[1] - spread.mean) / spread.std


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
