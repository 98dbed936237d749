"""What an optimiser does to a gradient before it steps: the diagonal that turns g into a candidate row.

Signs: everywhere in this project g is the gradient of a *log-probability* (ascent). Optimisers see the loss,
whose gradient is -g, and their first moments carry the loss's sign. Every kind here returns the direction in
which a step would move the parameters (up to the learning rate), so it agrees with g in sign:

    sgd        Gamma = g
    adam       Gamma = g / (sqrt(v / (1 - beta2^T)) + eps)                                 frozen diagonal
    adam_step  Gamma = -m_hat / (sqrt(v_hat) + eps), m_hat and v_hat after one more step with -g
    adam_less  Gamma = -m' / sqrt(v' + 1e-8), m' and v' after one more step with -g, no bias correction

with T the number of optimiser steps that the moments cover. `adam_step` is AdamW's next step without weight decay
(Kingma & Ba, 2015; Loshchilov & Hutter, 2019); `adam_less` is the form in LESS's published code (Xia et al.,
2024).
The first two are linear in g: `diagonal` gives their factor. The last two are not, so inner products with
their rows are no directional derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prism_assets.errors import UnsuitableSetting

KINDS = ("sgd", "adam", "adam_step", "adam_less")
LINEAR_KINDS = ("sgd", "adam")
LESS_EPS = 1e-8


class Moments(NamedTuple):
    """Adam's two accumulators for a parameter, in the optimiser's form: loss sign, no bias correction."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Preconditioner:
    """Applies one of `KINDS` to per-example gradients, parameter by parameter. Make it with `build`."""

    def __init__(self, kind: str, moments: Mapping[str, Moments], step: int, betas: tuple[float, float], eps: float):
        self.kind = kind
        self.step = step
        self.betas = betas
        self.eps = eps
        self._moments = dict(moments)
        self._diagonals: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._moments_there: dict[tuple[str, torch.device, torch.dtype], Moments] = {}

    @classmethod
    def build(
        cls,
        kind: str,
        moments: Mapping[str, Moments] | None = None,
        *,
        step: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> Preconditioner:
        """kind: one of `KINDS`; moments: by canonical name (none for `sgd`); step: optimiser steps taken.

        Raises ValueError where the kind is unknown, moments are missing or not finite, or no step was taken.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown preconditioner {kind!r}; choose one of {', '.join(KINDS)}")
        if kind == "sgd":
            return cls(kind, {}, step, betas, eps)
        if not moments:
            raise ValueError(f"preconditioner {kind!r} needs the optimiser's moments; use 'sgd' where there are none")
        if step < 1:
            raise ValueError(f"preconditioner {kind!r} needs moments of at least one optimiser step, not {step}")
        for name, pair in moments.items():
            if pair.exp_avg.shape != pair.exp_avg_sq.shape:
                raise ValueError(f"moments of {name} differ in shape: {pair.exp_avg.shape}, {pair.exp_avg_sq.shape}")
            if not (torch.isfinite(pair.exp_avg).all() and torch.isfinite(pair.exp_avg_sq).all()):
                raise UnsuitableSetting(
                    f"moments of {name} are not finite; repeat the warm-up with a lower learning rate"
                )
            if (pair.exp_avg_sq < 0).any():
                raise ValueError(f"second moment of {name} is negative: exp_avg and exp_avg_sq may be swapped")
        return cls(kind, moments, step, (float(betas[0]), float(betas[1])), float(eps))

    @property
    def is_linear(self) -> bool:
        """Whether Gamma = D g with a fixed diagonal D."""
        return self.kind in LINEAR_KINDS

    def check(self, parameter_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless there are moments of the right shape for each of these parameters."""
        if self.kind == "sgd":
            return
        for name, shape in parameter_shapes.items():
            if name not in self._moments:
                raise ValueError(f"no optimiser moments for {name}: do they come from another adapter?")
            found = tuple(self._moments[name].exp_avg.shape)
            if found != tuple(shape):
                raise ValueError(f"moments of {name} have shape {found}, the parameter has {tuple(shape)}")

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Gamma of one parameter: gradients [b, *shape] -> [b, *shape], a new tensor except for `sgd`."""
        if self.kind == "sgd":
            return gradients
        if self.kind == "adam":
            return gradients * self._diagonal(name, gradients.device, gradients.dtype)
        beta1, beta2 = self.betas
        state = self._moments_on(name, gradients.device, gradients.dtype)
        first = beta1 * state.exp_avg - (1 - beta1) * gradients
        second = beta2 * state.exp_avg_sq + (1 - beta2) * gradients.square()
        if self.kind == "adam_less":
            return first.neg_().div_(second.add_(LESS_EPS).sqrt_())
        first /= 1 - beta1 ** (self.step + 1)
        second /= 1 - beta2 ** (self.step + 1)
        return first.neg_().div_(second.sqrt_().add_(self.eps))

    def diagonal(self, name: str) -> Tensor | float:
        """D of one parameter, [*shape] (1.0 for `sgd`). Raises ValueError for the kinds that have none."""
        if self.kind == "sgd":
            return 1.0
        if not self.is_linear:
            raise ValueError(f"preconditioner {self.kind!r} is not linear in the gradient: it has no frozen diagonal")
        second = self._moments[name].exp_avg_sq
        dtype = torch.float64 if second.dtype == torch.float64 else torch.float32
        return self._diagonal(name, second.device, dtype)

    def _diagonal(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (name, device, dtype)
        if key not in self._diagonals:
            corrected = self._moments[name].exp_avg_sq.double() / (1 - self.betas[1] ** self.step)
            self._diagonals[key] = (1 / (corrected.sqrt() + self.eps)).to(device, dtype)
        return self._diagonals[key]

    def _moments_on(self, name: str, device: torch.device, dtype: torch.dtype) -> Moments:
        key = (name, device, dtype)
        if key not in self._moments_there:
            self._moments_there[key] = Moments(*(moment.to(device, dtype) for moment in self._moments[name]))
        return self._moments_there[key]
