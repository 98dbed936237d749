"""How much memory a pass needs and how much there is, and what is done where that is less.

A backward pass over b examples of T tokens needs what the forward pass keeps for it. That is measured once a model,
on two short passes of different lengths (`measure_activations`), and grows as

    b T (per_token + per_pair T)        per_pair: attention weights, where the model's attention keeps them

Before each batch the need is compared with what is free (`MemoryLimit`): a batch that does not fit is halved; an
example that does not fit alone has its decoder layers recompute their activations in the backward pass. What still
runs out of memory, on a GPU or where the host limits the process, is halved and recomputed in the same order.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prism_assets.gradients.last_layer import replaced_forward

MARGIN = 0.1  # share of the free memory that is left to others
# Beside what is kept, as a share of what a pass without recomputation keeps: gradients and temporaries of the layer
# that the backward pass is at, and freed blocks that the allocator neither reuses nor gives back. On a host with glibc
# the resident memory of SmolLM2-135M grew by 0.33 and, recomputing, by 0.45 of it (512 and 1,024 tokens).
OVERHEAD = 0.45
FIXED_BYTES = 64 * 2**20  # chunks of logits, one layer's products
# A pass that needs more than this takes seconds on a host, beside which trimming the heap costs nothing.
TRIMMED_BYTES = 256 * 2**20
PROBED_WIDTHS = (16, 48)  # tokens
_LOOK_EVERY_SECONDS = 1.0


class Activations(NamedTuple):
    """What a forward pass keeps for its backward pass, in bytes."""

    per_token: float
    per_pair: float  # of two tokens of one example
    per_layer_input: float  # of one token: all that a recomputed layer keeps
    layers: int  # decoder layers that can be recomputed; 0 where the model has none that can
    product: int = 0  # of the largest weight that a product makes of its codes: a quantised layer's

    def needed(self, examples: int, width: int, recompute: bool) -> float:
        """Peak bytes of a backward pass over so many examples of `width` tokens, beside model and results."""
        kept = examples * width * (self.per_token + self.per_pair * width)
        overhead = OVERHEAD * kept + FIXED_BYTES
        if recompute and self.layers:
            kept = examples * width * self.per_layer_input * self.layers
        return kept + overhead + self.product


def measure_activations(
    modules: list[nn.Module], weights: list[nn.Parameter], longest: int | None, forward: Callable[[int], Tensor]
) -> Activations:
    """Counts the bytes that autograd keeps of `forward(width)`, a pass over one example of `width` tokens (`longest` at
    most)."""
    short, long = PROBED_WIDTHS if longest is None or longest > max(PROBED_WIDTHS) else (1, longest - 1)
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    inputs: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(_bytes(args[0]) if args else 0))
        for layer in layers[:1]
    ]
    known = {weight.untyped_storage().data_ptr() for weight in weights if type(weight.data) is Tensor}
    try:
        kept = [_kept_bytes(lambda w=width: forward(w), known) for width in (short, long)]
    finally:
        for hook in hooks:
            hook.remove()
    per_pair = max(0.0, (kept[1] / long - kept[0] / short) / (long - short))
    per_token = kept[1] / long - per_pair * long
    return Activations(per_token, per_pair, inputs[-1] / long if inputs else 0.0, len(layers))


def _kept_bytes(run: Callable[[], Tensor], known: set[int]) -> int:
    """Bytes of the storages that autograd saves while `run` computes, those that begin at a `known` address left
    out."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        try:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except RuntimeError:  # a tensor subclass without memory of its own
            address, size = id(tensor), _bytes(tensor)
        if address not in known:
            kept[address] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = run()
    del result  # alive until here, so that no address is given out twice
    return sum(kept.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class MemoryLimit:
    """What may still be taken on a device.

    limit: bytes that this process may hold there, or None for as much as is free. A tenth of what is free is always
    left.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.device, self.limit = device, limit
        self._looked, self._found = -math.inf, 0

    def free(self) -> int:
        """Bytes."""
        free, own = (_on_gpu if self.device.type == "cuda" else _on_host)(self.device)
        free = int(free * (1 - MARGIN))
        return free if self.limit is None else min(free, self.limit - own)

    def fits(self, needed: float) -> bool:
        """Whether so many bytes are free. Far smaller needs than were free a moment ago cost no second look."""
        if time.monotonic() - self._looked < _LOOK_EVERY_SECONDS and needed < self._found / 4:
            return True
        self._looked, self._found = time.monotonic(), self.free()
        if needed <= self._found:
            return True
        release_memory(self.device)  # what was freed in this process may not have been given back yet
        self._found = self.free()
        return needed <= self._found


def _on_gpu(device: torch.device) -> tuple[int, int]:
    """Bytes that can be taken, and that this process holds."""
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return free + torch.cuda.memory_reserved(device) - held, held


def _on_host(_: torch.device) -> tuple[int, int]:
    """Bytes that can be taken, control groups (containers) heeded, and that this process holds."""
    return min(psutil.virtual_memory().available, *_control_groups()), psutil.Process().memory_info().rss


def _control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the memory limits of this process's control groups leave, in bytes; at least one figure."""
    left = [sys.maxsize]
    try:
        paths = [line.split(":", 2)[2].lstrip("/") for line in own.read_text().splitlines() if line.startswith("0::")]
    except OSError:  # no Linux
        return left
    for path in paths:
        for folder in (root / path, *(root / path).parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                left.append(int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    try:  # version 1
        limit = int((root / "memory/memory.limit_in_bytes").read_text())
        left.append(limit - int((root / "memory/memory.usage_in_bytes").read_text()))
    except OSError:
        pass
    return left


@contextmanager
def recomputed(modules: list[nn.Module]) -> Iterator[None]:
    """Decoder layers recompute their activations in the backward pass (transformers itself does so in
    training only)."""
    with ExitStack() as stack:
        for layer in modules:
            if isinstance(layer, GradientCheckpointingLayer):
                stack.enter_context(replaced_forward(layer, _recomputing(layer)))
        yield


def _recomputing(layer: nn.Module) -> Callable:
    """A forward that keeps its inputs alone where gradients are asked for, and runs again in the backward pass."""
    forward = layer.forward

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Only dropout draws random numbers, and only in training mode.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=layer.training, **kwargs)

    return run


def halves(positions: list[int]) -> list[list[int]]:
    """Two halves, the first one last (it is popped next)."""
    middle = (len(positions) + 1) // 2
    return [positions[middle:], positions[:middle]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host (torch's allocator raises a plain RuntimeError there)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def release_memory(device: torch.device) -> None:
    """Gives back what is no longer used: tensors in reference cycles, torch's cache on a GPU, the allocator's on
    Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Gives what the C library holds freed back to the system, on Linux with glibc: without it the resident memory
    grows with every pass of another shape. For a gigabyte that costs about a tenth of a second, and as much again when
    it is next used."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:  # another C library than glibc
            pass
