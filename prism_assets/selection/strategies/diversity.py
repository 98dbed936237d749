"""PRISM's ranking without redundant rows: candidates are compared with each other, not only with targets."""

import numpy as np

from prism_assets.selection.strategies.base import PoolView, Ranking, Strategy, by_scores

# A row is taken from the best 4 × the budget: below that PRISM ranks enough rows higher, and the work stays
# proportional to the square of the budget.
SHORTLIST = 4
# λ. Carbonell and Goldstein use .7 to focus on what is relevant (.3 to look around). Here: a copy of a row that is
# taken already must lead by 0.3/0.7 = 43% of the shortlist's range of influence to be taken as well.
TRADE_OFF = 0.7


def marginal_relevance(relevance: np.ndarray, vectors: np.ndarray, wanted: int, trade_off: float) -> np.ndarray:
    """Positions [wanted] by maximal marginal relevance (Carbonell and Goldstein 1998): each next row i has the largest

        λ · relevance_i − (1 − λ) · max over rows j taken before of ⟨v_i, v_j⟩

    (the second term is 0 for the first row). relevance: [k]; vectors: float32 [k, D] whose inner products are
    cosines. Of equal rows the first comes first.
    """
    left = relevance.astype(np.float64)
    nearest = np.zeros(len(left))
    order: list[int] = []
    while len(order) < min(wanted, len(left)):
        row = int(np.argmax(trade_off * left - (1 - trade_off) * nearest))
        similarity = vectors @ vectors[row]
        nearest = np.maximum(nearest, similarity) if order else similarity.astype(np.float64)
        left[row] = -np.inf
        order.append(row)
    return np.array(order, dtype=np.int64)


def _prism_mmr(pool: PoolView) -> Ranking:
    """Maximal marginal relevance over the best `SHORTLIST` × the wanted rows of PRISM's ranking.

    Relevance is a row's influence, min-max scaled over the shortlist: influences are cosines with one direction and
    differ by hundredths there, while cosines between candidates run up to 1. The score that is shown is the influence.
    """
    ranked = by_scores(pool.direction_scores(), pool.ids)
    assert ranked.scores is not None
    best, scores = (one[: SHORTLIST * pool.wanted] for one in (ranked.order, ranked.scores))
    spread = float(scores[0] - scores[-1])
    relevance = (scores.astype(np.float64) - scores[-1]) / spread if spread else np.zeros(len(best))
    chosen = marginal_relevance(relevance, pool.vectors(best), pool.wanted, TRADE_OFF)
    return Ranking(best[chosen], scores[chosen])


PRISM_MMR = Strategy(
    "prism-mmr", "PRISM's best rows, minus what is similar to rows taken before (maximal marginal relevance)",
    rank=_prism_mmr, reads=frozenset({"features", "direction"}),
)  # fmt: skip
