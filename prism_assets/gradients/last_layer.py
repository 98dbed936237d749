"""The last decoder layer, run at the supervised positions only after its attention.

No later layer attends to what the last one leaves at other positions, and the head reads supervised positions
alone. So in the last layer the attention's output projection, the second norm and the MLP need the N
supervised positions instead of all b * T; keys, values and queries are as before.

This is the one place that knows a family's shape: the pre-norm layer of Llama, Mistral, Qwen and Gemma,

    h = x + o_proj(attention(norm1(x)))        y = h + mlp(norm2(h))

A layer is taken for one only if its parts have these names and no others, and if the engine has seen the
same update come out of both ways (`LastLayer.agrees`); any other model runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class LastLayer:
    """A decoder layer of the shape above. `per_token` are its modules that see supervised positions only."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer  # a module whose parts are accessed by name
        after = (self.layer.self_attn.o_proj, self.layer.post_attention_layernorm, self.layer.mlp)
        self.per_token = {module for part in after for module in part.modules()}

    @classmethod
    def find(cls, layers: nn.Module | None) -> LastLayer | None:
        """The last of a model's decoder layers, or None where its parts are not the ones known."""
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return None
        last = layers[-1]
        if {name for name, _ in last.named_children()} != PARTS or not hasattr(last.self_attn, "o_proj"):
            return None
        return cls(last)

    def agrees(self, run_model: Callable[[], Any]) -> bool:
        """Whether the layer, at some positions, adds to them what it does when the model runs."""
        calls, projected = [], []
        hooks = [
            self.layer.register_forward_hook(
                lambda _, args, settings, outputs: calls.append((args, settings, outputs)), with_kwargs=True
            ),
            self.layer.self_attn.o_proj.register_forward_hook(lambda *call: projected.append(call)),
        ]
        try:
            run_model()
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != 1 or len(projected) != 1:
            return False  # shared with other layers, which need all positions
        try:
            (hidden, *args), settings, outputs = calls[0]
            source = torch.arange(1, hidden.shape[0] * hidden.shape[1], 2, device=hidden.device)
            with self.at(source):
                found = self.layer(hidden, *args, **settings)
            before, expected = (values.flatten(0, 1)[source].double() for values in (hidden, outputs))
            error = (found[0].double() - expected).norm()
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False  # of another shape after all
        # Measured against what the layer adds: large inputs must not hide the error of a scaled residual, say.
        tolerance = max(1e-4, 4 * torch.finfo(hidden.dtype).eps)
        return bool(error <= tolerance * (expected - before).norm())

    @contextmanager
    def at(self, source: Tensor) -> Iterator[None]:
        """Within the context the layer takes [b, T, H] and gives [1, N, H]: its outputs at `source`,
        int64 [N] into the flattened [b * T]."""
        layer, projection = self.layer, self.layer.self_attn.o_proj
        project = projection.forward

        def forward(hidden_states: Tensor, **settings) -> Tensor:
            attended, *_ = layer.self_attn(layer.input_layernorm(hidden_states), **settings)
            hidden = gather(hidden_states, source) + attended
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        with ExitStack() as stack:
            stack.enter_context(replaced_forward(projection, lambda attended: project(gather(attended, source))))
            stack.enter_context(replaced_forward(layer, forward))
            yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within the context the module runs `forward`; what it had of its own comes back on exit."""
    saved = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if saved is None:
            del module.forward
        else:
            module.forward = saved


def gather(hidden: Tensor, source: Tensor) -> Tensor:
    """[b, T, H] at source int64 [N] of the flattened [b * T] -> [1, N, H]."""
    return _Gather.apply(hidden, source)


class _Gather(torch.autograd.Function):
    """Rows of a flattened tensor; the backward pass copies them back, which needs no atomic additions."""

    @staticmethod
    def forward(ctx, hidden: Tensor, source: Tensor) -> Tensor:
        ctx.shape = hidden.shape
        ctx.save_for_backward(source)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, source)[None]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        full = gradient.new_zeros(ctx.shape[0] * ctx.shape[1], ctx.shape[2])
        return full.index_copy_(0, source, gradient[0]).view(ctx.shape), None
