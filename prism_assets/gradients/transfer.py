"""To a GPU and back without waiting for what else it does. On a CPU nothing is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Result = TypeVar("Result")


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor there. It is copied from pinned memory; a plain `.to` would wait for the work queued
    before it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """Copies of tensors on the host. From a GPU they start after the work that makes them and are waited for when
    they are read; a plain `.cpu()` would also wait for everything that was queued in between."""

    def __init__(self, *tensors: Tensor) -> None:
        self._ready = None
        if tensors[0].is_cuda:
            host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
            self._tensors = [to.copy_(one, non_blocking=True) for to, one in zip(host, tensors, strict=True)]
            self._ready = torch.cuda.current_stream(tensors[0].device).record_event()
        else:
            self._tensors = [one.cpu() for one in tensors]

    def arrays(self) -> list[np.ndarray]:
        """What was copied."""
        if self._ready is not None:
            self._ready.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def a_batch_late(results: Iterable[Result]) -> Iterator[Result]:
    """Yields each batch's result when the next one has been queued, so that a GPU has work while what came before is
    read (a `HostCopy`, which waits for its own batch alone)."""
    waiting: list[Result] = []
    for result in results:
        yield from waiting
        waiting = [result]
    yield from waiting
