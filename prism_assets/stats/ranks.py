"""Rank statistics: Spearman's correlation with a bootstrap interval, and how many pairs change their order."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95
# With fewer items nearly every correlation is within the reach of chance (at 7, |rho| < 0.75 is).
FEWEST = 8


class Correlation(NamedTuple):
    """Spearman's rank correlation of n items with its 95% interval; None where it is not defined."""

    value: float | None
    interval: tuple[float, float] | None
    n: int


def spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    """Pearson's correlation of the average ranks of two vectors [n] (Spearman 1904); None where one is constant.

    Raises ValueError for vectors of different lengths or numbers that are not finite.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(f"a correlation needs two vectors of one length, not {left.shape} and {right.shape}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("a correlation needs finite numbers")
    with _constant_allowed():
        value = stats.spearmanr(left, right).statistic  # pyright: ignore[reportAttributeAccessIssue]
    return None if np.isnan(value) else float(value)


def rank_correlation(left: np.ndarray, right: np.ndarray) -> Correlation:
    """Spearman's correlation of two vectors [n] with a 95% percentile bootstrap interval over the items.

    Items are drawn with replacement (2,000 times, fixed seed); draws in which a side is constant are left out. Below
    `FEWEST` items, or where the correlation itself or that of most draws is not defined, there is no interval.
    *Source:* Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    value = spearman(left, right)
    if value is None or len(left) < FEWEST:
        return Correlation(value, None, len(left))
    with _constant_allowed():
        drawn = stats.bootstrap(
            (left, right), _of_draws, n_resamples=RESAMPLES, paired=True, vectorized=True, method="percentile", rng=0
        ).bootstrap_distribution
    if np.isnan(drawn).sum() > RESAMPLES / 2:
        return Correlation(value, None, len(left))
    # SciPy's own interval is NaN as soon as one draw is.
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Correlation(value, (float(low), float(high)), len(left))


def _of_draws(left: np.ndarray, right: np.ndarray, axis: int) -> np.ndarray:
    """Spearman's correlation along an axis of many draws at once (`spearmanr` pairs every row with every other); NaN
    where a side is constant."""
    return stats.pearsonr(stats.rankdata(left, axis=axis), stats.rankdata(right, axis=axis), axis=axis).statistic  # pyright: ignore[reportAttributeAccessIssue]


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a labelled item scores above another, ties counting half: the area under the ROC curve
    (Mann and Whitney 1947).

    scores, labels (bool): [n]; −∞ is a score like others. NaN where all labels are the same."""
    labels = np.asarray(labels, dtype=bool)
    above, below = int(labels.sum()), int((~labels).sum())
    if not above or not below:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[labels].sum() - above * (above + 1) / 2) / (above * below))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Σ_k (R_k − R_k−1) P_k over the distinct scores, highest first: precision and recall of all items at or above each
    (as scikit-learn's `average_precision_score`). scores, labels (bool): [n]. NaN where no item is labelled."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, dtype=bool)
    if not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))  # of each group of ties
    hits = np.cumsum(labels[order])[last]
    recall = hits / labels.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * hits / (last + 1)))


@contextmanager
def _constant_allowed() -> Iterator[None]:
    """SciPy warns of a constant side, which here is an answer (NaN) and no mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        yield


def flipped_share(before: np.ndarray, after: np.ndarray) -> float | None:
    """Of the pairs that `before` [m] puts in an order, the share that `after` [m] puts in the opposite one.

    Without ties this is (1 − Kendall's tau) / 2: 0 for the same order, 1/2 by chance. None where no pair has an order.
    """
    # With ties only in `after`, no tau of SciPy's and no Somers' D tells flipped pairs from those that became equal.
    first, second = np.triu_indices(len(before), k=1)
    then = np.sign(np.asarray(before)[first] - np.asarray(before)[second])
    now = np.sign(np.asarray(after)[first] - np.asarray(after)[second])
    ordered = int((then != 0).sum())
    return float((then * now < 0).sum() / ordered) if ordered else None
