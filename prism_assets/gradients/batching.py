"""Batches of examples sorted by length under a token budget, and where their supervised tokens lie.

Padding is on the right, so under causal attention no real token ever sees it: batches need no attention
mask, and no result depends on what else is in the batch (up to the rounding of larger matrix products).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from prism_assets.gradients.transfer import to_device

TOKEN_BUDGET_CPU = 512  # padded tokens: a layer's activations stay in the cache, and little is padded
TOKEN_BUDGET_GPU = 32768
OnBatch = Callable[[int, int], None]  # called with (examples done, examples in all) after each batch


class Tokenized(Protocol):
    """What a gradient pass needs: `prism_assets.corpus.encoder.TokenizedExample` has it."""

    @property
    def input_ids(self) -> np.ndarray: ...  # int [T]
    @property
    def loss_mask(self) -> np.ndarray: ...  # bool [T], True where the token is supervised; never at position 0


class Batch(NamedTuple):
    """b examples as tensors. N is the number of their supervised tokens, ordered by example and position."""

    positions: list[int]  # [b] each example's index in the sequence that the batch came from
    input_ids: Tensor  # int64 [b, T]; tokens that no supervised token depends on are left out
    source: Tensor  # int64 [N] index into the flattened [b * T] of the position that predicts the token
    targets: Tensor  # int64 [N] the token
    rows: Tensor  # int64 [N] its example, 0..b-1
    columns: Tensor  # int64 [N] its rank among the example's supervised tokens
    counts: Tensor  # float64 [b] supervised tokens of each example
    most_supervised: int  # the largest of the counts (known here, so that no GPU need be asked)


def default_token_budget(device: torch.device) -> int:
    """Padded tokens of a batch where no setting says otherwise."""
    return TOKEN_BUDGET_GPU if device.type == "cuda" else TOKEN_BUDGET_CPU


def check_examples(examples: Sequence[Tokenized], vocabulary: int, longest: int | None) -> None:
    """Raises ValueError, naming the example's index, for one that has no log-probability under this model."""
    for index, example in enumerate(examples):
        ids, mask = np.asarray(example.input_ids), np.asarray(example.loss_mask, dtype=bool)
        if ids.ndim != 1 or ids.shape != mask.shape:
            raise ValueError(f"example {index}: input_ids {ids.shape} and loss_mask {mask.shape} must be one length")
        if not mask.any():
            raise ValueError(f"example {index} has no supervised token: its completion is empty or wholly truncated")
        if mask[0]:
            raise ValueError(f"example {index}: its first token is supervised, but nothing precedes it")
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(f"example {index} has a token id outside the model's vocabulary of {vocabulary}")
        if longest is not None and len(ids) > longest:
            raise ValueError(f"example {index} has {len(ids)} tokens, the model takes {longest}: truncate it")


def tokens_read(example: Tokenized) -> int:
    """Tokens that the model must read: all before the last supervised one."""
    return int(np.flatnonzero(example.loss_mask)[-1])


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups example indices by length, longest first, so that b * T stays within the budget (or b = 1).

    A function of the lengths alone; equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def build_batch(examples: Sequence[Tokenized], positions: list[int], device: torch.device) -> Batch:
    """The examples at these positions as one right-padded batch on the device."""
    chosen = [examples[position] for position in positions]
    supervised = [np.flatnonzero(example.loss_mask) for example in chosen]
    width = max(int(where[-1]) for where in supervised)
    input_ids = np.empty((len(chosen), width), dtype=np.int64)
    for row, (example, where) in enumerate(zip(chosen, supervised, strict=True)):
        length = int(where[-1])
        input_ids[row, :length] = example.input_ids[:length]
        # Any token would do; one of the example's own keeps activations in the range of real text.
        input_ids[row, length:] = example.input_ids[length - 1]
    counts = np.array([len(where) for where in supervised])
    source = np.concatenate([row * width + where - 1 for row, where in enumerate(supervised)])
    targets = np.concatenate([np.asarray(e.input_ids)[w] for e, w in zip(chosen, supervised, strict=True)])

    return Batch(
        positions=list(positions),
        input_ids=to_device(input_ids, device),
        source=to_device(source, device),
        targets=to_device(targets.astype(np.int64), device),
        rows=to_device(np.repeat(np.arange(len(chosen)), counts), device),
        columns=to_device(np.concatenate([np.arange(count) for count in counts]), device),
        counts=to_device(counts.astype(np.float64), device),
        most_supervised=int(counts.max()),
    )
