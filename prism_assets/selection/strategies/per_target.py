"""Strategies that keep target examples apart: a candidate has an influence on each, and none may take all."""

import heapq
from collections.abc import Sequence

import numpy as np

from prism_assets.selection.strategies.base import Input, PoolView, Ranking, Strategy, TargetScores, by_scores
from prism_assets.selection.strategies.directions import preference


def shares(targets: TargetScores) -> np.ndarray:
    """How much of ∇J each target example contributes, float64 [m], summing to 1: w_j ‖g_j‖, the length of its term in
    t = Σ_j w_j g_j, averaged over checkpoints after scaling each to sum 1."""
    lengths = preference(targets) * targets.norms
    return (lengths / lengths.sum(axis=1, keepdims=True)).mean(axis=0)


def _places_by_id(ids: Sequence[str]) -> np.ndarray:
    """The place [n] of each id among all of them: what ties are broken by."""
    return np.argsort(np.argsort(np.asarray(ids), kind="stable"))


# -- less-max ----------------------------------------------------------------------------------------------------


def _less_max(pool: PoolView) -> Ranking:
    """LESS as published: the mean cosine with the targets of each subtask (`group`), then the maximum over subtasks."""
    groups = np.asarray(pool.target_groups())
    influences = pool.influences()
    means = np.stack([influences[:, groups == group].mean(axis=1) for group in np.unique(groups)], axis=1)
    return by_scores(means.max(axis=1), pool.ids)


# -- round robin -------------------------------------------------------------------------------------------------


def round_robin(influences: np.ndarray, quotas: np.ndarray, ids: Sequence[str], wanted: int) -> np.ndarray:
    """Rows [wanted] that the targets take in turn, each its best one left (ties by id).

    influences: [n, m]; quotas: [m], the share of turns of each target. The next turn is the target's that is furthest
    behind its quota (the largest-deficit rule of apportionment), so after k turns each has its share of k to within
    one.
    """
    quotas = quotas / quotas.sum()
    wanted = min(wanted, len(influences))
    ranks = _places_by_id(ids)
    queues = [np.lexsort((ranks, -column)) for column in influences.T]
    place = np.zeros(len(quotas), int)
    turns = np.zeros(len(quotas))
    taken = np.zeros(len(influences), bool)
    order = []
    while len(order) < wanted:
        target = int(np.argmax(quotas * (len(order) + 1) - turns))
        while taken[queues[target][place[target]]]:
            place[target] += 1
        row = queues[target][place[target]]
        taken[row] = True
        order.append(row)
        turns[target] += 1
    return np.array(order, dtype=np.int64)


def _round_robin(pool: PoolView) -> Ranking:
    """Each target takes its row of largest cosine that is left; its share of turns is its share of ∇J, w_j ‖g_j‖."""
    order = round_robin(pool.influences(), shares(pool.target_scores()), pool.ids, pool.wanted)
    return Ranking(order)


# -- coverage ----------------------------------------------------------------------------------------------------


def saturating_coverage(influences: np.ndarray, value: np.ndarray, ids: Sequence[str], wanted: int) -> Ranking:
    """Rows [wanted] chosen greedily for f(S) = Σ_j a_j log(1 + Σ_{i∈S} max(0, c_ij)), with their gains.

    influences: c [n, m]; value: a [m]. The first rows count almost additively, as in a ranking by Σ_j a_j c_ij; the
    more a target is served, the less another row for it counts. f is monotone and submodular (a concave function of a
    modular one), so the greedy choice reaches 1 − 1/e of the best (Nemhauser, Wolsey and Fisher 1978); the form is the
    feature-based functions of Wei, Iyer and Bilmes (2014). Gains only shrink as S grows, so a row's last known gain
    bounds it and most are never computed again (Minoux's lazy greedy 1978).
    """
    positive = np.maximum(influences, 0.0).astype(np.float64)
    served = np.ones(positive.shape[1])
    gains = np.log1p(positive) @ value
    ranks = _places_by_id(ids)
    # Largest gain first, ties by id; `at` says for how large an S the gain was computed.
    heap = [(-gain, int(rank), row, 0) for row, (gain, rank) in enumerate(zip(gains.tolist(), ranks, strict=True))]
    heapq.heapify(heap)
    order: list[int] = []
    scores: list[float] = []
    while heap and len(order) < wanted:
        gain, rank, row, at = heapq.heappop(heap)
        if at < len(order):
            fresh = float(np.log1p(positive[row] / served) @ value)
            heapq.heappush(heap, (-fresh, rank, row, len(order)))
            continue
        order.append(row)
        scores.append(-gain)
        served += positive[row]
    return Ranking(np.array(order, dtype=np.int64), np.array(scores, dtype=np.float32))


def _prism_cover(pool: PoolView) -> Ranking:
    """Rows chosen greedily for Σ_j a_j log(1 + Σ_i max(0, c_ij)), c_ij the mean cosine of row i with target j, a_j the
    target's share of ∇J, w_j ‖g_j‖."""
    return saturating_coverage(pool.influences(), shares(pool.target_scores()), pool.ids, pool.wanted)


_BOTH: frozenset[Input] = frozenset({"features", "target_features"})
LESS_MAX = Strategy(
    "less-max", "LESS as published: mean over each subtask (`group`), then the maximum over subtasks",
    rank=_less_max, reads=_BOTH,
)  # fmt: skip
PRISM_ROUND_ROBIN = Strategy(
    "prism-round-robin", "targets take their best rows in turn, as often as they contribute to PRISM's direction",
    rank=_round_robin, reads=_BOTH,
)  # fmt: skip
PRISM_COVER = Strategy(
    "prism-cover", "PRISM with diminishing returns per target, so that what many targets ask for does not take all",
    rank=_prism_cover, reads=_BOTH,
)  # fmt: skip
