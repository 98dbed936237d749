"""Statistics of experiments against distributions whose answers are known."""

import math

import numpy as np
import pytest

from prism_assets.stats.seeds import compared, paired_difference, summarize_seeds

# Student's quantile has a closed form for one and two degrees of freedom; the others stand in printed tables.
QUANTILES = {
    2: math.tan(0.475 * math.pi),
    3: 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)),
    6: 2.5706,
    31: 2.0423,
    121: 1.9799,
}


@pytest.mark.parametrize(("seeds", "quantile"), QUANTILES.items())
def test_half_an_interval_is_students_quantile_of_standard_errors(seeds, quantile):
    values = np.random.default_rng(0).normal(size=seeds)
    error = math.sqrt(sum((values - sum(values) / seeds) ** 2) / (seeds - 1) / seeds)
    low, high = summarize_seeds(values).interval
    assert (high - low) / 2 == pytest.approx(quantile * error, rel=5e-5)
    assert summarize_seeds([2.0] * seeds).interval == (2.0, 2.0)


@pytest.mark.parametrize("seeds", [3, 10, 40])
def test_intervals_hold_the_true_mean_in_95_of_100_experiments(seeds):
    samples = np.random.default_rng(1).normal(2.0, 3.0, size=(4000, seeds))
    intervals = [summarize_seeds(one).interval for one in samples]
    held = np.mean([low <= 2.0 <= high for low, high in intervals])
    assert held == pytest.approx(0.95, abs=0.015)  # four standard errors of the share


def test_pairing_removes_what_seeds_share():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 10, 10)
    left, right = shared + 1 + rng.normal(0, 0.1, 10), shared + rng.normal(0, 0.1, 10)
    difference = paired_difference(left, right)
    assert difference.interval[0] > 0
    independent = summarize_seeds(left), summarize_seeds(right)
    assert independent[0].interval[0] < independent[1].interval[1]  # unpaired, the intervals overlap
    assert paired_difference(left, right[::-1]).interval[0] < 0  # pairs mixed up: nothing is seen


def test_false_alarms_are_as_rare_as_stated():
    rng = np.random.default_rng(3)
    alarms = [
        not low <= 0 <= high
        for low, high in (paired_difference(*rng.normal(size=(2, 6))).interval for _ in range(4000))
    ]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.015)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="paired by seed: 2 seeds against 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        summarize_seeds([1.0, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        summarize_seeds([])


def test_sentences_follow_from_the_interval():
    assert "is above" in compared("prism", "less", paired_difference([1.0, 1.1, 1.2], [0.0, 0.1, 0.2]), "x")
    assert "is below" in compared("prism", "less", paired_difference([0.0, 0.1, 0.2], [1.0, 1.1, 1.2]), "x")
    assert "not significantly different" in compared("prism", "less", paired_difference([0.0, 2.0], [1.0, 1.0]), "x")
    assert "one seed" in compared("prism", "less", paired_difference([1.0], [0.0]), "x")
    assert compared("prism", "less", paired_difference([0.0, 2.0], [1.0, 1.0]), "x", "split").endswith("2 splits.")
