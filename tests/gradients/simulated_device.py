"""An accelerator without hardware: tensors that say they lie on the device `sim` and are computed on the CPU.

As on a GPU, an operation on tensors of both sides raises, and a value can be had on the host only by waiting for the
device; such waits are recorded with the operation that asked for them.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    """`torch.sim`; gradient checkpointing asks it for the types of mixed precision."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("sim", _Module())
SIM = torch.device("sim", 0)
aten = torch.ops.aten
# Operations whose result, or its shape, depends on values: CUDA makes the host wait for them.
WAITING = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
WITH_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class SimTensor(torch.Tensor):
    """Holds `host`, the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device=SIM, requires_grad=False,
        )  # fmt: skip

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def __repr__(self) -> str:
        return f"SimTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, [])


class Simulation(TorchDispatchMode):
    """Sees to tensors that are made on the device, and records the waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.waits)


@contextmanager
def simulated():
    """Within the context tensors can be made on `SIM` and moved there; yields the list of waits."""
    with torch.autograd.set_multithreading_enabled(False), Simulation() as simulation:
        yield simulation.waits


def _run(func, args, kwargs, waits: list[str]):
    flat, tree = tree_flatten((args, kwargs))
    on_device = [one for one in flat if isinstance(one, SimTensor)]
    target = kwargs.get("device")
    to_device = target is not None and torch.device(target).type == "sim"
    if not on_device and not to_device:
        return func(*args, **kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # the form in plain operations; the kernels ask for a real device
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if on_device and not moves:
        for one in flat:
            if isinstance(one, torch.Tensor) and not isinstance(one, SimTensor) and one.dim() > 0:
                raise RuntimeError(f"{func}: expected all tensors on one device, found one on sim and one on the CPU")
    if _waits(func, args, kwargs):
        waits.append(str(func))
    args, kwargs = tree_unflatten([one.host if isinstance(one, SimTensor) else one for one in flat], tree)
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if moves and target is not None and not to_device:
        return result  # back on the host
    if func is aten.copy_.default and not isinstance(flat[0], SimTensor):
        return flat[0]
    originals = {id(one.host): one for one in on_device}  # of operations in place

    def wrapped(one):
        return originals.get(id(one), SimTensor(one)) if isinstance(one, torch.Tensor) else one

    return tree_map(wrapped, result)


def _waits(func, args, kwargs) -> bool:
    if func in WAITING:
        return True
    if func in WITH_INDICES:  # a mask as an index is made numbers first, whose count must be known
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if func is aten._to_copy.default and isinstance(args[0], SimTensor):
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "cpu"
    return func is aten.copy_.default and isinstance(args[0], SimTensor) != isinstance(args[1], SimTensor)
