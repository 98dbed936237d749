"""Vectors over all LoRA parameters: a mapping from canonical parameter name to a tensor of the parameter's shape."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Vector = Mapping[str, "torch.Tensor"]


def norm(vector: Vector) -> float:
    """Euclidean norm over all parameters, accumulated in float64."""
    return float(sum(float(tensor.double().square().sum()) for tensor in vector.values()) ** 0.5)


def inner(left: Vector, right: Vector) -> float:
    """Inner product over all parameters, accumulated in float64 where `left` is."""
    products = ((value.double() * right[name].to(value.device).double()).sum() for name, value in left.items())
    return float(sum(map(float, products)))
