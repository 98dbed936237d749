"""The sentences and thresholds: each follows from its numbers, and each planted fault fails its own question alone."""

import copy
import subprocess
import sys

import numpy as np
import pytest

from prism_assets.stats.ranks import rank_correlation
from prism_assets.trust.verdict import CHECKS, findings, reach


def correlation(value, low, high, n=40):
    return {"value": value, "interval": [low, high], "n": n}


def steps(*ratios):
    return [
        {
            "size": 0.01 * 2**k,
            "predicted": 0.02 * 2**k,
            "measured": 0.02 * 2**k * ratio,
            "held_out": 0.0,
            "held_out_predicted": 0.004 * 2**k,
            "held_out_measured": 0.003 * 2**k / (k + 1),
        }
        for k, ratio in enumerate(ratios)
    ]


GOOD = {
    "effective_number_of_targets": {"prism": 15.5, "uniform": 32.0},
    "usable_targets": 32,
    "weight_rank_agreement": None,
    "random_steps": {
        "number": 8,
        "training_step": {
            "flipped_mean": 0.02,
            "flipped_max": 0.04,
            "rank_correlation_mean": 0.99,
            "rank_correlation_min": 0.97,
        },
        "warmup": {
            "flipped_mean": 0.05,
            "flipped_max": 0.06,
            "rank_correlation_mean": 0.95,
            "rank_correlation_min": 0.94,
        },
    },
    "growing_steps": {
        "probe_step": 0.01,
        "needed": 0.035,
        "pairs": False,
        "prism": steps(1, 0.9, 0.8, 0.4),
        "uniform": steps(1, 0.4, 0.8, 0.4),
    },
    "single_steps": {
        "flipped_mean": 0.03,
        "flipped_max": 0.06,
        "prism": {
            "stored": correlation(0.8, 0.6, 0.9),
            "exact": correlation(0.9, 0.8, 0.95),
            "held_out": correlation(0.7, 0.5, 0.8),
        },
        "uniform": {
            "stored": correlation(0.7, 0.5, 0.8),
            "exact": correlation(0.7, 0.5, 0.8),
            "held_out": correlation(0.1, -0.2, 0.3),
        },
    },
    "datamodel": {
        "rows": 128,
        "prism": {"own": correlation(0.6, 0.3, 0.8, 32), "held_out": correlation(0.5, 0.2, 0.7, 32)},
        "uniform": {"own": correlation(0.4, 0.1, 0.6, 32), "held_out": correlation(0.0, -0.3, 0.3, 32)},
    },
}


def changed(path, value):
    notes = copy.deepcopy(GOOD)
    *parents, last = path
    place = notes
    for key in parents:
        place = place[key]
    place[last] = value
    return notes


def failed(notes):
    return {one.check for one in findings(notes) if one.passed is False}


def said(notes, check):
    return next(one.sentence for one in findings(notes) if one.check == check)


def test_good_numbers_hold_everywhere_and_are_in_the_sentences():
    found = findings(GOOD)
    assert [one.check for one in found] == list(CHECKS) and all(one.passed is True for one in found)
    text = " ".join(one.sentence for one in found)
    for figure in (
        "15.5 effective targets of 32 (48%)",
        "flips 2.0%",
        "flips 5.0%",
        "flips 3.0%",
        "up to 4 probe steps along prism",
        "1 probe step along uniform",
        "held-out log-probability up to 1 probe step along prism",
        "changes it by +0.003 (predicted +0.004) along prism",
        "goes 3.5 along prism",
        "0.80 [0.60, 0.90]",
        "uniform's with 0.10 [−0.20, 0.30]",
        "over 32 short fine-tunings on halves of 128",
    ):
        assert figure in text, figure


def test_of_pairs_the_former_weighting_is_stepped_along_too_and_the_margin_is_named():
    notes = copy.deepcopy(GOOD)
    notes["growing_steps"] |= {"pairs": True, "prism-sigmoid": steps(1, 1, 0.4)}
    assert not failed(notes)
    sentence = said(notes, "first_order_reaches")
    assert "2 probe steps along prism-sigmoid" in sentence and "held-out margin up to" in sentence


@pytest.mark.parametrize(
    ("path", "value", "check", "words"),
    [
        (("effective_number_of_targets", "prism"), 2.4, "weights_not_concentrated", "Add targets"),
        (("random_steps", "training_step", "flipped_mean"), 0.11, "preferences_stable", "more than 10%"),
        (("single_steps", "flipped_mean"), 0.3, "preferences_stable", "flips 30.0%"),
        (("weight_rank_agreement",), 0.4, "preferences_stable", "still changing"),
        (("growing_steps", "needed"), 0.05, "first_order_reaches", "learning_rate"),
        (("growing_steps", "prism"), steps(-1, 1, 1, 1), "first_order_reaches", "up to 0 probe steps"),
        (("single_steps", "prism", "stored"), correlation(0.45, 0.2, 0.6), "single_steps_agree", "sketch_dim"),
        (("single_steps", "prism", "stored"), correlation(0.55, -0.1, 0.9), "single_steps_agree", "sketch_dim"),
        (("single_steps", "prism", "held_out"), correlation(0.2, -0.1, 0.5), "held_out_follows", "not significant"),
        (("single_steps", "prism", "held_out"), correlation(-0.4, -0.6, -0.1), "held_out_follows", "harms"),
        (("datamodel", "prism", "own"), correlation(0.2, -0.1, 0.5), "subsets_predicted", "not significant"),
        (("datamodel", "prism", "own"), correlation(-0.5, -0.7, -0.1), "subsets_predicted", "wrong way"),
    ],
)
def test_each_fault_fails_its_own_question_alone_and_says_what_to_do(path, value, check, words):
    notes = changed(path, value)
    assert failed(notes) == {check}
    assert words in said(notes, check)


def test_scores_that_are_wrong_in_themselves_are_told_from_a_coarse_sketch():
    notes = changed(("single_steps", "prism", "stored"), correlation(0.2, 0.05, 0.4))
    notes["single_steps"]["prism"]["exact"] = correlation(0.3, 0.1, 0.5)
    assert failed(notes) == {"single_steps_agree"} and "sketch_dim" not in said(notes, "single_steps_agree")


def test_shuffled_scores_fail_whatever_they_were():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=48)
    scores = effect + 0.3 * rng.normal(size=48)
    right, shuffled = (rank_correlation(one, effect)._asdict() for one in (scores, rng.permutation(scores)))
    assert not failed(changed(("single_steps", "prism", "stored"), right))
    bad = changed(("single_steps", "prism"), {"stored": shuffled, "exact": shuffled, "held_out": shuffled})
    bad["datamodel"]["prism"]["own"] = shuffled
    assert failed(bad) == {"single_steps_agree", "held_out_follows", "subsets_predicted"}


def test_what_was_not_measured_neither_holds_nor_fails():
    notes = copy.deepcopy(GOOD)
    notes["datamodel"] = None
    notes["single_steps"]["prism"]["stored"] = notes["single_steps"]["prism"]["held_out"] = {
        "value": 0.9,
        "interval": None,
        "n": 5,
    }
    notes["random_steps"]["training_step"]["flipped_mean"] = None
    passed = {one.check: one.passed for one in findings(notes)}
    assert passed == {
        "weights_not_concentrated": True, "preferences_stable": None, "first_order_reaches": True,
        "single_steps_agree": None, "held_out_follows": None, "subsets_predicted": None,
    }  # fmt: skip
    assert "5 candidates are too few" in said(notes, "single_steps_agree")


def test_few_targets_are_no_fault_of_the_weights():
    notes = changed(("effective_number_of_targets", "prism"), 2.0)
    notes["usable_targets"] = 2
    assert not failed(notes)


def test_the_reach_ends_at_the_first_step_that_is_off():
    assert reach(steps(1, 1, 0.3, 1)) == 0.02  # what comes later by chance does not count
    assert reach(steps(0.5, 2.0)) == 0.02 and reach(steps(2.1)) == 0 and reach([]) == 0
    assert reach(list(reversed(steps(1, 1, 0.3)))) == 0.02


def test_the_sentences_need_no_heavy_import():
    code = (
        "import sys, prism_assets.trust.verdict; print([n for n in ('numpy', 'torch', 'dagster') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
