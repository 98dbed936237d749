"""The model's preference for the target examples, and the weights that follow from it.

With s_j the preference score of target example j (mean log-probability of its completion, or the margin m_j of a pair)
the objective is J = mean_j φ(s_j), and ∇J = Z Σ_j w_j ∇s_j with w_j = φ′(s_j) / Σ φ′ and Z = mean_j φ′(s_j).

Of pairs φ is as published: PRISM (arXiv 2605.21422; with mean log-probabilities as arXiv 2605.29801, section 3.2.2,
equations 4 to 6, has it) weights the gradient of a margin by π = σ(m), the preference for the wanted completion. That
is the slope of φ(m) = log(1 + exp m), so pairs that the model already answers well count most. Before the formulas were
known to us, φ was σ(m) itself, whose slope lets undecided pairs count most: it is kept as `sigmoid`.

Everything is computed in the log domain, so a target whose probability underflows gets weight zero and no NaN.
"""

from typing import Literal, NamedTuple

import numpy as np

TargetKind = Literal["plain", "pairs"]
PairObjective = Literal["softplus", "sigmoid"]

# A normal distribution's standard deviation is 1.4826 times its median absolute deviation.
_MAD_TO_STD = 1.4826


class PreferenceWeights(NamedTuple):
    """Weights of m target examples under one checkpoint."""

    weights: np.ndarray  # float64 [m], sums to 1
    preferences: np.ndarray  # float64 [m], of pairs π_j = σ(m_j/τ), of plain targets exp(s_j/τ)
    log_z: float  # log of mean_j φ′(s_j)
    objective: float  # J = mean_j φ(s_j)


def margin_scale(base_margins: np.ndarray) -> float:
    """A robust scale of the base model's margins [m]: 1.4826 × the median absolute margin, the spread about zero, where
    the sigmoid turns; 1 where all vanish. The temperature of `sigmoid` where the settings name none."""
    scale = _MAD_TO_STD * float(np.median(np.abs(base_margins))) if len(base_margins) else 0.0
    return scale if scale > 0 else 1.0


def preference_weights(
    scores: np.ndarray, kind: TargetKind, temperature: float = 1.0, objective: PairObjective = "softplus"
) -> PreferenceWeights:
    """Weights of the target examples from their scores [m].

    plain: φ(s) = exp(s/τ), so w = softmax(s/τ). pairs: φ(m) = τ log(1 + exp(m/τ)), so w ∝ π = σ(m/τ), as published at
    τ = 1; with the objective `sigmoid` φ(m) = σ(m/τ), so w ∝ σ(m/τ)·σ(−m/τ).
    Raises ValueError for a score that is not finite or a temperature that is not positive.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not 0 < temperature < np.inf:
        raise ValueError(f"the temperature must be positive and finite, not {temperature}")
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError("scores must be a non-empty vector of finite numbers")
    scaled = scores / temperature
    if kind == "plain":
        preferences = values = np.exp(scaled)
        log_slope = scaled - np.log(temperature)
    else:
        log_slope = -np.logaddexp(0.0, -scaled)  # log π
        preferences = values = np.exp(log_slope)
        if objective == "softplus":
            values = temperature * np.logaddexp(0.0, scaled)
        else:
            log_slope = log_slope - np.logaddexp(0.0, scaled) - np.log(temperature)
    top = log_slope.max()
    slopes = np.exp(log_slope - top)
    return PreferenceWeights(
        weights=slopes / slopes.sum(),
        preferences=preferences,
        log_z=float(top + np.log(slopes.mean())),
        objective=float(values.mean()),
    )


def effective_number(weights: np.ndarray) -> float:
    """1 / Σ w_j² (Kish's effective sample size): m for equal weights [m], 1 where one example has all."""
    weights = np.asarray(weights, dtype=np.float64)
    return float(weights.sum() ** 2 / np.square(weights).sum())
