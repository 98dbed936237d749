"""The share of a gap that a strategy recovers, over seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from prism_assets.stats.seeds import Summary, paired_difference

RESAMPLES = 10_000


def gap_recovered(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Summary:
    """How much of the gap low → high (random → oracle) is recovered: (mean(values) − mean(low)) / (mean(high) −
    mean(low)).

    A ratio of means over the same n seeds. Spread and 95% interval are of a paired bootstrap (seeds are drawn with
    replacement, the three numbers of a seed together; fixed seed). Undefined (mean None) where the paired interval of
    the gap itself holds zero, or for a single seed. Raises ValueError where the numbers of seeds differ.
    """
    gap = paired_difference(high, low)
    gain = paired_difference(values, low)
    if gain.n != gap.n:
        raise ValueError(f"shares are paired by seed: {gain.n} seeds against {gap.n}")
    if gap.interval is None or gap.interval[0] <= 0 <= gap.interval[1]:
        return Summary(None, None, None, gap.n)
    drawn = stats.bootstrap(
        [np.asarray(one, np.float64) for one in (values, low, high)],
        _share,
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=0,
    )
    low_end, high_end = drawn.confidence_interval
    assert gain.mean is not None and gap.mean is not None  # these means are always there
    return Summary(gain.mean / gap.mean, float(drawn.standard_error), (float(low_end), float(high_end)), gap.n)


def _share(values: np.ndarray, low: np.ndarray, high: np.ndarray, axis: int) -> np.ndarray:
    """The ratio of means of `gap_recovered` along an axis, of many draws at once."""
    return (values - low).mean(axis=axis) / (high - low).mean(axis=axis)
