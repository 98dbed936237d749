"""The adapted linear layers of a PEFT model: found, checked by name, run with per-example gradients tapped.

A LoRA layer computes y = W x + c + s B A x, with W [out, in] frozen, A [r, in], B [out, r], s the scaling.
With the gradient dY [b, T, out] of a sum over examples with respect to its output, and no example touching
another's positions,

    U = s dY B  [b, T, r]    dA_b = U_b^T X_b  [r, in]    dB_b = dY_b^T (s X_b A^T)  [out, r]
    dX = dY W + U A

so the gradients of every example separately cost what the summed ones would, and no gradient of W is ever
formed. Of a quantised base W is made from its codes in either pass (`prism_assets/quantized`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.tuners import lora
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.row_order import RowOrder
from prism_assets.quantized import dequantized, is_quantized, is_settled


class GradientCollector(Protocol):
    """Receives one layer's quantities during the backward pass, in the order in which layers are left."""

    def collect(self, layer: AdaptedLinear, inputs: Tensor, down: Tensor, output_gradient: Tensor, up: Tensor) -> None:
        """inputs [..., in]; down = s X A^T [..., r]; output_gradient [..., out]; up = s dY B [..., r], with the same
        leading axes, whose rows lie as `layer.row_order` says. Called once for every use of the layer."""


class AdaptedLinear:
    """One LoRA layer: its frozen weight as [out, in], its factors, their canonical names.

    dtype: what a quantised layer computes in.
    """

    def __init__(self, name: str, module: Any, adapter: str, dtype: torch.dtype) -> None:
        self.name = name
        self.module = module
        self.name_a = f"{name}.lora_A.weight"
        self.name_b = f"{name}.lora_B.weight"
        self.factor_a: nn.Parameter = module.lora_A[adapter].weight  # [r, in]
        self.factor_b: nn.Parameter = module.lora_B[adapter].weight  # [out, r]
        self.scaling = float(module.scaling[adapter])
        self.dropout: nn.Module = module.lora_dropout[adapter]  # in front of A; nothing where it has none
        self.base: Any = module.get_base_layer()  # a linear layer, quantised or not, or GPT-2's Conv1D
        self.quantized = is_quantized(self.base)
        self._dtype = dtype
        self.collector: GradientCollector | None = None  # where the next backward pass reports to
        self.uses = 1  # calls in a forward pass over text; this and the next are what the probe has found
        self.row_order = RowOrder()

    @property
    def device(self) -> torch.device:
        """Where the frozen weight is."""
        return self.base.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weight; of a quantised one, what it is made in."""
        return self._dtype if self.quantized else self.base.weight.dtype

    @property
    def features(self) -> tuple[int, int]:
        """(out, in)."""
        return self.factor_b.shape[0], self.factor_a.shape[1]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight, [out, in] (a transposed view for GPT-2's Conv1D); a quantised one is made, in `dtype`."""
        if self.quantized:
            return dequantized(self.base, dtype)
        return self.base.weight.t() if isinstance(self.base, Conv1D) else self.base.weight

    def noise(self, inputs: Tensor) -> Tensor | None:
        """What dropout multiplies A's inputs with, of their shape, in training mode; None where there is no dropout."""
        if not (self.module.training and isinstance(self.dropout, nn.Dropout) and self.dropout.p > 0):
            return None
        return F.dropout(torch.ones_like(inputs, dtype=self.factor_a.dtype), self.dropout.p)

    def forward(self, inputs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs [..., in] -> outputs [..., out], down = s (noise * X) A^T [..., r] in the adapter's dtype."""
        factor_a, factor_b = self.factor_a, self.factor_b
        bias = self.base.bias
        if self.quantized and bias is not None:
            bias = bias.to(inputs.dtype)
        outputs = F.linear(inputs, self.weight(inputs.dtype), bias)
        down = F.linear(_times(inputs.to(factor_a.dtype), noise), factor_a) * self.scaling
        if outputs.dtype == down.dtype:  # one product that adds in place, no pass over the outputs
            outputs.view(-1, outputs.shape[-1]).addmm_(down.view(-1, down.shape[-1]), factor_b.t())
        else:  # a half-precision model with an fp32 adapter: add in fp32, as PEFT does
            outputs = (outputs + F.linear(down, factor_b)).to(outputs.dtype)
        return outputs, down

    def backward(
        self, output_gradient: Tensor, needs_input_gradient: bool, noise: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """output_gradient dY [..., out] -> dX [..., in] (or None), up = s dY B [..., r]."""
        factor_a, factor_b = self.factor_a, self.factor_b
        # B^T is made contiguous because the product with a narrow, strided matrix is several times slower.
        scaled = (factor_b.t() * self.scaling).contiguous()
        up = F.linear(output_gradient.to(factor_b.dtype), scaled)
        if not needs_input_gradient:
            return None, up
        gradient = output_gradient @ self.weight(output_gradient.dtype)
        if gradient.dtype == up.dtype and noise is None:
            gradient.view(-1, gradient.shape[-1]).addmm_(up.view(-1, up.shape[-1]), factor_a)
        else:
            gradient = (gradient + _times(up @ factor_a, noise)).to(gradient.dtype)
        return gradient, up


class _TappedLinear(torch.autograd.Function):
    """An adapted layer whose backward pass reports what the gradients of A and B are made of.

    `anchor` is a scalar that requires grad. Where it is given the output requires grad although no weight
    does, so autograd starts at the lowest adapted layer and records nothing below it.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, anchor: Tensor, noise: Tensor | None, layer: AdaptedLinear) -> Tensor:
        outputs, down = layer.forward(inputs, noise)
        ctx.layer, ctx.collector = layer, layer.collector
        ctx.save_for_backward(inputs, down, noise)
        return outputs.data  # no view of anything: models may change it in place

    @staticmethod
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, down, noise = ctx.saved_tensors
        gradient, up = ctx.layer.backward(output_gradient, ctx.needs_input_grad[0], noise)
        ctx.collector.collect(ctx.layer, _times(inputs, noise), down, output_gradient, up)
        return gradient, None, None, None


def _times(values: Tensor, noise: Tensor | None) -> Tensor:
    return values if noise is None else values * noise


@contextmanager
def tapped(layers: list[AdaptedLinear]) -> Iterator[None]:
    """Within the context the layers run as described above; their own `forward` comes back on exit."""
    anchors: dict[torch.device, Tensor] = {}

    def forward_of(layer: AdaptedLinear):
        def forward(inputs: Tensor) -> Tensor:
            noise = layer.noise(inputs)
            if not torch.is_grad_enabled():
                return layer.forward(inputs, noise)[0]
            if inputs.device not in anchors:
                anchors[inputs.device] = torch.zeros((), device=inputs.device, requires_grad=True)
            return _TappedLinear.apply(inputs, anchors[inputs.device], noise, layer)

        return forward

    # By way of the modules' own dictionaries: to set an attribute of a module costs ten times as much.
    saved = [layer.module.__dict__.get("forward") for layer in layers]
    for layer in layers:
        vars(layer.module)["forward"] = forward_of(layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            if forward is None:
                del vars(layer.module)["forward"]
            else:
                vars(layer.module)["forward"] = forward
            layer.collector = None


def find_adapted_layers(model: PeftModel) -> list[AdaptedLinear]:
    """The adapted layers in the model's order. Raises UnsupportedModelError, naming the first part not
    supported."""
    adapter = _check_configuration(model)
    layers = []
    dtype = cast("nn.Embedding", model.get_input_embeddings()).weight.dtype
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = _check_layer(name, module, adapter, dtype)
            if layer is not None:
                layers.append(layer)
    if not layers:
        raise UnsupportedModelError(f"adapter {adapter!r} has no LoRA layers in this model")
    _check_parameters(model, layers, adapter)
    return layers


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes F.linear(x, weight, bias), the weight transposed for Conv1D, unquantised.

    A subclass with a forward of its own (Falcon has one) counts if it gives the same result on a random
    input.
    """
    if not isinstance(module, (nn.Linear, Conv1D)) or is_quantized(module) or not module.weight.is_floating_point():
        return False
    if module.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return False
    if type(module) in (nn.Linear, Conv1D):
        return True
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = F.linear(inputs, weight, module.bias)
        try:
            found = module(inputs)
        except (RuntimeError, TypeError, ValueError):
            return False  # takes inputs of another shape, as one that works in groups
    tolerance = 64 * torch.finfo(weight.dtype).eps * max(1.0, expected.abs().max().item())
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False  # a router, say, that gives more than the product
    return bool((found - expected).abs().max() <= tolerance)


def _check_configuration(model: PeftModel) -> str:
    """Checks what the adapter's configuration says; returns the active adapter's name."""
    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(f"the gradient engine needs a PeftModel, not {type(model).__name__}")
    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapters]
    if len(active) != 1:
        raise UnsupportedModelError(f"exactly one adapter must be active, not {len(active)}: {', '.join(active)}")
    adapter, config = active[0], model.peft_config[active[0]]
    if config.peft_type != PeftType.LORA:
        raise UnsupportedModelError(f"adapter {adapter!r} is {config.peft_type}, only LORA is supported")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model.get_base_model()).__name__} is an encoder-decoder, not a causal LM")
    refused = {
        "use_dora": "DoRA",
        "modules_to_save": "modules_to_save (fully trained modules)",
        "lora_bias": "lora_bias",
        "target_parameters": "target_parameters (LoRA on stacked experts or bare parameters)",
        "trainable_token_indices": "trainable_token_indices",
        "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
        "megatron_config": "Megatron layers",
    }
    for field, label in refused.items():
        if getattr(config, field, None):
            raise UnsupportedModelError(f"adapter {adapter!r} uses {label}, which is not supported")
    if config.bias != "none":  # pyright: ignore[reportAttributeAccessIssue]
        raise UnsupportedModelError(f"adapter {adapter!r} trains biases (bias={config.bias!r}), which is not supported")  # pyright: ignore[reportAttributeAccessIssue]
    return adapter


def _check_layer(name: str, module: LoraLayer, adapter: str, dtype: torch.dtype) -> AdaptedLinear | None:
    """One LoRA layer as an AdaptedLinear; None where the active adapter does not touch it."""
    kind = type(module).__name__
    held = {**module.lora_A, **module.lora_B, **module.lora_embedding_A}
    if adapter not in held:
        return None
    base = module.get_base_layer()
    quantized = is_quantized(base)
    # PEFT has these two where bitsandbytes is installed.
    kinds = (getattr(lora, "Linear4bit", None), getattr(lora, "Linear8bitLt", None)) if quantized else (PeftLoraLinear,)
    if type(module) not in kinds:
        raise UnsupportedModelError(
            f"{name}: LoRA on {type(base).__name__} (PEFT layer {kind}) is not supported: only linear "
            "layers, quantised by bitsandbytes or not, and no stacked experts, embeddings or convolutions",
            module=name,
        )
    if module.merged or module.disable_adapters:
        raise UnsupportedModelError(f"{name}: the adapter is merged or disabled; unmerge or enable it first")
    if adapter in module.lora_variant or module.use_dora.get(adapter):
        variant = type(module.lora_variant.get(adapter)).__name__
        raise UnsupportedModelError(f"{name}: the LoRA variant {variant} is not supported, only plain LoRA and rsLoRA")
    if quantized and not is_settled(base):
        raise UnsupportedModelError(
            f"{name}: {type(base).__name__} computes by bitsandbytes' own products, whose rows depend on each other: "
            "call prism_assets.quantized.settle on the base model first",
            module=name,
        )
    if module.lora_bias.get(adapter):
        raise UnsupportedModelError(f"{name}: lora_bias is not supported")
    if not quantized and not is_plain_linear(base):
        raise UnsupportedModelError(
            f"{name}: base layer {type(base).__name__} with weights of {base.weight.dtype} is no plain "
            "linear layer (of quantised bases only those by bitsandbytes are supported: nf4, fp4 and int8)",
            module=name,
        )
    return AdaptedLinear(name, module, adapter, dtype)


def _check_parameters(model: PeftModel, layers: list[AdaptedLinear], adapter: str) -> None:
    """Refuses adapter parameters outside the layers found, shared factors, and models that are not wholly
    loaded."""
    factors = [factor for layer in layers for factor in (layer.factor_a, layer.factor_b)]
    if len({id(factor) for factor in factors}) != len(factors):
        raise UnsupportedModelError(f"adapter {adapter!r} shares a LoRA factor between layers, which is not supported")
    known = {id(factor) for factor in factors}
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedModelError(f"{name} is offloaded (meta device); load the whole model on one device")
        if f".{adapter}" in name and "lora_" in name and id(parameter) not in known:
            raise UnsupportedModelError(f"{name}: this adapter parameter is not supported")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"the model is spread over {len(devices)} devices; the engine needs it on one")
