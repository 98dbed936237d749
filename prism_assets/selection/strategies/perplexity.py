"""Perplexity: the middle of the pool, neither what the model predicts best nor what it predicts worst."""

import numpy as np

from prism_assets.selection.strategies.base import PoolView, Ranking, Strategy, by_scores


def percentiles(values: np.ndarray) -> np.ndarray:
    """The share of the pool below each value, float64 [n] in (0, 1): (mid-rank − ½) / n, so equal values are equal."""
    ordered = np.sort(values)
    below, not_above = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (below + not_above) / (2 * len(values))


def _perplexity(pool: PoolView) -> Ranking:
    """Rows by ½ − |p_i − ½|, p_i being the percentile of perplexity: the nearest to the median first, ties by id.

    Perplexity is exp(−s_i), s_i the mean log-probability of the completion's tokens at the last warm-up checkpoint;
    it decreases in s_i, and |p − ½| is the same of either. The middle band was the best third to keep by perplexity in
    Marion et al. 2023 ("When Less is More", arXiv 2309.04564), who prune pretraining data; there it is cut out of the
    percentiles, and so it is here: the top k rows are the k percentiles around the median.
    """
    middle = 0.5 - np.abs(percentiles(pool.mean_log_probs()) - 0.5)
    return by_scores(middle, pool.ids)


PERPLEXITY = Strategy(
    "perplexity", "the middle band: completions whose perplexity is nearest to the pool's median",
    rank=_perplexity, reads=frozenset({"features"}),
)  # fmt: skip
