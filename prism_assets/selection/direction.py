"""The target direction: target gradients added up, and the query that the index is queried with."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prism_assets.corpus.target_set import TargetSet
from prism_assets.gradients.vectors import Vector, inner, norm

if TYPE_CHECKING:
    import torch

    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.settings import RowScale


def target_vector(engine: "GradientEngine", targets: TargetSet, weights: np.ndarray) -> "dict[str, torch.Tensor]":
    """t = Σ_j w_j ∇s_j at the engine's parameters, unsketched, fp32, by one weighted backward (weights [m])."""
    return engine.weighted_gradient(targets.examples, targets.expand(weights)).gradient


def target_vectors(
    engine: "GradientEngine", targets: TargetSet, weights: Sequence[np.ndarray]
) -> "list[dict[str, torch.Tensor]]":
    """`target_vector` for several weightings [m] of the same targets, by one pass over them."""
    return engine.weighted_gradients(targets.examples, np.stack([targets.expand(one) for one in weights]))


def row_factors(scale: "RowScale", norms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """What candidates' unit gradients are multiplied with, float64 [n, C]: of `unit` one, of `mean` the norm [n, C] of
    the gradient of the mean loss, of `sum` that times the supervised tokens [n]."""
    if scale == "unit":
        return np.ones_like(norms)
    return norms if scale == "mean" else norms * tokens[:, None]


def relative_rates(learning_rates: Sequence[float]) -> list[float]:
    """η̄_k / Σ_l η̄_l; equal shares where all are zero (a warm-up of one step)."""
    total = float(sum(learning_rates))
    return [rate / total if total > 0 else 1 / len(learning_rates) for rate in learning_rates]


def query_vector(
    sketches: Sequence[np.ndarray], norms: Sequence[float] | np.ndarray, learning_rates: Sequence[float]
) -> np.ndarray:
    """The index query: blocks η̄_k S t_k / ‖t_k‖, concatenated; float32 [C·K].

    `sketches` holds S t_k [K] of each of C checkpoints, `norms` the exact ‖t_k‖. The η̄_k are scaled to sum to 1, so
    a score is a mean cosine; where all are zero (a warm-up of one step) they count equally. Raises ValueError where a
    norm is zero or not finite: no direction can be followed.
    """
    rates = relative_rates(learning_rates)
    for checkpoint, length in enumerate(norms):
        if not np.isfinite(length) or length <= 0:
            raise ValueError(f"the target vector of checkpoint {checkpoint} has norm {length}: it has no direction")
    return np.concatenate(
        [
            rate * np.asarray(sketch, np.float64) / length
            for sketch, length, rate in zip(sketches, norms, rates, strict=True)
        ]
    ).astype(np.float32)


def curvature_coefficients(rows: np.ndarray, products: np.ndarray, damping: float) -> np.ndarray:
    """a [N] with (F + λI)⁻¹ t ∝ t − Σ_i a_i r_i, where F = (1/N) Σ_i r_i r_iᵀ is the second moment of N unit rows.

    rows: [N, K], the r_i or sketches of them; products: [N], ⟨r_i, t⟩ or the like of sketches; λ = damping · tr F, and
    tr F = 1. By Woodbury's identity a = (λN·I + R Rᵀ)⁻¹ R t, a system of N unknowns whatever the number of parameters.
    Damped second moments of gradients (the empirical Fisher) in place of curvature are Amari 1998 and Martens 2020; to
    apply the inverse to the target vector alone, so that the index stays as it is, is our own.
    """
    rows = rows.astype(np.float64)
    gram = rows @ rows.T
    return np.linalg.solve(damping * len(rows) * np.eye(len(rows)) + gram, products.astype(np.float64))


class FirstOrderGain(NamedTuple):
    """What a small step does, predicted to first order and measured."""

    predicted: float  # change of J
    measured: float  # change of J
    held_out_mean_log_prob: float  # measured change of the held-out examples' mean log-probability


def first_order_gain(
    engine: "GradientEngine",
    along: Vector,
    gradient: Vector,
    size: float,
    objective: Callable[[np.ndarray], float],
    targets: TargetSet,
    held_out: Sequence,
    before: tuple[float, float],
) -> FirstOrderGain:
    """Take the step θ + size·u with u = along/‖along‖ and measure.

    `gradient` is ∇J; `objective(scores [m]) -> J`; `before` holds J and the held-out mean log-probability at θ.
    """
    length = norm(along)
    unit = {name: tensor / length for name, tensor in along.items()}
    with engine.step(unit, size):
        after = objective(targets.scores(engine.mean_log_probs(targets.examples)))
        held_out_after = float(np.mean(engine.mean_log_probs(held_out)))
    return FirstOrderGain(size * inner(gradient, unit), after - before[0], held_out_after - before[1])
