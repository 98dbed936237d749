"""What becomes of one layer's gradients while the backward pass is at that layer.

Each collector forms the gradients of A and B of every example from what `lora` reports, and sketches, stacks
or sums them. A collector serves one batch.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from prism_assets.gradients.batching import Batch
from prism_assets.gradients.lora import AdaptedLinear
from prism_assets.gradients.preconditioner import Preconditioner
from prism_assets.gradients.sketch import Projection


class Collector:
    """Forms a layer's gradients from what the backward pass reports, and passes them to `receive`.

    at_supervised: the layers that see the batch's supervised positions only, as [1, N, features].
    """

    def __init__(self, batch: Batch, dtype: torch.dtype, at_supervised: Set[AdaptedLinear]) -> None:
        self.batch = batch
        self.dtype = dtype
        self.at_supervised = at_supervised
        self.inverse_counts = batch.counts.reciprocal().to(dtype)[:, None, None]

    def collect(self, layer: AdaptedLinear, inputs: Tensor, down: Tensor, output_gradient: Tensor, up: Tensor) -> None:
        """Pass the gradients of the layer's A and B to `receive`; shapes as in `lora.GradientCollector`."""
        if layer in self.at_supervised:
            inputs, down, output_gradient, up = map(self._pad, (inputs, down, output_gradient, up))
        self.receive(layer.name_a, self.outer(up, inputs))
        # Formed transposed because a product with few rows is faster than one with few columns.
        self.receive(layer.name_b, self.outer(down, output_gradient).transpose(1, 2))

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """sum_t left_bt right_bt^T: [b, T, p], [b, T, q] -> [b, p, q], accumulated in the engine's dtype."""
        return _batched_product(left.transpose(1, 2), right, self.dtype)

    def receive(self, name: str, gradients: Tensor) -> None:
        """Take n·g of one parameter for each example, [b, *shape]: the gradients of sums over n supervised tokens."""
        raise NotImplementedError

    def _pad(self, values: Tensor) -> Tensor:
        """[1, N, d] at the supervised positions -> [b, most, d], an example a row, zeros after its last."""
        batch = self.batch
        padded = values.new_zeros(len(batch.positions), batch.most_supervised, values.shape[-1])
        padded[batch.rows, batch.columns] = values[0]
        return padded


class SketchingCollector(Collector):
    """Preconditions and sketches each parameter's gradients as they come, and sums their squared norms."""

    def __init__(
        self,
        batch: Batch,
        dtype: torch.dtype,
        at_supervised: Set[AdaptedLinear],
        sketch: Projection,
        preconditioner: Preconditioner,
    ) -> None:
        super().__init__(batch, dtype, at_supervised)
        self.sketch, self.preconditioner = sketch, preconditioner
        size = len(batch.positions)
        self.rows = torch.zeros(size, sketch.dim, dtype=self.dtype, device=batch.input_ids.device)
        self.squared_norms = torch.zeros(size, dtype=torch.float64, device=batch.input_ids.device)
        self.squared_gradient_norms = torch.zeros_like(self.squared_norms)

    def receive(self, name: str, gradients: Tensor) -> None:
        """Add the sketch of the preconditioned gradients [b, *shape] to `rows` [b, K], and their squared norms."""
        gradients = gradients.contiguous().mul_(self.inverse_counts)  # g, no longer n * g
        features = self.preconditioner.apply(name, gradients)
        squared = _squared_norms(gradients)
        self.squared_gradient_norms += squared
        self.squared_norms += squared if features is gradients else _squared_norms(features)
        self.sketch.add_(self.rows, name, features)


class StackingCollector(Collector):
    """Keeps every parameter's gradients, divided by the examples' token counts."""

    def __init__(self, batch: Batch, dtype: torch.dtype, at_supervised: Set[AdaptedLinear]) -> None:
        super().__init__(batch, dtype, at_supervised)
        self.gradients: dict[str, Tensor] = {}

    def receive(self, name: str, gradients: Tensor) -> None:
        """Keep the gradients [b, *shape] of each example's mean."""
        self.gradients[name] = gradients.mul_(self.inverse_counts)


class SummingCollector(Collector):
    """Keeps the sum over the batch: one product over all tokens a parameter."""

    def __init__(self, batch: Batch, dtype: torch.dtype, at_supervised: Set[AdaptedLinear]) -> None:
        super().__init__(batch, dtype, at_supervised)
        self.gradients: dict[str, Tensor] = {}

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """The sum over examples too: [b, T, p], [b, T, q] -> [1, p, q]."""
        return _batched_product(left.flatten(0, 1).t()[None], right.flatten(0, 1)[None], self.dtype)

    def receive(self, name: str, gradients: Tensor) -> None:
        """Keep the sum [*shape]."""
        self.gradients[name] = gradients[0]


def _batched_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, p, T] @ [b, T, q] -> [b, p, q] in `dtype`, whatever the factors' precision."""
    if left.dtype == right.dtype == dtype:
        return torch.bmm(left, right)
    if left.dtype == right.dtype and left.is_cuda and dtype == torch.float32:
        return torch.bmm(left, right, out_dtype=dtype)  # half-precision factors, float32 sums
    return torch.bmm(left.to(dtype), right.to(dtype))


def _squared_norms(gradients: Tensor) -> Tensor:
    """[b, *shape] -> float64 [b]."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1).double().square()
