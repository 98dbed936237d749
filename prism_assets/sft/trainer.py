"""Supervised fine-tuning of LoRA parameters on completion tokens, with the transformers Trainer.

The warm-up and the fine-tunings are this one function. The gradient of a step comes from the gradient engine: the
loss is

    L = -(1/n) sum_j n_j s_j        n_j: supervised tokens of example j, n their sum, s_j its mean log-probability

so grad L is a weighted gradient with w_j = -n_j / n, formed at supervised positions only, in micro-batches that fit the
memory, equal to that of the whole batch up to rounding. What the Trainer would write to disk (checkpoints, pickled
optimiser states) is captured in memory instead, by parameter name.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, Trainer, TrainingArguments, get_scheduler

from prism_assets.compat import TrainSampler, use_one_device
from prism_assets.errors import StageError, UnsuitableSetting
from prism_assets.gradients.batching import Tokenized
from prism_assets.gradients.engine import GradientEngine
from prism_assets.sft.checkpoints import (
    Checkpoint,
    OnStep,
    Recorder,
    checkpoint_steps,
    trainable_lora_names,
)


@dataclass(frozen=True)
class Training:
    """How parameters are trained: AdamW, with the names of the settings `training` and `warmup`."""

    epochs: float = 3.0
    steps: int | None = None  # in place of epochs
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    scheduler: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def number_of_steps(self, examples: int) -> int:
        """Optimiser steps over so many examples; the last step of an epoch may be a smaller one.

        Raises ValueError where there would be none.
        """
        batch, accumulation = self.batch_size, self.gradient_accumulation
        if batch < 1 or accumulation < 1:
            raise ValueError(f"batch_size ({batch}) and gradient_accumulation ({accumulation}) must be at least 1")
        per_epoch = math.ceil(math.ceil(examples / batch) / accumulation)
        steps = math.ceil(self.epochs * per_epoch) if self.steps is None else self.steps
        if steps < 1:
            raise UnsuitableSetting(f"nothing to train: {self.epochs} epochs, steps {self.steps} give {steps} steps")
        return steps


class Tracking(NamedTuple):
    """Trackers of the Trainer (tensorboard, mlflow, wandb), which get loss and learning rate of every step."""

    report_to: Sequence[str] = ()
    folder: Path | None = None  # of TensorBoard's event files
    run_name: str | None = None


class TrainingResult(NamedTuple):
    steps: int
    losses: list[float]  # per step: mean negative log-probability of its supervised tokens
    learning_rates: list[float]  # per step, the one that the step used
    checkpoints: list[Checkpoint]  # in order of steps; the last one is the end of training
    completion_tokens: int  # supervised tokens trained on, counted each time that they were
    seconds: float


def fine_tune(
    engine: GradientEngine,
    examples: Sequence[Tokenized],
    training: Training,
    *,
    seed: int,
    checkpoints: int = 1,
    tracking: Tracking | None = None,
    progress: OnStep | None = None,
) -> TrainingResult:
    """Train the LoRA parameters of the engine's model in place, on the device that it is on.

    A step's loss is the mean over all supervised tokens of its `batch_size * gradient_accumulation`
    examples, so neither padding nor accumulation nor micro-batches change it. The order of the data is a function of
    `seed` and of the order of `examples` (`epoch_order`). Dropout is drawn anew for each micro-batch. The model's
    train/eval mode and its `use_cache` are as before when this returns.

    Raises ValueError for examples or settings that cannot be trained on, MemoryError for an example that does not fit,
    FloatingPointError, naming the step, for a loss or parameters that are not finite, StageError for a training that
    left every parameter as it was.
    """
    _check_examples(examples)
    model = engine.model
    names = trainable_lora_names(model)
    steps = training.number_of_steps(len(examples))
    recorder = Recorder(model, names, checkpoint_steps(steps, checkpoints), progress)
    tracking = tracking or Tracking()
    start = {name: parameter.detach().clone() for name, parameter in names.items()}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _training_state(model), _tensorboard_folder(tracking.folder):
        arguments = TrainingArguments(
            output_dir=folder,
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            log_level="error",
            report_to=list(tracking.report_to) or "none",
            logging_strategy="steps" if tracking.report_to else "no",
            logging_steps=1,
            run_name=tracking.run_name,
            seed=seed,
            data_seed=seed,
            max_steps=steps,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            optim="adamw_torch",
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            lr_scheduler_type=training.scheduler,
            warmup_steps=math.ceil(training.warmup_ratio * steps),
            use_cpu=engine.device.type == "cpu",
            remove_unused_columns=False,
            average_tokens_across_devices=False,
        )
        use_one_device(arguments)
        trainer = _SftTrainer(
            model=model,
            args=arguments,
            train_dataset=cast("Any", range(len(examples))),  # positions do for a data set
            data_collator=lambda batch: {"positions": torch.tensor(batch)},
            callbacks=[recorder],
        )
        trainer.prepare(engine, examples, recorder, seed=seed)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if all(torch.equal(start[name], parameter.detach()) for name, parameter in names.items()):
        raise StageError(
            f"Training changed nothing: after {steps} steps with learning rates up to {max(recorder.learning_rates):g} "
            "every parameter is what it was. Raise the learning rate; where it is not tiny, look for gradients of zero."
        )
    return TrainingResult(
        recorder.step,
        recorder.losses,
        recorder.learning_rates,
        recorder.checkpoints,
        trainer.tokens,
        time.perf_counter() - started,
    )


def epoch_order(number: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` (from 0) visits the examples: a permutation keyed by (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(number).tolist()


class _SftTrainer(TrainSampler, Trainer):
    """The Trainer with our order of data and the engine's gradients; batches are positions of examples."""

    def prepare(self, engine: GradientEngine, examples: Sequence[Tokenized], recorder: Recorder, *, seed: int) -> None:
        self._engine, self._examples, self._recorder, self._seed = engine, examples, recorder, seed
        self._names = {name: parameter for name, parameter in engine.parameters.items()}
        self._tokens = np.array([int(np.count_nonzero(example.loss_mask)) for example in examples])
        self.tokens = 0  # supervised ones trained on

    def train_sampler(self) -> _EpochSampler:
        return _EpochSampler(len(self._examples), self._seed)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As the Trainer's, but for the first step: its warm-up begins at a learning rate of zero, where a step does
        nothing, and a training of one step trains nothing. Ours rises through 1/(w+1), 2/(w+1), … to the full rate."""
        if self.lr_scheduler is None:
            optimizer = cast("torch.optim.Optimizer", optimizer or self.optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            other = torch.optim.SGD(
                [torch.nn.Parameter(torch.zeros(1))]
            )  # a schedule sets its optimiser's rate at once
            whole = get_scheduler(self.args.lr_scheduler_type, other, warmup, num_training_steps)
            (factor,) = cast("LambdaLR", whole).lr_lambdas
            rates = LambdaLR(optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else factor(step))
            self.lr_scheduler = rates
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *_: Any) -> tuple[list, int]:
        """The micro-batches of a step, and the number of their supervised tokens."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, sum(int(self._tokens[batch["positions"].cpu().numpy()].sum()) for batch in batches)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not model.training:  # to set it walks over all modules
            model.train()
        positions = inputs["positions"].cpu().numpy()
        tokens = self._tokens[positions]
        weights = -tokens / num_items_in_batch
        found = self._engine.weighted_gradient([self._examples[one] for one in positions], weights, training=True)
        for name, parameter in self._names.items():
            gradient = found.gradient[name].to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.tokens += int(tokens.sum())
        loss = float(weights @ found.mean_log_probs)
        self._recorder.add_loss(loss)
        return torch.tensor(loss, device=self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the count walks over all parameters at every step, and nobody reads it


class _EpochSampler(torch.utils.data.Sampler[int]):
    """`epoch_order`, one epoch after another."""

    def __init__(self, number: int, seed: int):
        self._number, self._seed, self._epoch = number, seed, 0

    def __len__(self) -> int:
        return self._number

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self._number, self._seed, self._epoch)


@contextlib.contextmanager
def _tensorboard_folder(folder: Path | None) -> Iterator[None]:
    """TensorBoard's event files go to `folder`; the Trainer's own place for them is deleted with its output."""
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if folder is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before
        elif folder is not None:
            os.environ.pop("TENSORBOARD_LOGGING_DIR", None)


@contextlib.contextmanager
def _training_state(model: PeftModel) -> Iterator[None]:
    """Train without a key-value cache; afterwards the model is in the mode that it was in.

    The Trainer starts with a full garbage collection: 0.3 s with torch and transformers loaded, more than
    all the rest of its start. What exists already is put out of the collector's sight meanwhile.
    """
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    if use_cache is not None:
        model.config.use_cache = False
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache


def _check_examples(examples: Sequence[Tokenized]) -> None:
    if len(examples) == 0:
        raise ValueError("no examples to train on")
    for position, example in enumerate(examples):
        mask = np.asarray(example.loss_mask)
        if len(mask) != len(example.input_ids):
            raise ValueError(f"example {position}: {len(example.input_ids)} tokens but {len(mask)} in its loss mask")
        if not mask.any():
            raise ValueError(f"example {position} has no supervised token; reject it before training")
        if mask[0]:
            raise ValueError(f"example {position}: its first token is supervised, but nothing predicts it")
