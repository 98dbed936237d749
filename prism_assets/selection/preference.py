"""The model's preference for the target examples, and the weights that follow from it.

With s_j the preference score of target example j (mean log-probability of its completion, or the margin of a pair) the
objective is J = mean_j φ(s_j), and ∇J = Z Σ_j w_j ∇s_j with w_j = φ′(s_j) / Σ φ′ and Z = mean_j φ′(s_j).
Everything is computed in the log domain, so a target whose probability underflows gets weight zero and no NaN.
"""

from typing import Literal, NamedTuple

import numpy as np

TargetKind = Literal["plain", "pairs"]

# A normal distribution's standard deviation is 1.4826 times its median absolute deviation.
_MAD_TO_STD = 1.4826


class PreferenceWeights(NamedTuple):
    """Weights of m target examples under one checkpoint."""

    weights: np.ndarray  # float64 [m], sums to 1
    preferences: np.ndarray  # float64 [m], φ(s_j) in (0, 1]
    log_z: float  # log of mean_j φ′(s_j)
    objective: float  # J = mean_j φ(s_j)


def default_temperature(kind: TargetKind, base_margins: np.ndarray | None = None) -> float:
    """τ where the settings name none: 1 for plain targets, a robust scale of the base model's margins for pairs.

    The scale is 1.4826 × the median absolute margin [m] (the spread about zero, where the sigmoid turns);
    1 where all margins vanish.
    """
    if kind == "plain" or base_margins is None or not len(base_margins):
        return 1.0
    scale = _MAD_TO_STD * float(np.median(np.abs(base_margins)))
    return scale if scale > 0 else 1.0


def preference_weights(scores: np.ndarray, kind: TargetKind, temperature: float) -> PreferenceWeights:
    """Weights of the target examples from their scores [m].

    plain: φ(s) = exp(s/τ), so w = softmax(s/τ). pairs: φ(s) = σ(s/τ), so w ∝ σ(s/τ)·σ(−s/τ).
    Raises ValueError for a score that is not finite or a temperature that is not positive.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not 0 < temperature < np.inf:
        raise ValueError(f"the temperature must be positive and finite, not {temperature}")
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError("scores must be a non-empty vector of finite numbers")
    scaled = scores / temperature
    if kind == "plain":
        log_phi = scaled
        log_slope = scaled - np.log(temperature)
    else:
        log_phi = -np.logaddexp(0.0, -scaled)
        log_slope = log_phi - np.logaddexp(0.0, scaled) - np.log(temperature)
    top = log_slope.max()
    slopes = np.exp(log_slope - top)
    return PreferenceWeights(
        weights=slopes / slopes.sum(),
        preferences=np.exp(log_phi),
        log_z=float(top + np.log(slopes.mean())),
        objective=float(np.exp(log_phi).mean()),
    )


def effective_number(weights: np.ndarray) -> float:
    """1 / Σ w_j² (Kish's effective sample size): m for equal weights [m], 1 where one example has all."""
    weights = np.asarray(weights, dtype=np.float64)
    return float(weights.sum() ** 2 / np.square(weights).sum())
