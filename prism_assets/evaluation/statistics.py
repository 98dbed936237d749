"""Statistics of repeated experiments: means with intervals, differences paired by seed, the share of a gap recovered.

Everything here takes plain numbers, one per seed in the same order of seeds, and knows nothing of models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_LEVEL = 0.95

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the expansion in `_t_quantile`.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Summary(NamedTuple):
    """A mean over n seeds, its standard deviation (n − 1) and 95% interval; None where n or the gap is too small."""

    mean: float | None
    std: float | None
    interval: tuple[float, float] | None
    n: int


def _t_quantile(degrees: int) -> float:
    """Student's t for a two-sided 95% interval; from 31 degrees on Cornish and Fisher's expansion, good to 1e-4."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def summarize_seeds(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and Student's 95% interval of one number per seed [n].

    One seed has a mean and nothing else. Raises ValueError for no value or one that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("one finite number per seed is needed, and at least one seed")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Summary(mean, None, None, 1)
    std = float(numbers.std(ddof=1))
    half = _t_quantile(len(numbers) - 1) * std / len(numbers) ** 0.5
    return Summary(mean, std, (mean - half, mean + half), len(numbers))


def paired_difference(left: Sequence[float], right: Sequence[float]) -> Summary:
    """`summarize_seeds` of left − right, seed by seed [n]. Raises ValueError where the numbers of seeds differ."""
    if len(left) != len(right):
        raise ValueError(f"differences are paired by seed: {len(left)} seeds against {len(right)}")
    return summarize_seeds(np.asarray(left, np.float64) - np.asarray(right, np.float64))


def gap_recovered(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Summary:
    """How much of the gap low → high (random → oracle) is recovered: (mean(values) − mean(low)) / (mean(high) − mean(low)).

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
    drawn = np.random.default_rng(0).integers(gap.n, size=(RESAMPLES, gap.n))
    gains = (np.asarray(values, np.float64) - np.asarray(low, np.float64))[drawn].mean(axis=1)
    gaps = (np.asarray(high, np.float64) - np.asarray(low, np.float64))[drawn].mean(axis=1)
    ratios = gains / gaps
    tail = (1 - _LEVEL) / 2
    low_end, high_end = np.quantile(ratios, [tail, 1 - tail])
    return Summary(gain.mean / gap.mean, float(ratios.std(ddof=1)), (float(low_end), float(high_end)), gap.n)


def compared(name: str, other: str, difference: Summary, what: str, unit: str = "seed") -> str:
    """One sentence on a paired difference over units (seeds, splits): above, below, or not to be told apart."""
    if difference.interval is None:
        return f"{name} − {other} in {what}: {difference.mean:+.3f} on one {unit}, which says nothing about chance."
    low, high = difference.interval
    verdict = "above" if low > 0 else "below" if high < 0 else "not to be told apart from"
    return f"{name} is {verdict} {other} in {what}: {difference.mean:+.3f} [{low:+.3f}, {high:+.3f}], {difference.n} {unit}s."
