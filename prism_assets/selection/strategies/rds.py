"""RDS+: candidates that the starting model represents as it represents the targets."""

import numpy as np

from prism_assets.selection.strategies.base import PoolView, Ranking, Strategy
from prism_assets.selection.strategies.per_target import round_robin


def _rds(pool: PoolView) -> Ranking:
    """Targets take turns in the order of their file, each its most similar candidate left (ties by id).

    Ivison et al. 2025 ("Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807): similarity is the cosine
    of position-weighted means of last hidden states, over all tokens of prompt and completion
    (`gradients/hidden_states.py`). One departure: in their code the turn of a target whose best row is taken already
    passes; here it takes its next one. Targets of pairs are read with the wanted completion.
    """
    similarities = pool.similarities()
    return Ranking(round_robin(similarities, np.ones(similarities.shape[1]), pool.ids, pool.wanted))


RDS = Strategy(
    "rds", "RDS+: weighted mean of last hidden states, targets take their most similar rows in turn",
    rank=_rds, reads=frozenset({"hidden_states"}),
)  # fmt: skip
