"""Statistics of repeated experiments: means with intervals, differences paired by seed.

Everything here takes plain numbers, one per seed in the same order of seeds, and knows nothing of models. NumPy and
SciPy are imported where something is computed: the code location loads this module before it computes anything.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

_LEVEL = 0.95


class Summary(NamedTuple):
    """A mean over n seeds, its standard deviation (n − 1) and 95% interval; None where n is too small."""

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


def compared(name: str, other: str, difference: Summary, what: str, unit: str = "seed") -> str:
    """One sentence on a paired difference over units (seeds, splits): above, below, or no
    significant difference, where the 95% interval holds zero."""
    if difference.interval is None:
        return f"{name} − {other} in {what}: {difference.mean:+.3f} on one {unit}, which says nothing about chance."
    low, high = difference.interval
    verdict = "above" if low > 0 else "below" if high < 0 else "not significantly different from"
    shown = f"{difference.mean:+.3f} [{low:+.3f}, {high:+.3f}], {difference.n} {unit}s"
    return f"{name} is {verdict} {other} in {what}: {shown}."
