"""Supervised fine-tuning of LoRA parameters on completion tokens, with the transformers Trainer.

The warm-up and the fine-tunings are this one function. What the Trainer would write to disk (checkpoints,
pickled optimiser states) is captured in memory instead, by parameter name.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from prism_assets.compat import TrainSampler, use_one_device
from prism_assets.sft.checkpoints import (
    Checkpoint,
    Progress,
    Recorder,
    checkpoint_steps,
    trainable_lora_names,
)

IGNORED = -100  # label of a token that is not supervised


class Example(Protocol):
    """What training needs of an example (`corpus.encoder.TokenizedExample`)."""

    @property
    def input_ids(self) -> np.ndarray: ...  # int [T]
    @property
    def loss_mask(self) -> np.ndarray: ...  # bool [T], True where the token is supervised; never at position 0


class TrainingResult(NamedTuple):
    steps: int
    losses: list[float]  # per step: mean negative log-probability of its supervised tokens
    learning_rates: list[float]  # per step, the one that the step used
    checkpoints: list[Checkpoint]  # in order of steps; the last one is the end of training
    completion_tokens: int  # supervised tokens trained on, counted each time that they were
    seconds: float


def fine_tune(
    model: PeftModel,
    examples: Sequence[Example],
    *,
    seed: int,
    pad_token_id: int,
    epochs: float = 3.0,
    max_steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float = 2e-4,
    warmup_ratio: float = 0.03,
    scheduler: str = "linear",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    gradient_accumulation: int = 1,
    checkpoints: int = 1,
    report_to: Sequence[str] = (),
    tracking: Path | None = None,
    run_name: str | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train the LoRA parameters of `model` in place, on the device that it is on, with AdamW.

    A step's loss is the mean over all supervised tokens of its `batch_size * gradient_accumulation`
    examples, so neither padding nor accumulation changes it. The order of the data is a function of `seed`
    and of the order of `examples` (`epoch_order`). `max_steps` overrides `epochs`. The model's train/eval
    mode and its `use_cache` are as before when this returns.

    `report_to` names trackers of the Trainer (tensorboard, mlflow, wandb), which get loss and learning rate
    of every step under `run_name`; TensorBoard's event files go to the folder `tracking`.

    Raises ValueError for examples or settings that cannot be trained on, FloatingPointError, naming the
    step, for a loss or parameters that are not finite.
    """
    _check_examples(examples)
    names = trainable_lora_names(model)
    steps = number_of_steps(len(examples), epochs, max_steps, batch_size, gradient_accumulation)
    recorder = Recorder(model, names, checkpoint_steps(steps, checkpoints), progress)
    loss_of_batch = _TokenLoss()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _training_state(model), _tensorboard_folder(tracking):
        arguments = TrainingArguments(
            output_dir=folder,
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            log_level="error",
            report_to=list(report_to) or "none",
            logging_strategy="steps" if report_to else "no",
            logging_steps=1,
            run_name=run_name,
            seed=seed,
            data_seed=seed,
            max_steps=steps,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            optim="adamw_torch",
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            lr_scheduler_type=scheduler,
            warmup_steps=math.ceil(warmup_ratio * steps),
            use_cpu=_device(model).type == "cpu",
            dataloader_pin_memory=_device(model).type != "cpu",
            remove_unused_columns=False,
            average_tokens_across_devices=False,
        )
        use_one_device(arguments)
        trainer = _SftTrainer(
            model=model,
            args=arguments,
            train_dataset=cast("Any", list(examples)),  # a list does for a data set
            compute_loss_func=loss_of_batch,
            data_collator=lambda batch: collate(batch, pad_token_id),
            callbacks=[recorder],
        )
        trainer.prepare(recorder, seed=seed)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return TrainingResult(
        recorder.step,
        recorder.losses,
        recorder.learning_rates,
        recorder.checkpoints,
        loss_of_batch.tokens,
        time.perf_counter() - started,
    )


def collate(batch: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right: `input_ids`, `attention_mask` and `labels`, each int64 [batch, longest]."""
    shape = (len(batch), max(len(example.input_ids) for example in batch))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        tokens = torch.from_numpy(np.asarray(example.input_ids, dtype=np.int64))
        supervised = torch.from_numpy(np.asarray(example.loss_mask, dtype=bool))
        input_ids[row, :length] = tokens
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.where(supervised, tokens, IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def epoch_order(number: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` (from 0) visits the examples: a permutation keyed by (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(number).tolist()


def number_of_steps(
    number: int, epochs: float, max_steps: int | None, batch_size: int, gradient_accumulation: int
) -> int:
    """Optimiser steps of `epochs` over `number` examples; the last step of an epoch may be a smaller one."""
    if batch_size < 1 or gradient_accumulation < 1:
        raise ValueError(
            f"batch_size ({batch_size}) and gradient_accumulation ({gradient_accumulation}) must be at least 1"
        )
    per_epoch = math.ceil(math.ceil(number / batch_size) / gradient_accumulation)
    steps = math.ceil(epochs * per_epoch) if max_steps is None else max_steps
    if steps < 1:
        raise ValueError(f"nothing to train: {epochs} epochs, max_steps {max_steps} give {steps} steps")
    return steps


class _TokenLoss:
    """Sum of the supervised tokens' negative log-probabilities over the supervised tokens of the whole
    step.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        targets = labels[:, 1:]  # [b, T - 1]: the logits at t predict token t + 1
        supervised = targets != IGNORED
        self.tokens += int(supervised.sum())
        # [n, vocabulary]: only supervised positions are brought to float32
        logits = outputs.logits[:, :-1][supervised].float()
        return F.cross_entropy(logits, targets[supervised], reduction="sum") / num_items_in_batch


class _SftTrainer(TrainSampler, Trainer):
    """The Trainer with our order of data, and a loss that is looked at."""

    def prepare(self, recorder: Recorder, *, seed: int) -> None:
        self._recorder, self._seed = recorder, seed

    def train_sampler(self) -> _EpochSampler:
        return _EpochSampler(len(cast("list[Example]", self.train_dataset)), self._seed)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._recorder.add_loss(float(loss))
        return loss

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


def _check_examples(examples: Sequence[Example]) -> None:
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


def _device(model: PeftModel) -> torch.device:
    return next(model.parameters()).device


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills batches; it is masked everywhere, so EOS serves where the tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
