"""The conclusions from the measurements of one target: thresholds with their reasons, and a sentence each.

Takes the notes of a `trust` artefact (plain numbers) and needs no more than the standard library, as the report does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prism_assets.selection.thresholds import FEWEST_EFFECTIVE, FIRST_ORDER_RATIO
from prism_assets.text import listed

# One flipped pair in ten is Kendall's tau of 0.8. By chance every second pair flips.
MOST_FLIPPED = 0.10
# Between checkpoints: below 0.7 the two orders share less than half of their variance (0.7² = 0.49).
LEAST_AGREEMENT = 0.7
# Of two normal quantities with correlation 0.5, the upper 5% by one lie above the median of the other with
# probability 0.88 on average; at 0.3 it is 0.74, not much better than the 0.5 of chance.
LEAST_CORRELATION = 0.5


class TrustFinding(NamedTuple):
    """One question, whether the answer is good (None: not measured), and the answer for the user."""

    check: str
    question: str
    passed: bool | None
    sentence: str


CHECKS: dict[str, str] = {
    "weights_not_concentrated": "Do the weights rest on enough targets?",
    "preferences_stable": "Do preferences flip under small steps of the model?",
    "first_order_reaches": "Does the first-order approximation hold as far as a training step goes?",
    "single_steps_agree": "Do the scores order what training on single candidates really does to J?",
    "held_out_follows": "And what it does to held-out examples?",
    "subsets_predicted": "Do summed scores predict what training on subsets really does?",
}


def findings(notes: Mapping[str, Any]) -> list[TrustFinding]:
    """The answers to the questions of `CHECKS`, in that order."""
    answers = (
        _effective(notes["effective_number_of_targets"], notes["usable_targets"]),
        _stable(notes["random_steps"], notes["single_steps"], notes["weight_rank_agreement"]),
        _reaches(notes["growing_steps"]),
        _single(notes["single_steps"]),
        _held_out(notes["single_steps"]),
        _subsets(notes["datamodel"]),
    )
    return [
        TrustFinding(check, question, *answer)
        for (check, question), answer in zip(CHECKS.items(), answers, strict=True)
    ]


def _effective(effective: Mapping[str, float], targets: int) -> tuple[bool, str]:
    prism = effective["prism"]
    passed = prism >= min(FEWEST_EFFECTIVE, targets)
    said = f"The weights rest on {prism:.1f} effective targets of {targets} ({prism / targets:.0%})"
    if passed:
        return True, said + "."
    return False, said + ": one or two of them decide what is selected. Add targets or raise preference.temperature."


def _stable(steps: Mapping[str, Any], single: Mapping[str, Any], agreement: float | None) -> tuple[bool | None, str]:
    small, far = steps["training_step"], steps["warmup"]
    if small["flipped_mean"] is None:
        return None, "There are no two target examples of different weight, so no preference can flip."
    said = (
        f"A random step as long as one training step flips {_share(small['flipped_mean'])} of the target pairs on "
        f"average and {_share(small['flipped_max'])} at most over {steps['number']} steps (rank correlation of the "
        f"weights {_figure(small['rank_correlation_mean'])}, at least {_figure(small['rank_correlation_min'])}); one "
        f"as long as the whole warm-up flips {_share(far['flipped_mean'])}. A training step on a single candidate "
        f"flips {_share(single['flipped_mean'])} on average and {_share(single['flipped_max'])} at most."
    )
    stable = max(small["flipped_mean"], single["flipped_mean"]) <= MOST_FLIPPED
    if not stable:
        said += (
            f" That is more than {MOST_FLIPPED:.0%}: which targets count is partly chance. More warm-up or more "
            "targets make it firmer; a higher preference.temperature makes it matter less."
        )
    if agreement is None:
        return stable, said + " There is one checkpoint, so none to agree with."
    said += f" Across checkpoints the weights' order agrees with a rank correlation of at least {agreement:.2f}"
    if agreement >= LEAST_AGREEMENT:
        return stable, said + "."
    return False, said + f", below {LEAST_AGREEMENT}: the weights are still changing. Warm up for longer."


def reach(steps: Sequence[Mapping[str, float]], of: str = "") -> float:
    """The largest size up to which measured over predicted lies within `FIRST_ORDER_RATIO` at every step; 0 where at
    none. of: `held_out_` for the held-out score in place of J."""
    reached = 0.0
    for step in sorted(steps, key=lambda one: one["size"]):
        predicted = step[f"{of}predicted"]
        if not predicted or not FIRST_ORDER_RATIO[0] <= step[f"{of}measured"] / predicted <= FIRST_ORDER_RATIO[1]:
            break
        reached = step["size"]
    return reached


def _reaches(growing: Mapping[str, Any]) -> tuple[bool, str]:
    needed, unit = growing["needed"], growing["probe_step"]
    names = [name for name, steps in growing.items() if isinstance(steps, list)]
    passed = reach(growing["prism"]) >= needed

    def agreed(of: str) -> str:
        counts = {name: reach(growing[name], of) / unit for name in names}
        return listed([f"{n:g} probe step{'' if n == 1 else 's'} along {name}" for name, n in counts.items()])

    changes = listed([f"{_change(growing[name], unit)} along {name}" for name in names])
    score = "margin" if growing["pairs"] else "log-probability"
    said = (
        f"Measured and predicted change of J agree within a factor of two up to {agreed('')}, and those of the mean "
        f"held-out {score} up to {agreed('held_out_')}. One probe step changes it by {changes}"
    )
    goes = f"a training step on the best candidate goes {needed / unit:.1f} along prism"
    if passed:
        return True, f"{said}; {goes}."
    return False, (
        f"{said}; but {goes}: scores describe less than one such step. Lower training.learning_rate, or trust the "
        "comparison of strategies on held-out data more than the scores."
    )


def _change(steps: Sequence[Mapping[str, float]], unit: float) -> str:
    """`+0.012 (predicted +0.010)`, after the step whose size is the unit."""
    step = min(steps, key=lambda one: abs(one["size"] - unit))
    measured, predicted = (f"{step[f'held_out_{one}']:+.2g}".replace("-", "−") for one in ("measured", "predicted"))
    return f"{measured} (predicted {predicted})"


def _single(single: Mapping[str, Any]) -> tuple[bool | None, str]:
    stored, exact = single["prism"]["stored"], single["prism"]["exact"]
    if stored["interval"] is None:
        return None, (
            f"{stored['n']} candidates are too few, or their effects too similar, to compare scores with what training "
            "on them does."
        )
    said = (
        f"Training on one candidate alone changes J in the order of the stored scores with a rank correlation of "
        f"{_correlation(stored)}, of the exact scores {_correlation(exact)} ({stored['n']} candidates); uniform's "
        f"stored scores order its own objective, the mean score, with {_correlation(single['uniform']['stored'])}."
    )
    if _orders(stored):
        return True, said
    wanted = f"at least {LEAST_CORRELATION} and above zero beyond the interval"
    if _orders(exact):
        return (
            False,
            said + f" The exact scores reach what is asked for ({wanted}), the stored ones do not: raise "
            "features.sketch_dim.",
        )
    return False, said + (
        f" Asked for is {wanted}: the ranking says little about what a row really does here. Check features.optimizer, "
        "warm up for longer, and judge by held-out results."
    )


def _orders(one: Mapping[str, Any]) -> bool:
    return one["interval"] is not None and one["value"] >= LEAST_CORRELATION and one["interval"][0] > 0


def _held_out(single: Mapping[str, Any]) -> tuple[bool | None, str]:
    prism, uniform = single["prism"]["held_out"], single["uniform"]["held_out"]
    if prism["interval"] is None:
        return None, (
            f"{prism['n']} candidates are too few, or their effects too similar, to compare scores with held-out "
            "examples."
        )
    low, high = prism["interval"]
    said = (
        f"The held-out log-probability follows prism's scores with a rank correlation of {_correlation(prism)}, "
        f"uniform's with {_correlation(uniform)}."
    )
    if low > 0:
        return True, said
    if high < 0:
        return False, said + (
            " What prism ranks high harms held-out examples: targets and held-out file ask for different things, or "
            "the noise among the targets is what the model likes. Do not select by these weights."
        )
    return False, said + (
        " That is not significant (the 95% interval holds zero): targets and held-out file may ask for different "
        "things. Compare strategies on held-out data."
    )


def _subsets(datamodel: Mapping[str, Any] | None) -> tuple[bool | None, str]:
    if datamodel is None:
        return None, "Not measured: trust.datamodel_subsets is 0."
    prism = datamodel["prism"]["own"]
    if prism["interval"] is None:
        return (
            None,
            f"{prism['n']} subsets are too few, or their effects too similar, to compare them with summed scores.",
        )
    low, high = prism["interval"]
    said = (
        f"Linear datamodeling score: over {prism['n']} short fine-tunings on halves of {datamodel['rows']} candidates, "
        f"J followed the summed scores with a rank correlation of {_correlation(prism)} (uniform's own objective "
        f"{_correlation(datamodel['uniform']['own'])}); held-out log-probability followed prism's sums with "
        f"{_correlation(datamodel['prism']['held_out'])}, uniform's with "
        f"{_correlation(datamodel['uniform']['held_out'])}."
    )
    if low > 0:
        return True, said
    if high < 0:
        return False, said + " That order is the wrong way round: do not select by these scores."
    return (
        False,
        said + " That is not significant (the 95% interval holds zero); more trust.datamodel_subsets would narrow it.",
    )


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}".replace("-", "−")


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1%}"


def _correlation(one: Mapping[str, Any]) -> str:
    """`0.61 [0.40, 0.77]`"""
    if one["interval"] is None:
        return _figure(one["value"])
    low, high = one["interval"]
    return f"{_figure(one['value'])} [{_figure(low)}, {_figure(high)}]"
