"""What one small forward pass shows of a model: whether the engine's assumptions hold, and how logits are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.head import LogitTransform, ramp_logits
from prism_assets.gradients.last_layer import LastLayer, replaced_forward
from prism_assets.gradients.lora import AdaptedLinear, is_plain_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_SHAPE = (2, 3)  # examples, tokens


class OutputEmbeddings:
    """A model's output embeddings (`lm_head`): the module, and its layer where the adapter changes it.

    Raises UnsupportedModelError where the model has none.
    """

    def __init__(self, model: PeftModel, layers: list[AdaptedLinear]) -> None:
        module = cast("PreTrainedModel", model.get_base_model()).get_output_embeddings()
        if module is None:
            raise UnsupportedModelError(
                f"{type(model.get_base_model()).__name__} has no output embeddings: no causal LM?"
            )
        self.module: nn.Module = module
        self.layer = next((layer for layer in layers if layer.module is module), None)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, [V, H]."""
        return cast("Tensor", self.module.weight) if self.layer is None else self.layer.weight


@torch.no_grad()
def probe(model: PeftModel, layers: list[AdaptedLinear], head: OutputEmbeddings) -> LogitTransform | None:
    """Runs the model once on 2 x 3 tokens; what it does to its logits, None where only its own code can say.

    Raises UnsupportedModelError for models whose adapted layers do not see each token of each example once (routed
    or shared layers), and for models in which a token sees later ones.
    """
    calls: dict[str, int] = dict.fromkeys((layer.name for layer in layers), 0)
    hooks = [layer.module.register_forward_pre_hook(_recorder(layer, calls)) for layer in layers]
    at_head: list[Tensor] = []
    weight = head.weight
    ramp = ramp_logits(weight.shape[0], weight.device, weight.dtype)

    def show_ramp(hidden: Tensor) -> Tensor:
        at_head.append(hidden)
        if tuple(hidden.shape[:2]) != PROBE_SHAPE:
            raise UnsupportedModelError(f"the output embeddings get inputs of shape {tuple(hidden.shape)}")
        return ramp

    try:
        with replaced_forward(head.module, show_ramp):
            ids = torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=weight.device)
            ids[1, -1] = 1  # two examples that differ in their last token only
            transformed = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(at_head) != 1:
        raise UnsupportedModelError(
            f"the model uses its output embeddings {len(at_head)} times in a forward pass, not once"
        )
    first, second = at_head[0][:, :-1].double()
    if (second - first).norm() > max(1e-4, 4 * torch.finfo(at_head[0].dtype).eps) * first.norm():
        raise UnsupportedModelError(
            f"{type(model.get_base_model()).__name__} lets tokens see later ones: only causal language "
            "models are supported"
        )
    for name, count in calls.items():
        if count != 1:
            raise UnsupportedModelError(
                f"{name} runs {count} times in a forward pass, not once: shared layers and routed "
                "experts are not supported; leave them out of target_modules",
                module=name,
            )
    if head.layer is not None or not is_plain_linear(head.module) or transformed.shape != ramp.shape:
        return None
    return LogitTransform.identify(ramp, transformed, model.config.get_text_config())


@torch.no_grad()
def find_last_layer(model: PeftModel, head: OutputEmbeddings) -> LastLayer | None:
    """The last decoder layer if it can run at supervised positions only; tried on 2 x 3 tokens."""
    decoder = cast("PreTrainedModel", model.get_base_model()).get_decoder()
    layer = LastLayer.find(getattr(decoder, "layers", None))
    ids = torch.arange(6, device=head.weight.device).view(PROBE_SHAPE) % head.weight.shape[0]
    if layer is None or not layer.agrees(lambda: model(input_ids=ids, use_cache=False)):
        return None
    return layer


def _recorder(layer: AdaptedLinear, calls: dict[str, int]):
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[layer.name] += 1
        if tuple(inputs[0].shape[:-1]) != PROBE_SHAPE:
            raise UnsupportedModelError(
                f"{layer.name} gets inputs of shape {tuple(inputs[0].shape)}, not [batch, tokens, features]: "
                "routed experts, and layers that see a batch's tokens as one list, are not supported; leave "
                "them out of target_modules",
                module=layer.name,
            )

    return record
