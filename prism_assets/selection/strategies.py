"""Strategies: ways to rank the canonical live rows. Each is a small entry here and declares what it needs.

A gradient strategy says how the target gradients are weighted into one direction; candidates are then ranked by the
inner product of their features with it. A pool strategy orders the rows by their ids alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from prism_assets.selection.preference import TargetKind, preference_weights


class TargetScores(NamedTuple):
    """What a weighting may look at, for C checkpoints and m targets."""

    scores: np.ndarray  # float64 [C, m] preference scores s_kj
    norms: np.ndarray  # float64 [C, m] exact gradient norms ‖g_kj‖
    kind: TargetKind
    temperature: float


class Strategy(NamedTuple):
    """A named way to rank. Exactly one of `weigh` and `order` is set."""

    name: str
    description: str
    weigh: Callable[[TargetScores], np.ndarray] | None = None  # -> coefficients [C, m] of the raw gradients
    order: Callable[[Sequence[str], int], np.ndarray] | None = None  # (ids [n], seed) -> keys [n], largest first
    whole_pool: bool = False  # takes every row, whatever the budget

    @property
    def needs_direction(self) -> bool:
        return self.weigh is not None


def _prism(targets: TargetScores) -> np.ndarray:
    return np.stack([preference_weights(s, targets.kind, targets.temperature).weights for s in targets.scores])


def _uniform(targets: TargetScores) -> np.ndarray:
    return np.full_like(targets.scores, 1 / targets.scores.shape[1])


def _less(targets: TargetScores) -> np.ndarray:
    return 1 / (targets.norms * targets.scores.shape[1])


def _prism_unit(targets: TargetScores) -> np.ndarray:
    return _prism(targets) / targets.norms


def _keyed_hash(ids: Sequence[str], seed: int) -> np.ndarray:
    """A uniform number per id that no other row can change: the first 8 bytes of SHA-256 of seed and id."""
    keys = [hashlib.sha256(f"{seed}:{one}".encode()).digest()[:8] for one in ids]
    return np.array([int.from_bytes(key, "big") / 2**64 for key in keys], dtype=np.float64)


def _all_equal(ids: Sequence[str], seed: int) -> np.ndarray:
    return np.zeros(len(ids), dtype=np.float64)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("prism", "targets weighted by the model's preference, gradients not normalised", weigh=_prism),
        Strategy("uniform", "the same with equal weights: what the weighting alone is worth", weigh=_uniform),
        Strategy("less", "mean of unit target gradients, as LESS (Xia et al. 2024) does for one task", weigh=_less),
        Strategy("prism-unit", "PRISM's weights on unit target gradients: weighting and normalisation", weigh=_prism_unit),
        Strategy("random", "a keyed hash of (seed, id): arrivals disturb it least", order=_keyed_hash),
        Strategy("full", "the whole pool, for comparison; never automated", order=_all_equal, whole_pool=True),
    )
}


def cut(
    completion_tokens: np.ndarray, *, kind: str, amount: float, pool_rows: int
) -> int:
    """How many rows of a ranking fit the budget.

    `completion_tokens` [n] is in ranking order. rows: min(amount, n). share: the nearest whole number of rows to
    amount × pool_rows, at least 1. tokens: the longest prefix whose sum is at most the amount.
    Raises ValueError where not even the first row fits a token budget.
    """
    if kind == "tokens":
        fits = int(np.searchsorted(np.cumsum(completion_tokens), amount, side="right"))
        if fits == 0 and len(completion_tokens):
            raise ValueError(
                f"the budget of {amount:.0f} tokens does not hold even the first row "
                f"({int(completion_tokens[0])} completion tokens): raise selection.budget"
            )
        return fits
    rows = amount if kind == "rows" else max(1, round(amount * pool_rows))
    return int(min(rows, len(completion_tokens)))


def ranking(scores: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Row positions [n] by descending score [n]; ties by ascending id."""
    return np.lexsort((np.asarray(ids), -np.asarray(scores)))
