"""Strategies with one direction: how target gradients are weighted into it.

The 2 × 2 of weighting (preference or equal) and normalisation (raw or unit gradients): prism, uniform, prism-unit,
less; and prism-sigmoid, with another objective for pairs.
"""

import numpy as np

from prism_assets.selection.preference import preference_weights
from prism_assets.selection.strategies.base import Strategy, TargetScores


def preference(targets: TargetScores) -> np.ndarray:
    """Weights w [C, m], summing to 1 at each checkpoint: w_j ∝ φ′(s_j), which is the preference σ(s_j/τ) of pairs and
    exp(s_j/τ) of plain targets."""
    return np.stack([preference_weights(s, targets.kind, targets.temperature).weights for s in targets.scores])


def _sigmoid(targets: TargetScores) -> np.ndarray:
    """Of pairs w_j ∝ σ(s_j/τ) σ(−s_j/τ), summing to 1 at each checkpoint."""
    tau = targets.sigmoid_temperature
    return np.stack([preference_weights(s, targets.kind, tau, "sigmoid").weights for s in targets.scores])


def _uniform(targets: TargetScores) -> np.ndarray:
    """1/m for each of m targets."""
    return np.full_like(targets.scores, 1 / targets.scores.shape[1])


def _less(targets: TargetScores) -> np.ndarray:
    """1/(m ‖g_j‖) for each of m targets."""
    return 1 / (targets.norms * targets.scores.shape[1])


def _prism_unit(targets: TargetScores) -> np.ndarray:
    """w_j/‖g_j‖, with the weights w_j of `prism`."""
    return preference(targets) / targets.norms


PRISM = Strategy(
    "prism", "targets weighted by the model's preference, as published for pairs; gradients not normalised",
    weigh=preference,
)  # fmt: skip
PRISM_SIGMOID = Strategy(
    "prism-sigmoid", "pairs weighted by the slope of the preference, so that undecided ones count most; plain targets "
    "as prism", weigh=_sigmoid,
)  # fmt: skip
UNIFORM = Strategy("uniform", "the same with equal weights: what the weighting alone is worth", weigh=_uniform)
LESS = Strategy("less", "mean of unit target gradients, as LESS (Xia et al. 2024) does for one task", weigh=_less)
PRISM_UNIT = Strategy(
    "prism-unit", "PRISM's weights on unit target gradients: weighting and normalisation", weigh=_prism_unit
)
