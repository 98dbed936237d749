"""Per-example gradients of the mean log-probability by the LoRA parameters, for less than a training step.

For an example with supervised tokens t in C (the completion, EOS included), n of them,

    s = (1/n) sum_{t in C} log p(x_t | x_<t)          g = grad s, with respect to every LoRA A and B

One backward pass of the sum over a batch gives every example's g separately (see `lora`). It does less than a
training pass over the same batch: logits and loss exist at supervised positions only (`head`), no weight
gradient is asked of autograd, nothing below the lowest adapted layer is recorded, and each layer's gradients
go through preconditioner and sketch while the backward pass is at that layer, so that no two layers'
gradients are ever held together.

After its attention, the last decoder layer is run at supervised positions only as well, where it is of a kind
known to allow it (`last_layer`).

Gradients are formed in float32 whatever the model's precision (float64 for a float64 model). Longer than other modules:
every kind of pass shares the preparation of the model, and differs in what is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from prism_assets.errors import UnsuitableSetting
from prism_assets.gradients.batching import (
    Batch,
    OnBatch,
    Tokenized,
    build_batch,
    check_examples,
)
from prism_assets.gradients.collectors import (
    Collector,
    FactorCollector,
    SketchingCollector,
    StackingCollector,
    SummingCollector,
    WeighingCollector,
)
from prism_assets.gradients.head import log_probs_of_logits, token_log_probs
from prism_assets.gradients.last_layer import gather, replaced_forward
from prism_assets.gradients.lora import find_adapted_layers, tapped
from prism_assets.gradients.memory import Activations, MemoryLimit, measure_activations, recomputed
from prism_assets.gradients.preconditioner import Preconditioner
from prism_assets.gradients.probe import OutputEmbeddings, find_last_layer, probe
from prism_assets.gradients.runner import BatchRunner, Need
from prism_assets.gradients.sketch import Projection
from prism_assets.gradients.transfer import HostCopy, Result, a_batch_late, to_device
from prism_assets.gradients.vectors import norm
from prism_assets.quantized import largest, quantized_weights

# Below this norm a gradient is rounding noise of float32 log-probabilities; its direction means nothing.
NORM_FLOOR = 1e-7


class FeatureRows(NamedTuple):
    """What a gradient pass leaves of n examples, in the order given. Gamma is the preconditioned gradient."""

    rows: np.ndarray  # float32 [n, K] sketched Gamma, not normalised; zeros where refused
    norms: np.ndarray  # float64 [n] the norm of Gamma before the sketch
    mean_log_probs: np.ndarray  # float64 [n] s
    gradient_norms: np.ndarray  # float64 [n] the norm of g
    refused: list[str | None]  # [n] why a row must not be used, None where it may be


class WeightedGradient(NamedTuple):
    """The gradient of sum_j w_j s_j, and the s_j."""

    gradient: dict[str, Tensor]  # parameter name -> float32 (float64) of the parameter's shape
    mean_log_probs: np.ndarray  # float64 [n]


class GradientEngine:
    """Runs gradient passes of a causal language model with one LoRA adapter. The model is used, not changed.

    token_budget: padded tokens in a batch; by default a figure for the kind of device.
    memory: bytes that the process may hold on the device; by default as much as is free there. A batch that
    does not fit is halved until it does (`memory`).
    recompute: each decoder layer's activations are computed again in the backward pass instead of being kept:
    always (True), never (False) or, by default, where an example would not fit otherwise. No result depends on it.

    Raises UnsupportedModelError, naming the module, for what it cannot do: DoRA and other variants, adapted
    embeddings, convolutions or stacked experts, routed experts, modules_to_save, trained biases, offloaded
    weights and those quantised by others than bitsandbytes, several active adapters.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        token_budget: int | None = None,
        memory: int | None = None,
        recompute: bool | None = None,
    ) -> None:
        self.model = model
        self.layers = find_adapted_layers(model)
        self.parameters: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            self.parameters[layer.name_a] = layer.factor_a
            self.parameters[layer.name_b] = layer.factor_b
        self.parameter_names = list(self.parameters)
        self.parameter_shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        self.num_parameters = sum(value.numel() for value in self.parameters.values())
        self.device = self.layers[0].device
        self._modules, self._all_parameters = list(model.modules()), list(model.parameters())
        self._config = model.config.get_text_config()
        self._head = OutputEmbeddings(model, self.layers)
        self._runner = BatchRunner(MemoryLimit(self.device, memory), token_budget, recompute, self._measured)
        with self._prepared():
            self._transform = probe(model, self.layers, self._head)
            self._last_layer = find_last_layer(model, self.layers, self._head)
        per_token = self._last_layer.per_token if self._last_layer else set()
        self._at_supervised = {layer for layer in self.layers if layer is self._head.layer or layer.module in per_token}

    @property
    def dtype(self) -> torch.dtype:
        """Of gradients and rows: float32, or float64 for a float64 model."""
        return torch.float64 if self.layers[0].dtype == torch.float64 else torch.float32

    @property
    def half_precision(self) -> bool:
        """Whether the model's weights are narrower than float32."""
        return self.layers[0].dtype in (torch.float16, torch.bfloat16)

    def mean_log_probs(self, examples: Sequence[Tokenized]) -> np.ndarray:
        """s of each example, float64 [n], by forward passes alone."""
        self._check(examples)
        result = np.empty(len(examples))
        run = self._run(examples, lambda batch: HostCopy(self._log_prob_sums(batch) / batch.counts), backward=False)
        for batch, copy in run:
            (result[batch.positions],) = copy.arrays()
        return result

    def feature_rows(
        self,
        examples: Sequence[Tokenized],
        *,
        sketch: Projection,
        preconditioner: Preconditioner | None = None,
        progress: OnBatch | None = None,
    ) -> FeatureRows:
        """Sketched, preconditioned per-example gradients with their exact norms.

        Rows that are not finite, or whose ‖g‖ or ‖Gamma‖ is below `NORM_FLOOR`, are set to zero and given a
        reason in `refused`. Raises ValueError where the sketch has more dimensions than the adapter has
        parameters, or the preconditioner lacks moments.
        """
        preconditioner = preconditioner or Preconditioner.build("sgd")
        preconditioner.check(self.parameter_shapes)
        if sketch.least_parameters > self.num_parameters:
            raise UnsuitableSetting(
                f"a sketch of {sketch.dim} dimensions is larger than the adapter's {self.num_parameters} "
                "parameters: lower sketch_dim, or use exact features"
            )
        self._check(examples)

        def run_batch(batch: Batch) -> HostCopy:
            collector = SketchingCollector(batch, self.dtype, self._at_supervised, sketch, preconditioner)
            sums = self._backward(batch, collector)
            norms, gradient_norms = collector.squared_norms.sqrt(), collector.squared_gradient_norms.sqrt()
            return HostCopy(collector.rows.float(), torch.stack([norms, sums / batch.counts, gradient_norms], dim=1))

        count = len(examples)
        rows = np.empty((count, sketch.dim), dtype=np.float32)
        figures = np.empty((count, 3))
        done = 0
        for batch, copy in self._run(examples, run_batch):
            rows[batch.positions], figures[batch.positions] = copy.arrays()
            done += len(batch.positions)
            if progress is not None:
                progress(done, count)
        norms, log_probs, gradient_norms = figures.T.copy()
        finite = np.all(np.isfinite(rows), axis=1)
        refused = [_refusal(*figure) for figure in zip(norms, log_probs, gradient_norms, finite, strict=True)]
        rows[[reason is not None for reason in refused]] = 0
        return FeatureRows(rows, norms, log_probs, gradient_norms, refused)

    def per_example_gradients(self, examples: Sequence[Tokenized]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yields, batch by batch, the examples' positions [b] and g as parameter name -> [b, *shape].

        Holds a whole batch's gradients: for small numbers of examples.
        """
        self._check(examples)

        def run_batch(batch: Batch) -> dict[str, Tensor]:
            collector = StackingCollector(batch, self.dtype, self._at_supervised)
            self._backward(batch, collector)
            return {
                name: collector.gradients[name]
                if name in collector.gradients
                else torch.zeros(len(batch.positions), *shape, dtype=self.dtype, device=self.device)
                for name, shape in self.parameter_shapes.items()
            }

        for batch, gradients in self._run(examples, run_batch):
            yield batch.positions, gradients

    def weighted_gradient(
        self, examples: Sequence[Tokenized], weights: Sequence[float] | np.ndarray, *, training: bool = False
    ) -> WeightedGradient:
        """The gradient of sum_j w_j s_j, summed over the examples inside the matrix products of the backward
        pass.

        training: modules stay in the mode that they are in, so that dropout is drawn where it is on.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(examples),) or not np.isfinite(weights).all():
            raise ValueError(f"{len(examples)} examples need as many finite weights, not {weights.shape}")
        self._check(examples)
        # Tiny weights would underflow in a half-precision backward pass: the largest is scaled to one.
        scale = float(np.abs(weights).max(initial=0.0)) or 1.0
        total: dict[str, Tensor] = {}

        def run_batch(batch: Batch) -> tuple[HostCopy, dict[str, Tensor]]:
            collector = SummingCollector(batch, self.dtype, self._at_supervised)
            token_weights = to_device(weights[batch.positions] / scale, self.device) / batch.counts
            sums = self._backward(batch, collector, token_weights)
            return HostCopy(sums / batch.counts), collector.gradients

        mean_log_probs = np.empty(len(examples))
        for batch, (copy, gradients) in self._run(examples, run_batch, training=training):
            (mean_log_probs[batch.positions],) = copy.arrays()
            for name, gradient in gradients.items():
                total[name] = total[name].add_(gradient) if name in total else gradient.contiguous()
        gradient = {
            name: total[name].mul_(scale)
            if name in total
            else torch.zeros(shape, dtype=self.dtype, device=self.device)  # no log-probability depends on it
            for name, shape in self.parameter_shapes.items()
        }
        return WeightedGradient(gradient, mean_log_probs)

    def weighted_gradients(self, examples: Sequence[Tokenized], weights: np.ndarray) -> list[dict[str, Tensor]]:
        """The gradients of K sums sum_j w_kj s_j, for weights [K, n], by one pass over the examples: parameter name ->
        float32 (float64) of the parameter's shape, for each k.

        Raises ValueError where the weights are not finite, or not as many as there are examples.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape[1:] != (len(examples),) or not np.isfinite(weights).all():
            raise ValueError(f"{len(examples)} examples need as many finite weights in each row, not {weights.shape}")
        self._check(examples)
        # As above: float32 has no weights of 1e-60.
        scales = np.abs(weights).max(axis=1, initial=0.0, keepdims=True)
        scales[scales == 0] = 1.0
        total = {
            name: torch.zeros(len(weights), *shape, dtype=self.dtype, device=self.device)
            for name, shape in self.parameter_shapes.items()
        }

        def run_batch(batch: Batch) -> dict[str, Tensor]:
            shares = to_device((weights / scales)[:, batch.positions], self.device) / batch.counts  # of n_b times g_b
            collector = WeighingCollector(batch, self.dtype, self._at_supervised, shares.to(self.dtype))
            self._backward(batch, collector)
            return collector.gradients

        for _, gradients in self._run(examples, run_batch):
            for name, gradient in gradients.items():
                total[name] += gradient
        return [
            {name: values[row] * scale for name, values in total.items()}
            for row, scale in enumerate(scales[:, 0].tolist())
        ]

    def kronecker_factors(self, examples: Sequence[Tokenized]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each parameter [p, q] the second moments, summed over the tokens of the examples, of the gradients of its
        outputs [p, p] and of what it multiplies [q, q], in float32 (float64). The gradients are those of the examples'
        summed log-probabilities.
        """
        self._check(examples)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for name, shape in self.parameter_shapes.items():
            left, right = (torch.zeros(side, side, dtype=self.dtype, device=self.device) for side in shape)
            sums[name] = (left, right)

        def run_batch(batch: Batch) -> bool:
            self._backward(batch, FactorCollector(batch, self.dtype, self._at_supervised, sums))
            return True

        for _ in self._run(examples, run_batch):
            pass
        return sums

    def directional_derivatives(
        self, examples: Sequence[Tokenized], direction: Mapping[str, Tensor], epsilon: float = 1e-2
    ) -> np.ndarray:
        """The derivative of each s along the *given* direction d (not its unit vector): <g, d>, float64 [n].

        By a central difference of two forward passes at theta ± epsilon u, u = d / ‖d‖, times ‖d‖; the error
        is O(epsilon²). The passes run in float32 (a half-precision model is widened meanwhile, and narrowed
        back to the same bits). `direction` maps parameter names to tensors; a missing parameter counts as
        zero.
        """
        length = norm(direction)
        if not np.isfinite(length) or length == 0:
            raise ValueError(f"the direction must be finite and not zero; its norm is {length}")
        with self.single_precision():
            with self.step(direction, epsilon / length):
                above = self.mean_log_probs(examples)
            with self.step(direction, -epsilon / length):
                below = self.mean_log_probs(examples)
        return (above - below) / (2 * epsilon) * length

    @contextmanager
    def step(self, direction: Mapping[str, Tensor], size: float) -> Iterator[None]:
        """Within the context the LoRA parameters are theta + size * direction; on exit they have their former
        bits."""
        if unknown := sorted(set(direction) - set(self.parameters)):
            raise ValueError(f"the direction names {unknown[0]}, which is no LoRA parameter of this model")
        saved = {name: self.parameters[name].detach().clone() for name in direction}
        try:
            with torch.no_grad():
                for name, change in direction.items():
                    parameter = self.parameters[name]
                    exact = parameter.double() + size * change.to(parameter.device).double()
                    parameter.copy_(exact)
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    self.parameters[name].copy_(value)

    def memory_need(self, lengths: Sequence[int]) -> Need:
        """What gradient passes over examples of these lengths (`batching.tokens_read`) take, in bytes."""
        return self._runner.need(lengths)

    # One batch

    def _log_prob_sums(self, batch: Batch) -> Tensor:
        """n * s of each example of the batch, float64 [b]."""
        with torch.no_grad():
            return _sum_by_example(self._token_log_probs(batch), batch)

    def _backward(self, batch: Batch, collector: Collector, weights: Tensor | None = None) -> Tensor:
        """Runs the batch forward and backward with weight w_b on each token log-probability of example b.

        weights: float64 [b], ones by default (the gradient is then n_b times g_b, which keeps half-precision
        gradients far from underflow). Returns n * s, float64 [b].
        """
        for layer in self.layers:
            layer.collector = collector
        with torch.enable_grad():
            log_probs = self._token_log_probs(batch)
        values = log_probs.detach()
        upstream = torch.ones_like(values) if weights is None else weights[batch.rows].to(values.dtype)
        torch.autograd.backward(log_probs, upstream)
        collector.finish()
        return _sum_by_example(values, batch)

    def _token_log_probs(self, batch: Batch) -> Tensor:
        """log p of every supervised token, float32 [N] (float64 of a float64 model)."""
        gathered: list[Tensor] = []

        def take(hidden: Tensor) -> Tensor:
            # [b, T, H] -> [1, N, H]: the head sees supervised positions only.
            gathered.append(hidden if self._last_layer else gather(hidden, batch.source))
            if self._transform is not None:
                # The log-probabilities come from `token_log_probs`; the rest of the forward gets a stand-in.
                return hidden.new_zeros(1, 1, 1)
            return head_forward(gathered[0])  # [1, N, V], then the model's own steps

        head_forward = self._head.module.forward
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self._head.module, take))
            if self._last_layer:
                stack.enter_context(self._last_layer.at(batch.source))
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits
        if self._transform is not None:
            return token_log_probs(gathered[0][0], batch.targets, self._head.module, self._transform)
        return log_probs_of_logits(logits[0], batch.targets)

    # Many batches

    def _check(self, examples: Sequence[Tokenized]) -> None:
        longest = getattr(self._config, "max_position_embeddings", None)
        check_examples(examples, self.model.get_input_embeddings().num_embeddings, longest)

    def _run(
        self,
        examples: Sequence[Tokenized],
        run_batch: Callable[[Batch], Result],
        *,
        backward: bool = True,
        training: bool = False,
    ) -> Iterator[tuple[Batch, Result]]:
        """Plans the batches and runs them, one ahead of what is yielded."""

        def run(positions: list[int], recompute: bool) -> tuple[Batch, Result]:
            batch = build_batch(examples, positions, self.device)
            # A batch at a time: between batches the model is the caller's.
            with self._prepared(recompute=recompute, training=training):
                return batch, run_batch(batch)

        return a_batch_late(self._runner.run(examples, run, backward))

    def _measured(self) -> Activations:
        """What a pass keeps, measured on two short ones."""
        longest = getattr(self._config, "max_position_embeddings", None)

        def forward(width: int) -> Tensor:
            ids = np.arange(width + 1) % self.model.get_input_embeddings().num_embeddings
            with torch.enable_grad():
                return self._token_log_probs(build_batch([_Probe(ids, np.arange(width + 1) > 0)], [0], self.device))

        with self._prepared():
            found = measure_activations(self._modules, self._all_parameters, longest, forward)
        return found._replace(product=largest(self.model) * self.layers[0].dtype.itemsize)

    # The model's state

    @contextmanager
    def _prepared(self, *, recompute: bool = False, training: bool = False) -> Iterator[None]:
        """Evaluation mode (not for `training`), no parameter requires grad, adapted layers tapped; all as before
        on exit."""
        training_modules = [] if training else [module for module in self._modules if module.training]
        trainable = [parameter for parameter in self._all_parameters if parameter.requires_grad]
        with ExitStack() as stack:
            stack.callback(lambda: [setattr(module, "training", True) for module in training_modules])
            stack.callback(lambda: [parameter.requires_grad_(True) for parameter in trainable])
            for module in training_modules:  # not model.eval(), which costs more than a small model's batch
                module.training = False
            for parameter in trainable:
                parameter.requires_grad_(False)
            stack.enter_context(tapped(self.layers))
            if recompute:
                stack.enter_context(recomputed(self._modules))
            yield

    @contextmanager
    def single_precision(self) -> Iterator[None]:
        """Half-precision parameters and buffers as float32 for a while; the way there and back keeps every
        bit."""
        codes = quantized_weights(self.model)  # may be stored as bfloat16, and are no numbers
        tensors = [one for one in (*self.model.parameters(), *self.model.buffers()) if id(one) not in codes]
        narrow = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        try:
            yield
        finally:
            for tensor, dtype in narrow:
                tensor.data = tensor.data.to(dtype)


class _Probe(NamedTuple):
    """An example of nothing in particular."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def _sum_by_example(log_probs: Tensor, batch: Batch) -> Tensor:
    """[N] -> float64 [b], in a fixed order on every device."""
    padded = torch.zeros(len(batch.positions), batch.input_ids.shape[1], dtype=torch.float64, device=log_probs.device)
    padded[batch.rows, batch.columns] = log_probs.double()
    return padded.sum(1)


def _refusal(feature_norm: float, mean_log_prob: float, gradient_norm: float, finite_row: bool) -> str | None:
    if not np.isfinite(mean_log_prob):
        return "log-probability is not finite"
    if not (np.isfinite(gradient_norm) and np.isfinite(feature_norm) and finite_row):
        return "gradient is not finite"
    if gradient_norm < NORM_FLOOR or feature_norm < NORM_FLOOR:
        return f"gradient norm is below {NORM_FLOOR:g}"
    return None
