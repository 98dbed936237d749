"""Bases whose linear layers bitsandbytes has quantised: NF4 (QLoRA), FP4 in checkpoints, and int8.

A quantised layer holds the codes of a weight W, from which W' is made whenever it is needed,

    4 bits   W'_i = table[code_i] · absmax of the block of i        blocks of 64, absmax quantised once more
    int8     W'_ij = code_ij · absmax_i / 127                       a scale for every row

and computes y = W' x + b in the type of x. That is one function, the same in training, evaluation and generation, whose
derivative by x is exact. bitsandbytes has others: its int8 product rounds x too, by columns that depend on the whole
batch, so that a row's result would depend on its neighbours; its 4-bit product on CPUs with AVX512-BF16 packs the codes
anew and rounds x to bfloat16, and has no derivative there. So the layers get a `forward` of ours when they are loaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_assets.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def settle(model: PreTrainedModel) -> None:
    """Have every quantised layer of a loaded model compute as the module's docstring says. Raises ModelError, naming
    the layer, where a layer's codes are not there."""
    for name, module in _layers(model):
        if not _has_codes(module):
            raise ModelError(
                f"model.name: {name} of {model.name_or_path} is a {type(module).__name__} without quantised weights: "
                "its files are those of another quantisation than config.json says."
            )
        module.forward = partial(_forward, module)


def is_settled(module: nn.Module) -> bool:
    """Whether a quantised layer computes as the module's docstring says."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear layers."""
    library: Any = sys.modules.get("bitsandbytes")  # where nobody has imported it there is none
    return library is not None and isinstance(module, (library.nn.Linear4bit, library.nn.Linear8bitLt))


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a quantised layer, whose weight is packed."""
    layer = cast("nn.Linear", module)
    return layer.out_features, layer.in_features


def dequantized(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """W' of a quantised layer, [out, in], made anew. Raises UnsupportedModelError where there are no codes."""
    library: Any = sys.modules["bitsandbytes"]
    weight = cast("Any", module.weight)
    if not _has_codes(module):
        raise UnsupportedModelError(f"a {type(module).__name__} has no quantised weights: load the model on a device")
    if isinstance(module, library.nn.Linear4bit):
        return _dequantized_4bit(library, weight.data, weight.quant_state).to(dtype)
    scales = (_scales(module) / 127)[:, None]
    return weight.data.to(dtype).mul_(scales) if dtype.itemsize == 4 else weight.data.float().mul_(scales).to(dtype)


def _dequantized_4bit(library: Any, codes: Tensor, state: Any) -> Tensor:
    """As one row: on CPUs with AVX512 bitsandbytes 0.50 begins a block with every row, though the blocks that it made
    go on from row to row, so that rows which are no multiple of a block come out wrong."""
    as_a_row = copy(state)
    as_a_row.shape = torch.Size([math.prod(state.shape)])
    return library.functional.dequantize_4bit(codes, as_a_row).view(state.shape)


def quantized_weights(model: nn.Module) -> set[int]:
    """The `id` of every parameter that holds codes, whatever type they are stored in."""
    return {id(module.weight) for _, module in _layers(model)}


def largest(model: nn.Module) -> int:
    """Elements of the largest W'; 0 where nothing is quantised."""
    return max((out * size for out, size in (shape_of(module) for _, module in _layers(model))), default=0)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the scales, which are no parameters."""
    total = 0
    for _, module in _layers(model):
        state = getattr(module.weight, "quant_state", None)
        inner = getattr(state, "state2", None)
        parts = [getattr(state, "absmax", None), getattr(inner, "absmax", None)] if state else [_scales(module)]
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def _has_codes(module: nn.Module) -> bool:
    weight = cast("Any", module.weight)
    if hasattr(weight, "quant_state"):
        return weight.quant_state is not None
    return weight.dtype == torch.int8 and _scales(module) is not None


def _scales(module: nn.Module) -> Any:
    """The absmax of every row, float32 [out]; bitsandbytes keeps it with the weight until its own first product."""
    found = getattr(module.weight, "SCB", None)
    return found if found is not None else getattr(getattr(module, "state", None), "SCB", None)


def _forward(module: nn.Module, inputs: Tensor) -> Tensor:
    bias = cast("Tensor | None", module.bias)
    return cast("Tensor", _Product.apply(inputs, bias if bias is None else bias.to(inputs.dtype), module))


class _Product(torch.autograd.Function):
    """W' x + b. W' is made again in the backward pass: kept, it would undo what quantisation saves."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        ctx.module = module
        return F.linear(inputs, dequantized(module, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ dequantized(ctx.module, gradient.dtype), None, None
