"""Rank statistics against their definitions, and intervals against distributions whose correlation is known."""

import math

import numpy as np
import pytest
from scipy.stats import rankdata

from prism_assets.stats.ranks import (
    FEWEST,
    area_under_curve,
    average_precision,
    flipped_share,
    rank_correlation,
    spearman,
)


def slow_ranks(values):
    """1 + how many are smaller + half of the others that are equal."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_share_ties_as_defined(seed):
    rows = np.random.default_rng(seed).integers(0, 6, size=(3, 13)).astype(float)
    assert rankdata(rows, axis=-1).tolist() == [slow_ranks(row) for row in rows]


def test_spearman_is_the_textbook_formula_without_ties():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=30), rng.normal(size=30)
    d = np.array(slow_ranks(left)) - np.array(slow_ranks(right))
    assert spearman(left, right) == pytest.approx(1 - 6 * np.square(d).sum() / (30 * (30**2 - 1)))


def test_spearman_with_ties_is_the_correlation_of_shared_ranks():
    rng = np.random.default_rng(1)
    left, right = rng.integers(0, 4, 25), rng.integers(0, 3, 25)
    assert spearman(left, right) == pytest.approx(np.corrcoef(slow_ranks(left), slow_ranks(right))[0, 1])


def test_only_the_order_counts():
    values = np.random.default_rng(2).normal(size=12)
    assert spearman(values, np.exp(3 * values)) == pytest.approx(1)
    assert spearman(values, -(values**3)) == pytest.approx(-1)


def test_what_has_no_order_has_no_correlation():
    assert spearman(np.ones(9), np.arange(9)) is None
    assert rank_correlation(np.ones(9), np.arange(9)) == (None, None, 9)
    few = rank_correlation(np.arange(FEWEST - 1), np.arange(FEWEST - 1))
    assert few.value == pytest.approx(1) and few.interval is None
    assert spearman(np.ones(1), np.ones(1)) is None and spearman(np.ones(0), np.ones(0)) is None
    with pytest.raises(ValueError, match="one length"):
        spearman(np.arange(3), np.arange(4))
    with pytest.raises(ValueError, match="finite"):
        spearman(np.array([1.0, np.nan]), np.arange(2))


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_the_interval_covers_the_known_correlation_as_often_as_it_says(rho):
    # Of two normals with correlation rho, Spearman's is 6/pi asin(rho/2).
    truth = 6 / math.pi * math.asin(rho / 2)
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(120):
        left = rng.normal(size=40)
        right = rho * left + math.sqrt(1 - rho**2) * rng.normal(size=40)
        low, high = rank_correlation(left, right).interval
        covered += low <= truth <= high
    assert covered >= 107  # 95% of 120 is 114, its standard deviation 2.4


def slow_percentiles(left, right, seed):
    """Percentiles of the correlation of 2,000 draws, one by one, without those in which a side is constant."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(2000):
        drawn = rng.integers(len(left), size=len(left))
        if len(set(left[drawn])) > 1 and len(set(right[drawn])) > 1:
            found.append(np.corrcoef(slow_ranks(left[drawn]), slow_ranks(right[drawn]))[0, 1])
    return np.quantile(found, [0.025, 0.975])


def test_the_interval_holds_the_middle_95_of_100_draws():
    rng = np.random.default_rng(5)
    left = rng.normal(size=12)
    right = np.round(left + rng.normal(size=12))
    assert rank_correlation(left, right).interval == pytest.approx(slow_percentiles(left, right, seed=6), abs=0.05)


def test_draws_in_which_a_side_is_constant_are_left_out_and_too_many_leave_no_interval(recwarn):
    odd, order = np.eye(10)[7], np.arange(10)
    found = rank_correlation(odd, order)  # a third of the draws lack the odd one
    assert found.interval == pytest.approx(slow_percentiles(odd, order, seed=7), abs=0.05)
    two = rank_correlation(odd, np.eye(10)[2])  # more than half of the draws lack one of two
    assert two.value == pytest.approx(-1 / 9) and two.interval is None
    assert not recwarn.list


def test_flipped_pairs_are_counted_one_by_one():
    rng = np.random.default_rng(4)
    before, after = rng.integers(0, 5, 11), rng.normal(size=11)
    pairs = [(i, j) for i in range(11) for j in range(i) if before[i] != before[j]]
    flips = sum((before[i] - before[j]) * (after[i] - after[j]) < 0 for i, j in pairs)
    assert flipped_share(before, after) == flips / len(pairs)
    assert flipped_share(np.arange(6), -np.arange(6)) == 1 and flipped_share(np.arange(6), np.arange(6) ** 3) == 0
    assert flipped_share(np.ones(4), np.arange(4)) is None and flipped_share(np.ones(1), np.ones(1)) is None


@pytest.mark.parametrize("seed", range(4))
def test_area_and_average_precision_are_those_of_every_pair_and_threshold(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 40).astype(float)  # with ties
    scores[:3] = -np.inf
    labels = rng.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert area_under_curve(scores, labels) == pytest.approx(np.mean(pairs))
    expected = recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = scores >= threshold
        now = (labels & above).sum() / labels.sum()
        expected, recall = expected + (now - recall) * labels[above].mean(), now
    assert average_precision(scores, labels) == pytest.approx(expected)


def test_where_labels_are_all_the_same_there_is_no_area():
    assert np.isnan(area_under_curve(np.ones(3), np.ones(3, bool)))
    assert np.isnan(average_precision(np.ones(3), np.zeros(3, bool)))
    assert average_precision(np.ones(3), np.ones(3, bool)) == 1
