"""Which candidates are tried: spread over the range of scores, so that correlations can be measured."""

from collections.abc import Mapping

import numpy as np


def spread_over_scores(scores: Mapping[str, np.ndarray], number: int) -> np.ndarray:
    """Positions, ascending, of `number` candidates spread over the range of each strategy's scores [n].

    The strategies take equal shares of the number: each those candidates whose scores lie nearest to evenly spaced
    levels from its lowest to its highest score, of what the former left. All n where `number` is not smaller.
    """
    count = len(next(iter(scores.values())))
    if number >= count:
        return np.arange(count)
    free = np.ones(count, dtype=bool)
    for position, values in enumerate(scores.values()):
        values = np.asarray(values, np.float64)
        share = number * (position + 1) // len(scores) - number * position // len(scores)
        for level in np.linspace(values.min(), values.max(), share):
            free[np.argmin(np.where(free, np.abs(values - level), np.inf))] = False
    return np.flatnonzero(~free)


def random_halves(number: int, rows: int, seed: int) -> np.ndarray:
    """`number` random subsets of half of `rows` rows each, as masks bool [number, rows]."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((number, rows), dtype=bool)
    for mask in masks:
        mask[rng.permutation(rows)[: rows // 2]] = True
    return masks
