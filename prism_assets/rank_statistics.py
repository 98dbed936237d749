"""Rank statistics: Spearman's correlation with a bootstrap interval, and how many pairs change their order."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
# With fewer items nearly every correlation is within the reach of chance (at 7, |rho| < 0.75 is).
FEWEST = 8


class Correlation(NamedTuple):
    """Spearman's rank correlation of n items with its 95% interval; None where it is not defined."""

    value: float | None
    interval: tuple[float, float] | None
    n: int


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis [..., n]; equal values share the mean of their ranks."""
    values = np.asarray(values, np.float64)
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    places = np.arange(values.shape[-1], dtype=np.float64)
    starts = np.concatenate([np.ones((*values.shape[:-1], 1), bool), ordered[..., 1:] != ordered[..., :-1]], axis=-1)
    ends = np.concatenate([starts[..., 1:], np.ones((*values.shape[:-1], 1), bool)], axis=-1)
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=-1)
    last = np.flip(np.minimum.accumulate(np.flip(np.where(ends, places, np.inf), -1), axis=-1), -1)
    ranks = np.empty_like(values)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=-1)
    return ranks


def spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    """Pearson's correlation of the average ranks of two vectors [n] (Spearman 1904); None where one is constant.

    Raises ValueError for vectors of different lengths or numbers that are not finite.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(f"a correlation needs two vectors of one length, not {left.shape} and {right.shape}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("a correlation needs finite numbers")
    value = _correlations(left[None], right[None])[0] if len(left) else np.nan
    return None if np.isnan(value) else float(value)


def _correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of two matrices [b, n]; NaN where a row is constant."""
    ranks = [average_ranks(one) for one in (left, right)]
    centred = [one - one.mean(axis=1, keepdims=True) for one in ranks]
    lengths = [np.sqrt(np.square(one).sum(axis=1)) for one in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] * centred[1]).sum(axis=1) / (lengths[0] * lengths[1])


def rank_correlation(left: np.ndarray, right: np.ndarray) -> Correlation:
    """Spearman's correlation of two vectors [n] with a 95% percentile bootstrap interval over the items.

    Items are drawn with replacement (2,000 times, fixed seed); draws in which a side is constant are left out. Below
    `FEWEST` items, or where the correlation itself is not defined, there is no interval.
    *Source:* Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    value = spearman(left, right)
    if value is None or len(left) < FEWEST:
        return Correlation(value, None, len(left))
    drawn = np.random.default_rng(0).integers(len(left), size=(RESAMPLES, len(left)))
    values = _correlations(left[drawn], right[drawn])
    values = values[~np.isnan(values)]
    if len(values) < RESAMPLES / 2:
        return Correlation(value, None, len(left))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Correlation(value, (float(low), float(high)), len(left))


def flipped_share(before: np.ndarray, after: np.ndarray) -> float | None:
    """Of the pairs that `before` [m] puts in an order, the share that `after` [m] puts in the opposite one.

    Without ties this is (1 − Kendall's tau) / 2: 0 for the same order, 1/2 by chance. None where no pair has an order.
    """
    first, second = np.triu_indices(len(before), k=1)
    then = np.sign(np.asarray(before)[first] - np.asarray(before)[second])
    now = np.sign(np.asarray(after)[first] - np.asarray(after)[second])
    ordered = int((then != 0).sum())
    return float((then * now < 0).sum() / ordered) if ordered else None
