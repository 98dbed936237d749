"""What a target's figures say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prism_assets.report.comparison import METRIC_LABELS
from prism_assets.report.wording import (
    as_number,
    count_text,
    figure_text,
    gap_text,
    mean_and_std,
    mean_of,
    mixture_text,
    signed,
    with_highest_mean,
)
from prism_assets.text import listed

# Fewer seeds than this and a difference of means describes the runs at hand; it is no test of anything.
SEEDS_FOR_A_TEST = 10


# ---- sentences


def verdict_sentences(target: Mapping[str, Any]) -> list[str]:
    """What the numbers of one target say, and no more: `target` is an entry of report.json's `targets`.

    Only means and standard deviations over seeds are known, so a difference is called one only where it
    exceeds the larger of the two standard deviations, and never significant.
    """
    strategies: Mapping[str, Any] = target.get("strategies", {})
    sentences = _removal_sentences(target, strategies)
    sentences += [
        sentence
        for metric in METRIC_LABELS
        if (sentence := _metric_sentence(metric, strategies, target.get("base") or {}))
    ]
    if "prism" in strategies:
        for other in strategies:
            if other != "prism" and (sentence := _paired_sentence(other, strategies)):
                sentences.append(sentence)
    sentences += _direction_sentences(target.get("direction") or {})
    sentences += _caveats(strategies)
    return sentences


def _removal_sentences(target: Mapping[str, Any], strategies: Mapping[str, Any]) -> list[str]:
    """What is removed, and how often the unwanted answers are preferred afterwards."""
    if target.get("use") != "remove":
        return []
    said = [
        f"Each strategy takes rows out of {mixture_text(target)}, and the model is fine-tuned again, from the base, on "
        "the rest" + ("; full takes none out: it is the mixture as it is." if "full" in strategies else ".")
    ]
    labels = next((entry["labels"] for entry in strategies.values() if entry.get("labels")), None)
    if labels:
        taken = ", ".join(
            f"{name} {count_text(entry['labels']['removed_harmful'])} of {count_text(entry.get('removed_rows'))}"
            for name, entry in strategies.items()
            if entry.get("labels")
        )
        said.append(
            f"Of {count_text(labels['labelled'])} labelled rows {count_text(labels['harmful'])} are harmful. Harmful "
            f"ones among the rows that each strategy removes: {taken}. Rows without a rank count as equal in its AUROC "
            "and average precision."
        )
    rates = {
        name: 1 - mean for name, entry in strategies.items() if (mean := mean_of(entry, "pair_accuracy")) is not None
    }
    before = as_number((target.get("base") or {}).get("pair_accuracy"))
    if rates and before is not None:
        shown = ", ".join(f"{name} {figure_text(rate)}" for name, rate in rates.items())
        said.append(
            "Share of held-out pairs whose unwanted answer is preferred (of honest and dishonest ones the dishonesty "
            f"rate; lower is better): base {figure_text(1 - before)}, {shown}."
        )
    return said


def _metric_sentence(metric: str, strategies: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    means = {name: mean for name, entry in strategies.items() if (mean := mean_of(entry, metric)) is not None}
    if not means:
        return None
    best, who = with_highest_mean(means)
    label = METRIC_LABELS[metric].capitalize()
    sentence = f"{label}: {who}, {mean_and_std(strategies[best], metric)}"
    if len(means) == 1:
        sentence = f"{label}: {best} reaches {mean_and_std(strategies[best], metric)}"
    reference = as_number(base.get(metric))
    if reference is None:
        return sentence + "."
    worse = [name for name, mean in means.items() if mean < reference]
    sentence += f"; the base model is at {figure_text(reference)}"
    return sentence + (f", above {listed(worse)}." if worse else ".")


def _paired_sentence(other: str, strategies: Mapping[str, Any]) -> str | None:
    """prism against another strategy, metric by metric."""
    parts = []
    for metric, label in METRIC_LABELS.items():
        ours, theirs = mean_of(strategies["prism"], metric), mean_of(strategies[other], metric)
        if ours is None or theirs is None:
            continue
        difference = ours - theirs
        if difference == 0:
            parts.append(f"{label} the same")
            continue
        direction = "higher" if difference > 0 else "lower"
        spread = _spread(abs(difference), strategies["prism"], strategies[other], metric)
        parts.append(f"{label} {direction} by {gap_text(abs(difference))} ({spread})")
    return f"prism against {other}: " + "; ".join(parts) + "." if parts else None


def _spread(difference: float, ours: Mapping[str, Any], theirs: Mapping[str, Any], metric: str) -> str:
    our_std, their_std = (as_number((entry.get(metric) or {}).get("std")) for entry in (ours, theirs))
    if our_std is None or their_std is None:
        return "spread over seeds unknown"
    larger = max(our_std, their_std)
    if difference <= larger:
        return "within one standard deviation: no clear difference"
    if larger == 0:
        return "no spread over seeds"
    return f"{difference / larger:.1f} times the larger standard deviation"


def _direction_sentences(direction: Mapping[str, Any]) -> list[str]:
    sentences = []
    effective = direction.get("effective_number_of_targets") or {}
    prism, uniform = as_number(effective.get("prism")), as_number(effective.get("uniform"))
    if prism is not None and uniform:
        sentences.append(
            f"The prism direction rests on {prism:.1f} effective targets of {uniform:g} ({prism / uniform:.0%})."
        )
    first_order = direction.get("first_order") or {}
    steps = {name: first_order.get(name) or {} for name in ("prism", "uniform")}
    ours, theirs = (as_number(entry.get("measured")) for entry in steps.values())
    if ours is not None and theirs is not None:
        relation = _compared(ours, theirs)
        sentences.append(
            f"A small step along the prism direction changes J by {signed(ours)} (predicted "
            f"{signed(steps['prism'].get('predicted'))}), {relation} the same step along the uniform "
            f"direction, {signed(theirs)} "
            f"(predicted {signed(steps['uniform'].get('predicted'))})."
        )
    ours, theirs = (as_number(entry.get("held_out_mean_log_prob")) for entry in steps.values())
    if ours is not None and theirs is not None:
        relation = _compared(ours, theirs)
        sentences.append(
            "The same steps change the mean log-probability of held-out examples by "
            f"{signed(ours)} for prism, {relation} uniform's {signed(theirs)}."
        )
    return sentences


def _compared(ours: float, theirs: float) -> str:
    return "more than" if ours > theirs else "less than" if ours < theirs else "the same as"


def of_earlier_selections(strategies: Mapping[str, Any]) -> str:
    """Which strategies' figures are of adapters that today's rows did not make; empty where there are none."""
    names = [name for name, entry in strategies.items() if entry.get("trained_on_earlier")]
    if not names:
        return ""
    return (
        f"The figures of {listed(names)} are of adapters that were trained on an earlier selection or by other "
        "settings: “prism run” trains on today's rows."
    )


def _caveats(strategies: Mapping[str, Any]) -> list[str]:
    earlier = of_earlier_selections(strategies)
    sentences = [earlier] if earlier else []
    for name, entry in strategies.items():
        count = as_number(entry.get("non_positive_influence"))
        if count:
            noun = "row has" if count == 1 else "rows have"
            sentences.append(
                f"{name}: {count:,.0f} selected {noun} an influence of zero or less; the budget reaches "
                "past the rows that are predicted to help."
            )
    steps = {name: entry["steps"] for name, entry in strategies.items() if entry.get("steps") is not None}
    if len(set(steps.values())) > 1:
        counts = ", ".join(f"{name} {count:,}" for name, count in steps.items())
        sentences.append(f"The strategies were trained for different numbers of optimiser steps: {counts}.")
    seeds = {
        int(entry[metric]["seeds"])
        for entry in strategies.values()
        for metric in METRIC_LABELS
        if mean_of(entry, metric) is not None
    }
    if seeds and max(seeds) < SEEDS_FOR_A_TEST:
        many = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(max(seeds))
        noun = "seed" if max(seeds) == 1 else "seeds"
        sentences.append(
            f"With {many} {noun} these comparisons describe the runs at hand; they are no significance test."
        )
    return sentences
