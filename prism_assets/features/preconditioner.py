"""What an optimiser does to a gradient before it steps: the diagonal that turns g into a candidate row.

Signs: everywhere in this project g is the gradient of a *log-probability* (ascent). Optimisers see the loss,
whose gradient is -g, and their first moments carry the loss's sign. Every kind here returns the direction in
which a step would move the parameters (up to the learning rate), so it agrees with g in sign:

    sgd        Gamma = g
    adam       Gamma = g / (sqrt(v / (1 - beta2^T)) + eps)                                 frozen diagonal
    adam_step  Gamma = -m_hat / (sqrt(v_hat) + eps), m_hat and v_hat after one more step with -g
    adam_less  Gamma = -m' / sqrt(v' + 1e-8), m' and v' after one more step with -g, no bias correction

with T the number of optimiser steps behind the moments. `adam_step` is AdamW's next step without weight decay
(Kingma & Ba, 2015; Loshchilov & Hutter, 2019); `adam_less` is the form in LESS's published code (Xia et al.,
2024).
The first two are linear in g: `diagonal` gives their factor. The last two are not, so inner products with
their rows are no directional derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("sgd", "adam", "adam_step", "adam_less")
LINEAR_KINDS = ("sgd", "adam")
LESS_EPS = 1e-8


class Moments(NamedTuple):
    """Adam's two accumulators for a parameter, in the optimiser's form: loss sign, no bias correction."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class OptimizerMoments(NamedTuple):
    """The state of an Adam-like optimiser by canonical LoRA parameter name."""

    moments: dict[str, Moments]
    step: int
    betas: tuple[float, float]
    eps: float


class Preconditioner:
    """Applies one of `KINDS` to per-example gradients, parameter by parameter. Make it with `build`."""

    def __init__(
        self, kind: str, moments: Mapping[str, Moments], step: int, betas: tuple[float, float], eps: float
    ):
        self.kind = kind
        self.step = step
        self.betas = betas
        self.eps = eps
        self._moments = dict(moments)
        self._cache: dict[tuple[str, torch.device, torch.dtype], Tensor | Moments] = {}

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
            raise ValueError(
                f"preconditioner {kind!r} needs the optimiser's moments; use 'sgd' where there are none"
            )
        if step < 1:
            raise ValueError(
                f"preconditioner {kind!r} needs moments of at least one optimiser step, not {step}"
            )
        for name, pair in moments.items():
            if pair.exp_avg.shape != pair.exp_avg_sq.shape:
                raise ValueError(
                    f"moments of {name} differ in shape: {pair.exp_avg.shape}, {pair.exp_avg_sq.shape}"
                )
            if not (torch.isfinite(pair.exp_avg).all() and torch.isfinite(pair.exp_avg_sq).all()):
                raise ValueError(
                    f"moments of {name} are not finite; repeat the warm-up with a lower learning rate"
                )
            if (pair.exp_avg_sq < 0).any():
                raise ValueError(
                    f"second moment of {name} is negative: exp_avg and exp_avg_sq may be swapped"
                )
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
            raise ValueError(
                f"preconditioner {self.kind!r} is not linear in the gradient: it has no frozen diagonal"
            )
        second = self._moments[name].exp_avg_sq
        dtype = torch.float64 if second.dtype == torch.float64 else torch.float32
        return self._diagonal(name, second.device, dtype)

    def _diagonal(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (name, device, dtype)
        if key not in self._cache:
            corrected = self._moments[name].exp_avg_sq.double() / (1 - self.betas[1] ** self.step)
            self._cache[key] = (1 / (corrected.sqrt() + self.eps)).to(device, dtype)
        return self._cache[key]

    def _moments_on(self, name: str, device: torch.device, dtype: torch.dtype) -> Moments:
        key = (name, device, dtype)
        if key not in self._cache:
            self._cache[key] = Moments(*(moment.to(device, dtype) for moment in self._moments[name]))
        return self._cache[key]


def moments_to_tensors(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """The flat form that a safetensors file holds: `exp_avg.<name>` and `exp_avg_sq.<name>`."""
    tensors = {}
    for name, pair in moments.items():
        tensors[f"exp_avg.{name}"] = pair.exp_avg.contiguous()
        tensors[f"exp_avg_sq.{name}"] = pair.exp_avg_sq.contiguous()
    return tensors


def moments_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Moments]:
    """The inverse of `moments_to_tensors`; other keys are ignored. Raises ValueError where one of a pair is
    missing."""
    first = {k.removeprefix("exp_avg."): v for k, v in tensors.items() if k.startswith("exp_avg.")}
    second = {k.removeprefix("exp_avg_sq."): v for k, v in tensors.items() if k.startswith("exp_avg_sq.")}
    if alone := sorted(first.keys() ^ second.keys()):
        raise ValueError(
            f"moments of {alone[0]} are incomplete: both exp_avg.NAME and exp_avg_sq.NAME are needed"
        )
    return {name: Moments(first[name], second[name]) for name in first}


def moments_from_optimizer_state(
    state: Mapping, parameter_shapes: Mapping[str, tuple[int, ...]], names: Sequence[str] | None = None
) -> OptimizerMoments:
    """Reads the `state_dict()` of a torch Adam or AdamW optimiser.

    parameter_shapes: the LoRA parameters by canonical name, in the model's order. names: the name of each of
    the optimiser's parameters in its own order (adapter names may be left in, as `named_parameters` gives
    them); by default the names that the state dict carries (`param_names`), else the model's order.
    Raises ValueError where names, number or shapes disagree: moments are never assigned to the wrong
    parameter of another shape.
    """
    groups = state["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    names = [canonical_name(name) for name in (names if names is not None else parameter_shapes)]
    if len(indices) != len(names):
        raise ValueError(
            f"the optimiser holds {len(indices)} parameters, the adapter has {len(names)}: "
            "give the names in the optimiser's order, or the checkpoint of this adapter"
        )
    if unknown := sorted(set(parameter_shapes) ^ set(names)):
        raise ValueError(f"optimiser and adapter disagree about parameter {unknown[0]}")
    moments, steps = {}, set()
    for index, name in zip(indices, names, strict=True):
        entry = state["state"].get(index)
        if entry is None or "exp_avg" not in entry or "exp_avg_sq" not in entry:
            raise ValueError(
                f"the optimiser has no Adam moments for {name} (has it taken a step? is it Adam or AdamW?)"
            )
        shape = tuple(parameter_shapes[name])
        for moment in ("exp_avg", "exp_avg_sq"):
            if tuple(entry[moment].shape) != shape:
                raise ValueError(
                    f"{moment} of {name} has shape {tuple(entry[moment].shape)}, the parameter has {shape}: "
                    "the optimiser's parameters are in another order, or of another adapter"
                )
        moments[name] = Moments(entry["exp_avg"], entry["exp_avg_sq"])
        steps.add(int(entry["step"]))
    if len(steps) != 1:
        raise ValueError(f"the optimiser's parameters took different numbers of steps: {sorted(steps)}")
    settings = {(tuple(group["betas"]), group["eps"]) for group in groups if group["params"]}
    if len(settings) != 1:
        raise ValueError("the optimiser's parameter groups differ in betas or eps")
    betas, eps = settings.pop()
    return OptimizerMoments(moments, steps.pop(), (float(betas[0]), float(betas[1])), float(eps))


def moments_from_trainer_checkpoint(
    folder: str | Path, parameter_shapes: Mapping[str, tuple[int, ...]], names: Sequence[str] | None = None
) -> OptimizerMoments:
    """Reads `optimizer.pt` of a Hugging Face Trainer checkpoint (`weights_only`: tensors and plain values).

    The file holds no parameter names. The Trainer orders trainable parameters as the model does, those with
    weight decay first; LoRA matrices all have it, so the model's order is right unless something else was
    trained too. Raises FileNotFoundError and ValueError, as `moments_from_optimizer_state`.
    """
    path = Path(folder) / "optimizer.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: was the checkpoint saved with save_only_model?")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return moments_from_optimizer_state(state, parameter_shapes, names)


def canonical_name(name: str) -> str:
    """`...lora_A.default.weight` -> `...lora_A.weight`; a canonical name is returned as it is."""
    head, dot, tail = name.rpartition(".lora_")
    parts = tail.split(".")
    if not dot or len(parts) <= 2:
        return name
    return f"{head}.lora_{parts[0]}.{parts[-1]}"
