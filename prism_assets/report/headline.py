"""The verdict on top of a target's page: what to use, how sure that is, and whether trust was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prism_assets.report.comparison import METRIC_LABELS
from prism_assets.report.verdict import SEEDS_FOR_A_TEST, of_earlier_selections
from prism_assets.report.wording import as_number, figure_text, gap_text, mean_of
from prism_assets.text import listed

# By the first of them that was measured strategies are judged; where another has another winner, that is said.
_DECIDING = ("target_preference", "mean_log_prob", "exact_match", "pair_accuracy")
_NO_CHOICE = ("oracle",)  # goes by labels that nobody has before


class Headline(NamedTuple):
    """The verdict in plain words."""

    use: str
    sure: str
    trust: str
    trusted: bool  # trust was measured, and nothing that was measured fails


def headline(name: str, target: Mapping[str, Any]) -> Headline:
    """The verdict on a target. `target` is an entry of report.json's `targets`.

    A strategy counts as ahead of another where its mean is higher by more than the larger standard deviation over
    seeds, and it is ahead at every seed that both have. That is no significance test, and the text does not call it
    one.
    """
    strategies: Mapping[str, Any] = target.get("strategies", {})
    found = _judged(strategies)
    trust, trusted = _trust(name, target.get("trust"))
    if found is None:
        return Headline("Nothing was measured of these strategies yet.", "", trust, trusted)
    metric, means = found
    base = as_number((target.get("base") or {}).get(metric))
    best = max(means, key=lambda strategy: means[strategy])
    level = [one for one in means if one != best and not _ahead(best, one, strategies, metric)]
    return Headline(
        _use(target, metric, means, best, level, base), _sure(name, best, metric, strategies, means), trust, trusted
    )


def _judged(strategies: Mapping[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The metric that decides, and its mean of each strategy that has one."""
    for metric in _DECIDING:
        means = {
            name: mean
            for name, entry in strategies.items()
            if name not in _NO_CHOICE and (mean := mean_of(entry, metric)) is not None
        }
        if means:
            return metric, means
    return None


def _ahead(ours: str, theirs: str, strategies: Mapping[str, Any], metric: str) -> bool:
    gap = (mean_of(strategies[ours], metric) or 0.0) - (mean_of(strategies[theirs], metric) or 0.0)
    spreads = [as_number((strategies[one].get(metric) or {}).get("std")) for one in (ours, theirs)]
    known = [spread for spread in spreads if spread is not None]
    won, seeds = _seeds_won(ours, theirs, strategies, metric)
    return len(known) == 2 and gap > max(known) and won == seeds


def _seeds_won(ours: str, theirs: str, strategies: Mapping[str, Any], metric: str) -> tuple[int, int]:
    """At how many seeds of both ours is higher, and how many there are."""
    first, second = (
        {one["seed"]: one.get(metric) for one in strategies[name].get("per_seed") or []} for name in (ours, theirs)
    )
    shared = [
        (a, b) for seed, one in first.items() if (a := as_number(one)) is not None
        and (b := as_number(second.get(seed))) is not None
    ]  # fmt: skip
    return sum(a > b for a, b in shared), len(shared)


def _use(
    target: Mapping[str, Any], metric: str, means: Mapping[str, float], best: str, level: Sequence[str], base: Any
) -> str:
    label = METRIC_LABELS[metric]
    removes = target.get("use") == "remove"
    if base is not None and means[best] <= base:
        return (
            f"Keep the base model: no strategy is above it in {label} ({figure_text(base)}; the best, {best}, is at "
            f"{figure_text(means[best])})."
        )
    if best == "random" or "random" in level:
        if best == "random":
            return f"Random would do: no strategy is above it in {label}."
        others = [best, *(one for one in level if one != "random")]
        return f"Random would do: {listed(others)} {_are(others)} not clearly ahead of it in {label}."
    verb = "Remove the rows that" if removes else "Use the rows that"
    end = "ranks first, and train on the rest" if removes else "selects"
    if best == "full":
        verb, end = ("Train on the whole mixture:", "is ahead") if removes else ("Train on the whole pool:", "is ahead")
    said = f"{verb} {best} {end}: {figure_text(means[best])} in {label}"
    if base is not None:
        said += f", the base model {figure_text(base)}"
    if level:
        said += f"; {listed(level)} {_are(level)} not clearly behind"
    if "random" not in means:
        said += ". Whether random rows would do as well is not known, as random is not among the strategies"
    return f"{said}."


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _sure(name: str, best: str, metric: str, strategies: Mapping[str, Any], means: Mapping[str, float]) -> str:
    seeds = int((strategies[best].get(metric) or {}).get("seeds") or 1)
    parts = []
    if "random" in means and best != "random":
        won, shared = _seeds_won(best, "random", strategies, metric)
        gap = means[best] - means["random"]
        higher = f"higher than random by {gap_text(gap)}" if gap > 0 else "the same as random"
        parts.append(f"{best} is {higher} on average" + (f", and ahead at {won} of {shared} seeds" if shared else ""))
    if seeds == 1:
        parts.append("one seed says nothing about chance")
    elif seeds < SEEDS_FOR_A_TEST:
        parts.append(f"{seeds} seeds describe the runs at hand and are no significance test")
    other = _other_winners(best, metric, strategies)
    parts += [other] if other else []
    said = f"{'; '.join(parts)}. " if parts else ""
    if earlier := of_earlier_selections(strategies):
        said += f"{earlier} "
    return f"{said}It is one draw of targets and held-out records: “prism experiment {name}” repeats it over several."


def _other_winners(best: str, decided_by: str, strategies: Mapping[str, Any]) -> str:
    """By which other metrics another strategy is ahead of the best one."""
    found = []
    for metric in _DECIDING:
        means = {
            name: mean for name, entry in strategies.items()
            if name not in _NO_CHOICE and (mean := mean_of(entry, metric)) is not None
        }  # fmt: skip
        if metric != decided_by and best in means:
            top = max(means, key=lambda one: means[one])
            if top != best and _ahead(top, best, strategies, metric):
                found.append(f"by {METRIC_LABELS[metric]} {top} is ahead of it")
    return "; ".join(found)


def _trust(name: str, measured: Sequence[Mapping[str, Any]] | None) -> tuple[str, bool]:
    if not measured:
        return f"Whether the scores can be trusted was not measured; “prism trust {name}” measures it.", False
    passed = [one["passed"] for one in measured]
    failed = [str(one["question"]) for one in measured if one["passed"] is False]
    held = f"{sum(one is True for one in passed)} of {len(passed)} questions hold"
    unknown = sum(one is None for one in passed)
    if unknown:
        held += f", {unknown} could not be answered"
    if failed:
        return f"Trust was measured: {held}. What does not: {' '.join(failed)}", False
    return f"Trust was measured: {held}.", True
