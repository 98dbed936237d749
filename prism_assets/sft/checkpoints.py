"""Checkpoints of a training, captured in memory by parameter name in place of files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import TrainerCallback

from prism_assets.errors import TrainingDiverged, UnsuitableSetting

OnStep = Callable[[int, int, float], None]  # (steps done, steps in all, loss of the last step)


class Checkpoint(NamedTuple):
    """The trained parameters and AdamW's moments after a step; tensors on the CPU, keyed by canonical name
    (the key of PEFT's `get_peft_model_state_dict`, adapter name removed).
    """

    step: int  # optimiser steps done
    mean_learning_rate: float  # over the steps since the previous checkpoint
    lora_state: dict[str, Tensor]
    exp_avg: dict[str, Tensor]  # first moment m of the *loss* gradient, not bias-corrected
    exp_avg_sq: dict[str, Tensor]  # second moment v, not bias-corrected
    optimizer_step: int  # t of the bias corrections 1 - beta^t
    betas: tuple[float, float]
    eps: float


def checkpoint_steps(steps: int, checkpoints: int) -> list[int]:
    """`checkpoints` evenly spaced positions among the steps 1..steps, the last step included."""
    if not 1 <= checkpoints <= steps:
        raise UnsuitableSetting(
            f"{checkpoints} checkpoints of {steps} training steps: ask for 1 to {steps}, or train longer "
            "(more epochs, more examples or a smaller batch)"
        )
    return [-(-i * steps // checkpoints) for i in range(1, checkpoints + 1)]


def trainable_lora_names(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Canonical name -> trainable parameter, in the order of PEFT's state dict.

    Raises ValueError where the model trains something that is no LoRA weight, or nothing at all.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"fine-tuning needs a model with LoRA (peft.PeftModel), not {type(model).__name__}")
    adapter = cast("str", model.active_adapter)
    names = {
        name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if foreign := sorted(set(names) - set(saved)) or sorted(name for name in names if ".lora_" not in name):
        raise ValueError(
            f"the model trains parameters that are no LoRA weights: {', '.join(foreign[:5])}; "
            "remove modules_to_save and biases from the LoRA settings"
        )
    if frozen := sorted(set(saved) - set(names)):
        raise ValueError(f"LoRA weights are frozen: {', '.join(frozen[:5])}; load the adapter with is_trainable=True")
    if not names:
        raise ValueError("the model has no LoRA weights to train")
    return {name: names[name] for name in saved}


class Recorder(TrainerCallback):
    """Losses and learning rates of every step, checkpoints at some, all in memory."""

    def __init__(
        self,
        model: PeftModel,
        names: dict[str, torch.nn.Parameter],
        at_steps: Sequence[int],
        progress: OnStep | None,
    ):
        self._model, self._names, self._at_steps, self._progress = model, names, at_steps, progress
        self._loss = 0.0
        self.step = 0
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.checkpoints: list[Checkpoint] = []

    def add_loss(self, loss: float) -> None:
        """A micro-batch's share of the step's loss."""
        if not math.isfinite(loss):
            rate = f" after a step with learning rate {self.learning_rates[-1]:g}" if self.learning_rates else ""
            raise TrainingDiverged(
                f"the loss of step {self.step + 1} of {self._at_steps[-1]} is {loss}{rate}: lower "
                "the learning rate, or look for examples or weights that are not finite"
            )
        self._loss += loss

    def on_pre_optimizer_step(self, args, state, control, optimizer: Any = None, **kwargs) -> None:
        """Record the learning rate of the step."""
        self.learning_rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args, state, control, optimizer: Any = None, **kwargs) -> None:
        """Record the loss of the step, and a checkpoint where one is due."""
        self.step = state.global_step
        self.losses.append(self._loss)
        self._loss = 0.0
        if self.step in self._at_steps:
            self.checkpoints.append(self._checkpoint(getattr(optimizer, "optimizer", optimizer)))
        if self._progress is not None:
            self._progress(self.step, self._at_steps[-1], self.losses[-1])

    def _checkpoint(self, optimizer: torch.optim.Optimizer) -> Checkpoint:
        for name, parameter in self._names.items():
            if not torch.isfinite(parameter).all():
                raise TrainingDiverged(
                    f"{name} is not finite after step {self.step} of {self._at_steps[-1]}: lower the learning rate"
                )
        since = self.checkpoints[-1].step if self.checkpoints else 0
        rates = self.learning_rates[since:]
        states = {name: optimizer.state[parameter] for name, parameter in self._names.items()}
        group = optimizer.param_groups[0]
        return Checkpoint(
            step=self.step,
            mean_learning_rate=math.fsum(rates) / len(rates),
            lora_state=_copies(self._names),
            exp_avg=_copies({name: state["exp_avg"] for name, state in states.items()}),
            exp_avg_sq=_copies({name: state["exp_avg_sq"] for name, state in states.items()}),
            optimizer_step=int(next(iter(states.values()))["step"]),
            betas=tuple(group["betas"]),
            eps=float(group["eps"]),
        )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
