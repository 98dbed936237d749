"""The share of a gap against its definition, and against seeds drawn one experiment at a time."""

import numpy as np
import pytest

from benchmarks.gaps import gap_recovered


def test_gap_is_a_ratio_of_means_not_a_mean_of_ratios():
    low, high, values = [0.0, 0.0, 0.1], [1.0, 1.2, 1.1], [0.5, 0.9, 0.4]
    found = gap_recovered(values, low, high)
    assert found.mean == pytest.approx((np.mean(values) - np.mean(low)) / (np.mean(high) - np.mean(low)))
    assert found.interval[0] <= found.mean <= found.interval[1]
    assert gap_recovered(high, low, high).mean == pytest.approx(1)
    assert gap_recovered(low, low, high).mean == pytest.approx(0)


def test_spread_and_interval_of_the_share_are_those_of_seeds_drawn_together():
    rng = np.random.default_rng(5)
    base = rng.normal(0, 0.5, 8)
    low, high, values = (base + mean + rng.normal(0, 0.2, 8) for mean in (0.0, 1.0, 0.6))
    shares = []
    for _ in range(10_000):
        drawn = rng.integers(8, size=8)
        shares.append((values[drawn].mean() - low[drawn].mean()) / (high[drawn].mean() - low[drawn].mean()))
    found = gap_recovered(values, low, high)
    assert found.std == pytest.approx(np.std(shares, ddof=1), rel=0.05)
    assert found.interval == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.2 * found.std)


def test_bootstrap_interval_of_the_share_covers():
    rng = np.random.default_rng(4)
    held = []
    for _ in range(150):
        base = rng.normal(0, 0.2, 20)
        low, high, values = (base + mean + rng.normal(0, 0.1, 20) for mean in (0.0, 1.0, 0.7))
        interval = gap_recovered(values, low, high).interval
        held.append(interval[0] <= 0.7 <= interval[1])
    assert np.mean(held) > 0.87  # 0.95 less four standard errors, and the bootstrap's known shortfall at n = 20


def test_share_of_a_gap_that_may_be_zero_is_undefined():
    assert gap_recovered([0.4, 0.5, 0.6], [0.5, 0.4, 0.6], [0.6, 0.3, 0.7]).mean is None
    assert gap_recovered([0.5], [0.0], [1.0]).mean is None
