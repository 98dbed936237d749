"""RMS norms with a frozen weight, forward and backward in a few passes over the activations.

    y = w x r,  r = (mean(x^2) + eps)^(-1/2)        dx = r (u - x r mean(u x r)),  u = w dy

Modelling code spells the forward pass out in seven elementwise steps and leaves the backward pass to autograd, which
costs as much as a small matrix product; what is kept for the backward pass here is x and one number a token.
As there, the root is taken in float32 at least. A module counts as such a norm if it is called one, holds one
weight, and gives the same result on a random input; any other (Gemma's 1 + w) runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from prism_assets.features.last_layer import replaced_forward


def find_rms_norms(model: nn.Module) -> list[nn.Module]:
    """The model's RMS norms of the form above."""
    return [module for module in model.modules() if _is_rms_norm(module)]


@contextmanager
def fused(norms: list[nn.Module]) -> Iterator[None]:
    """Within the context these norms run as described above; their weights must not require grad."""
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(replaced_forward(norm, _forward_of(norm)))
        yield


def _forward_of(norm: nn.Module):
    return lambda inputs: _RMSNorm.apply(inputs, norm.weight, _eps(norm))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        root = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=dtype)
        inverse = root.square_().div_(inputs.shape[-1]).add_(eps).rsqrt_()  # r [..., 1]
        ctx.save_for_backward(inputs, weight, inverse)
        return (inputs * inverse).to(inputs.dtype) * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        inputs, weight, inverse = ctx.saved_tensors
        # Where the square overflowed r is zero, and a finite gradient would hide it: autograd's is not finite.
        inverse = inverse.masked_fill(inverse == 0, torch.nan)
        scaled = (gradient * weight).to(inverse.dtype)  # u
        normed = inputs * inverse  # x r
        mean = torch.linalg.vecdot(scaled, normed).div_(inputs.shape[-1]).unsqueeze(-1)
        return scaled.addcmul_(normed, mean, value=-1).mul_(inverse).to(inputs.dtype), None, None


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or _eps(module) is None:
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"] or module.weight.dim() != 1:
        return False
    weight, eps = module.weight, _eps(module)
    inputs = torch.randn(4, 1, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[2:] *= eps**0.5  # where eps weighs as much as the mean square
    inputs = inputs.to(weight.device, weight.dtype)
    expected, found = module(inputs), _RMSNorm.apply(inputs, weight, eps)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    error = (found - expected).double().norm(dim=-1)
    return bool((error <= 8 * torch.finfo(weight.dtype).eps * expected.double().norm(dim=-1)).all())
