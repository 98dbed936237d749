"""What the engine does when memory runs short: recomputation of activations, halving of batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prism_assets.gradients.last_layer import replaced_forward


@contextmanager
def checkpointed(modules: list[nn.Module]) -> Iterator[None]:
    """Decoder layers recompute their activations in the backward pass (transformers itself does so in
    training only)."""
    with ExitStack() as stack:
        for layer in modules:
            if isinstance(layer, GradientCheckpointingLayer):
                stack.enter_context(replaced_forward(layer, recomputing(layer.forward)))
        yield


def recomputing(forward: Callable) -> Callable:
    """A forward that keeps its inputs alone where gradients are asked for, and runs again in the backward pass."""

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def halves(positions: list[int]) -> list[list[int]]:
    """Two halves, the first one last (it is popped next)."""
    middle = (len(positions) + 1) // 2
    return [positions[middle:], positions[:middle]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host (torch's allocator raises a plain RuntimeError there)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def release_memory(device: torch.device) -> None:
    """Gives back what a failed batch left: tensors in reference cycles, and torch's cache on a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
