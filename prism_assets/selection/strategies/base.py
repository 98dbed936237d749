"""What a strategy is, what it may look at, and what it returns."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from prism_assets.selection.preference import TargetKind, margin_scale

# What a strategy reads beside ids and token counts; it becomes part of what a selection is made from.
#   seed             selection.seed
#   text             prompts and completions of candidates and targets
#   features         what the gradient pass stored of each candidate
#   direction        PRISM's direction (needs features)
#   target_features  scores and gradients of the targets (needs features)
#   hidden_states    a forward pass of the starting model over candidates and targets
Input = Literal["seed", "text", "features", "direction", "target_features", "hidden_states"]


class TargetScores(NamedTuple):
    """What a weighting may look at, for C checkpoints and m target examples."""

    scores: np.ndarray  # float64 [C, m] preference scores s_kj
    norms: np.ndarray  # float64 [C, m] exact gradient norms ‖g_kj‖
    kind: TargetKind
    given_temperature: float | None  # of the settings
    base_scores: np.ndarray  # float64 [m] scores of the model where the warm-up starts

    @property
    def temperature(self) -> float:
        """τ of `prism` and what follows its weights: 1 where the settings name none, as published."""
        return 1.0 if self.given_temperature is None else self.given_temperature

    @property
    def sigmoid_temperature(self) -> float:
        """τ of `prism-sigmoid`: of pairs the scale of the base model's margins where the settings name none."""
        if self.given_temperature is not None or self.kind == "plain":
            return self.temperature
        return margin_scale(self.base_scores)


class Texts(NamedTuple):
    """Prompts and completions, in one order."""

    prompts: Sequence[str]
    completions: Sequence[str]


class PoolView(Protocol):
    """The n rows that may be ranked, and the m target examples. Everything beyond ids is read when it is asked for.

    Labels (`source`, the record's own id) are not among it: no strategy can see them. Nor are held-out records.
    """

    ids: Sequence[str]  # [n]
    completion_tokens: np.ndarray  # int64 [n]
    seed: int
    wanted: int  # an order of so many rows surely fills the budget

    def texts(self) -> Texts:
        """Prompts and completions of the rows [n]."""
        ...

    def target_texts(self) -> Texts:
        """Prompts and completions of the targets [m]; of pairs the wanted completions."""
        ...

    def mean_log_probs(self) -> np.ndarray:
        """Mean log-probability of each row at the last checkpoint, float64 [n], nats per token."""
        ...

    def direction_scores(self) -> np.ndarray:
        """Influence of each row by PRISM's direction, float32 [n]."""
        ...

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """Stored gradient features of these rows, float32 [k, D]; inner products are cosines."""
        ...

    def influences(self) -> np.ndarray:
        """Mean cosine of each row's gradient with each target's, float32 [n, m]."""
        ...

    def target_scores(self) -> TargetScores:
        """Scores and gradient norms of the targets."""
        ...

    def target_groups(self) -> Sequence[str]:
        """The subtask of each target [m]; empty where it has none."""
        ...

    def similarities(self) -> np.ndarray:
        """Cosine of each row's hidden states with each target's, float32 [n, m]."""
        ...


class Ranking(NamedTuple):
    """Rows of the pool, best first, as far as they are wanted."""

    order: np.ndarray  # int64 [k] positions in the pool
    scores: np.ndarray | None = None  # float32 [k] of these rows, where the strategy has scores


class Strategy(NamedTuple):
    """A named way to rank. Exactly one of `weigh` and `rank` is set.

    A direction strategy (`weigh`) says how the target gradients are weighted into one direction; candidates are ranked
    by the inner product of their features with it. Any other one (`rank`) orders the rows of a pool itself.
    """

    name: str
    description: str
    weigh: Callable[[TargetScores], np.ndarray] | None = None  # -> coefficients [C, m] of the raw gradients
    rank: Callable[[PoolView], Ranking] | None = None
    reads: frozenset[Input] = frozenset()
    whole_pool: bool = False  # takes every row, whatever the budget
    by_label: bool = False  # removes the rows that `targets.<name>.label` names, whatever the budget

    @property
    def needs_direction(self) -> bool:
        """Whether it ranks by the inner product with one direction."""
        return self.weigh is not None

    @property
    def needs_features(self) -> bool:
        """Whether only rows with usable gradient features can be ranked."""
        return self.needs_direction or "features" in self.reads


def by_scores(scores: np.ndarray, ids: Sequence[str], *, shown: bool = True) -> Ranking:
    """All rows by descending score [n]; ties by ascending id. `shown`: the scores say something to a reader."""
    from prism_assets.selection.ordering import order_by_score

    order = order_by_score(scores, ids)
    return Ranking(order, np.asarray(scores)[order].astype(np.float32) if shown else None)
