"""Statistics of repeated experiments: means with intervals, differences paired by seed, the share of a gap recovered.

Everything here takes plain numbers, one per seed in the same order of seeds, and knows nothing of models. NumPy and
SciPy are imported where something is computed: the code location loads this module before it computes anything.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000
_LEVEL = 0.95


class Summary(NamedTuple):
    """A mean over n seeds, its standard deviation (n − 1) and 95% interval; None where n or the gap is too small."""

    mean: float | None
    std: float | None
    interval: tuple[float, float] | None
    n: int


def summarize_seeds(values: "Sequence[float] | np.ndarray") -> Summary:
    """Mean, standard deviation and Student's 95% interval of one number per seed [n].

    One seed has a mean and nothing else. Raises ValueError for no value or one that is not finite.
    """
    import numpy as np
    from scipy import stats

    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("one finite number per seed is needed, and at least one seed")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Summary(mean, None, None, 1)
    std = float(numbers.std(ddof=1))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(numbers) - 1)) * std / len(numbers) ** 0.5
    return Summary(mean, std, (mean - half, mean + half), len(numbers))


def paired_difference(left: Sequence[float], right: Sequence[float]) -> Summary:
    """`summarize_seeds` of left − right, seed by seed [n]. Raises ValueError where the numbers of seeds differ."""
    import numpy as np

    if len(left) != len(right):
        raise ValueError(f"differences are paired by seed: {len(left)} seeds against {len(right)}")
    return summarize_seeds(np.asarray(left, np.float64) - np.asarray(right, np.float64))


def gap_recovered(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Summary:
    """How much of the gap low → high (random → oracle) is recovered: (mean(values) − mean(low)) / (mean(high) −
    mean(low)).

    A ratio of means over the same n seeds. Spread and 95% interval are of a paired bootstrap (seeds are drawn with
    replacement, the three numbers of a seed together; fixed seed). Undefined (mean None) where the paired interval of
    the gap itself holds zero, or for a single seed. Raises ValueError where the numbers of seeds differ.
    """
    import numpy as np
    from scipy import stats

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
        confidence_level=_LEVEL,
        method="percentile",
        rng=0,
    )
    low_end, high_end = drawn.confidence_interval
    assert gain.mean is not None and gap.mean is not None  # these means are always there
    return Summary(gain.mean / gap.mean, float(drawn.standard_error), (float(low_end), float(high_end)), gap.n)


def _share(values: "np.ndarray", low: "np.ndarray", high: "np.ndarray", axis: int) -> "np.ndarray":
    """The ratio of means of `gap_recovered` along an axis, of many draws at once."""
    return (values - low).mean(axis=axis) / (high - low).mean(axis=axis)


def compared(name: str, other: str, difference: Summary, what: str, unit: str = "seed") -> str:
    """One sentence on a paired difference over units (seeds, splits): above, below, or no
    significant difference, where the 95% interval holds zero."""
    if difference.interval is None:
        return f"{name} − {other} in {what}: {difference.mean:+.3f} on one {unit}, which says nothing about chance."
    low, high = difference.interval
    verdict = "above" if low > 0 else "below" if high < 0 else "not significantly different from"
    shown = f"{difference.mean:+.3f} [{low:+.3f}, {high:+.3f}], {difference.n} {unit}s"
    return f"{name} is {verdict} {other} in {what}: {shown}."
