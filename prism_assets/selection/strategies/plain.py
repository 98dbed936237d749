"""Strategies that need no targets: chance, everything, length."""

import hashlib
from collections.abc import Sequence

import numpy as np

from prism_assets.errors import UnsuitableSetting
from prism_assets.selection.strategies.base import PoolView, Ranking, Strategy, by_scores


def keyed_hash(ids: Sequence[str], seed: int) -> np.ndarray:
    """A uniform number per id that no other row can change: the first 8 bytes of SHA-256 of seed and id."""
    keys = [hashlib.sha256(f"{seed}:{one}".encode()).digest()[:8] for one in ids]
    return np.array([int.from_bytes(key, "big") / 2**64 for key in keys], dtype=np.float64)


def _random(pool: PoolView) -> Ranking:
    """Rows by the first 8 bytes of SHA-256 of seed and id, so that no other row can change a row's number."""
    return by_scores(keyed_hash(pool.ids, pool.seed), pool.ids, shown=False)


def _full(pool: PoolView) -> Ranking:
    return by_scores(np.zeros(len(pool.ids)), pool.ids, shown=False)


def _length(pool: PoolView) -> Ranking:
    return by_scores(pool.completion_tokens.astype(np.float64), pool.ids)


def _oracle(pool: PoolView) -> Ranking:
    raise UnsuitableSetting("the strategy oracle is for targets with use: remove and a label")


RANDOM = Strategy(
    "random", "a keyed hash of (seed, id): arrivals disturb it least", rank=_random, reads=frozenset({"seed"})
)
FULL = Strategy("full", "the whole pool, for comparison; never automated", rank=_full, whole_pool=True)
ORACLE = Strategy(
    "oracle", "the rows that a label calls harmful, to compare with; for use: remove", rank=_oracle, by_label=True
)
LENGTH = Strategy(
    "length", "the longest completions, in tokens (a strong baseline of instruction tuning)", rank=_length
)
