"""What becomes of one layer's gradients while the backward pass is at that layer.

Each collector forms the gradients of A and B of every example from what `lora` reports, and sketches, stacks
or sums them. A collector serves one batch.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.batching import Batch
from prism_assets.gradients.lora import AdaptedLinear
from prism_assets.gradients.preconditioner import Preconditioner
from prism_assets.gradients.sketch import Projection


class Collector:
    """Forms a layer's gradients from what the backward pass reports, and passes them to `receive`.

    at_supervised: the layers that see the batch's supervised positions only, as [1, N, features] or flattened.
    """

    def __init__(self, batch: Batch, dtype: torch.dtype, at_supervised: Set[AdaptedLinear]) -> None:
        self.batch = batch
        self.dtype = dtype
        self.at_supervised = at_supervised
        self.inverse_counts = batch.counts.reciprocal().to(dtype)[:, None, None]
        self.partial: dict[AdaptedLinear, tuple[int, Any, Any]] = {}  # layers used again: uses so far, their sums
        self.received: set[AdaptedLinear] = set()

    def collect(self, layer: AdaptedLinear, inputs: Tensor, down: Tensor, output_gradient: Tensor, up: Tensor) -> None:
        """Pass the gradients of the layer's A and B to `receive`; shapes as in `lora.GradientCollector`. Raises
        UnsupportedModelError where the layer sees other rows, or runs more often, than when the model was tried."""
        self._check_rows(layer, inputs)
        inputs, down, output_gradient, up = (
            self._by_example(layer, values) for values in (inputs, down, output_gradient, up)
        )
        gradient_a = self.outer(up, inputs)
        # Formed transposed because a product with few rows is faster than one with few columns.
        gradient_b = self.outer(down, output_gradient).transpose(1, 2)
        if layer.uses == 1:
            self._receive(layer, gradient_a, gradient_b)
            return
        # What becomes of a gradient is not linear (norms, optimizers): uses are added up first.
        count, sum_a, sum_b = self.partial.pop(layer, (0, 0, 0))
        self.partial[layer] = (count + 1, sum_a + gradient_a, sum_b + gradient_b)
        if count + 1 == layer.uses:
            self._receive(layer, *self.partial.pop(layer)[1:])

    def finish(self) -> None:
        """After the backward pass: layers some of whose uses did not matter to the log-probabilities."""
        for layer, (_, gradient_a, gradient_b) in self.partial.items():
            self._receive(layer, gradient_a, gradient_b)
        self.partial.clear()

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """sum_t left_bt right_bt^T: [b, T, p], [b, T, q] -> [b, p, q], accumulated in the engine's dtype."""
        return _batched_product(left.transpose(1, 2), right, self.dtype)

    def receive(self, name: str, gradients: Tensor) -> None:
        """Take n·g of one parameter for each example, [b, *shape]: the gradients of sums over n supervised tokens."""
        raise NotImplementedError

    def _receive(self, layer: AdaptedLinear, gradient_a: Tensor, gradient_b: Tensor) -> None:
        if layer in self.received:
            raise UnsupportedModelError(
                f"{layer.name} runs more often than {layer.uses} times, as when the model was tried on a few tokens: "
                "leave it out of target_modules",
                module=layer.name,
            )
        self.received.add(layer)
        self.receive(layer.name_a, gradient_a)
        self.receive(layer.name_b, gradient_b)

    def _check_rows(self, layer: AdaptedLinear, inputs: Tensor) -> None:
        """Raises UnsupportedModelError where a layer sees other rows than in the probe: chosen by a router, say."""
        batch, order = self.batch, layer.row_order
        supervised = layer in self.at_supervised
        tokens = len(batch.source) if supervised else batch.input_ids.numel()
        if not layer.uses:
            expected = False
        elif order.first_axis and not supervised:
            expected = inputs.shape[0] == len(batch.positions)
        else:
            expected = inputs.numel() == tokens * (order.rows_per_token or 0) * inputs.shape[-1]
        if not expected:
            raise UnsupportedModelError(
                f"{layer.name} gets inputs of shape {tuple(inputs.shape)} from {tokens} tokens, other than when the "
                "model was tried on a few (routed experts do): leave it out of target_modules",
                module=layer.name,
            )

    def _by_example(self, layer: AdaptedLinear, values: Tensor) -> Tensor:
        """Rows as the layer sees them, [..., d], as [b, rows of an example, d]."""
        batch = self.batch
        size = len(batch.positions)
        if layer not in self.at_supervised:
            return values.reshape(size, -1, values.shape[-1])
        # Those of the N supervised positions: an example a row, zeros after its last.
        values = values.reshape(len(batch.source), -1, values.shape[-1])
        padded = values.new_zeros(size, batch.most_supervised, *values.shape[1:])
        padded[batch.rows, batch.columns] = values
        return padded.flatten(1, 2)


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
    """Keeps every parameter's gradients, divided by the examples' token counts. Parameters that the log-probabilities
    do not depend on are not among them."""

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
        """The sum over all rows: [1, n, p], [1, n, q] -> [1, p, q]."""
        return _batched_product(left.transpose(1, 2), right, self.dtype)

    def _by_example(self, layer: AdaptedLinear, values: Tensor) -> Tensor:
        """All rows as one example's, [1, n, d]: in a sum it does not matter whose they are."""
        return values.reshape(1, -1, values.shape[-1])

    def receive(self, name: str, gradients: Tensor) -> None:
        """Keep the sum [*shape]."""
        self.gradients[name] = gradients[0]


class WeighingCollector(Collector):
    """Keeps several weighted sums over the batch.

    weights: [K, b] in the engine's dtype, of the gradients that the backward pass gives of each example.
    """

    def __init__(self, batch: Batch, dtype: torch.dtype, at_supervised: Set[AdaptedLinear], weights: Tensor) -> None:
        super().__init__(batch, dtype, at_supervised)
        self.weights = weights.t()[:, None, :, None]  # [b, 1, K, 1]
        self.gradients: dict[str, Tensor] = {}

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """The sums: [b, T, p], [b, T, q] -> [K, p, q]. The weights go to the narrow factor."""
        weighted = (left.to(self.dtype)[:, :, None, :] * self.weights).flatten(0, 1)  # [bT, K, p]
        product = weighted.flatten(1).t() @ right.flatten(0, 1).to(self.dtype)
        return product.unflatten(0, weighted.shape[1:])

    def receive(self, name: str, gradients: Tensor) -> None:
        """Keep the sums [K, *shape]."""
        self.gradients[name] = gradients


class FactorCollector(Collector):
    """Adds up the second moments, over tokens, of what each parameter multiplies and of the gradients of its outputs.

    sums: parameter name -> (of output gradients [p, p], of inputs [q, q]) for a parameter of shape [p, q]; the batch's
    are added to them. Tokens that no log-probability depends on, padding among them, are left out.
    """

    def __init__(
        self,
        batch: Batch,
        dtype: torch.dtype,
        at_supervised: Set[AdaptedLinear],
        sums: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(batch, dtype, at_supervised)
        self.sums = sums

    def collect(self, layer: AdaptedLinear, inputs: Tensor, down: Tensor, output_gradient: Tensor, up: Tensor) -> None:
        """Add what one use of a layer gives."""
        self._check_rows(layer, inputs)
        counted = (output_gradient != 0).any(-1).flatten()[:, None]
        for name, sides in ((layer.name_a, (up, inputs)), (layer.name_b, (output_gradient, down))):
            for total, values in zip(self.sums[name], sides, strict=True):
                rows = values.flatten(0, -2).to(self.dtype) * counted
                total.addmm_(rows.t(), rows)


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
