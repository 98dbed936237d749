"""What one small forward pass shows of a model: whether the engine's assumptions hold, and how logits are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.head import LogitTransform, ramp_logits
from prism_assets.gradients.last_layer import LastLayer, replaced_forward
from prism_assets.gradients.lora import AdaptedLinear, is_plain_linear
from prism_assets.gradients.row_order import (
    LARGER,
    SMALL,
    RowOrder,
    Runs,
    changes,
    common_order,
    order_of,
    ordinary_ids,
    recorded,
    tolerance,
)
from prism_assets.quantized import is_quantized, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OutputEmbeddings:
    """A model's output embeddings (`lm_head`): the module, its layer where the adapter changes it, V, place and type.

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
        weight = cast("Tensor", module.weight if self.layer is None else self.layer.base.weight)
        self.device = weight.device
        if self.layer is not None:
            self.vocabulary, self.dtype = self.layer.features[0], self.layer.dtype
        elif is_quantized(module):  # codes say neither
            self.vocabulary, self.dtype = shape_of(module)[0], model.get_input_embeddings().weight.dtype
        else:
            self.vocabulary, self.dtype = weight.shape[0], weight.dtype


@torch.no_grad()
def probe(model: PeftModel, layers: list[AdaptedLinear], head: OutputEmbeddings) -> LogitTransform | None:
    """Runs the model on batches of 2 x 3 tokens; what it does to its logits, None where only its own code can say.

    Notes in each layer how often it is used and how its rows lie. Raises UnsupportedModelError for models in which a
    token sees later ones or those of other examples, and for adapted layers whose rows do not go by example.
    """
    ids = ordinary_ids(model.config.to_dict(), model.get_input_embeddings().num_embeddings)
    small = _observe(model, layers, head, Runs.of(SMALL, ids, head.device))
    _check_causal(model, small)
    flattened = [layer for layer in layers if not small.goes_by_example(layer)]
    larger = _observe(model, flattened, head, Runs.of(LARGER, ids, head.device)) if flattened else None
    for layer in layers:
        layer.uses = small.uses(layer)
        if not layer.uses:  # a vision tower, say: no log-probability of text has a gradient by it
            continue
        layer.row_order = small.row_order(layer)
        if larger is not None and layer in flattened and larger.row_order(layer) != layer.row_order:
            raise larger.refusal(layer)
    ramp, transformed = small.ramp, small.transformed
    if head.layer is not None or not is_plain_linear(head.module) or transformed.shape != ramp.shape:
        return None
    return LogitTransform.identify(ramp, transformed, model.config.get_text_config())


class _Observed(NamedTuple):
    """What runs of the model have shown: inputs of the adapted layers and of the output embeddings."""

    runs: Runs
    calls: list[dict[str, list[Tensor]]]  # of each run, by layer: the inputs of every call
    at_head: list[Tensor]  # [b, T, H] of each run
    ramp: Tensor  # what the output embeddings were made to give, [1, 1, V]
    transformed: Tensor  # what the model made of it

    def uses(self, layer: AdaptedLinear) -> int:
        return len(self.calls[0][layer.name])

    def goes_by_example(self, layer: AdaptedLinear) -> bool:
        """Whether all that the layer sees is [b, T, ...]."""
        return all(inputs.shape[:2] == self.runs.shape for run in self.calls for inputs in run[layer.name])

    def row_order(self, layer: AdaptedLinear) -> RowOrder:
        """How the layer's rows lie, at every use. Raises UnsupportedModelError where they do not go by example."""
        if any(len(run[layer.name]) != self.uses(layer) for run in self.calls):
            raise self.refusal(layer)
        orders = {order_of(seen, self.runs) for seen in zip(*(run[layer.name] for run in self.calls), strict=True)}
        known = {order for order in orders if order is not None}
        found = common_order(known) if known == orders else None
        if found is None:
            raise self.refusal(layer)
        return found

    def refusal(self, layer: AdaptedLinear) -> UnsupportedModelError:
        shapes = {tuple(inputs.shape) for run in self.calls for inputs in run[layer.name]}
        examples, tokens = self.runs.shape
        return UnsupportedModelError(
            f"{layer.name} gets inputs of shape {' and '.join(map(str, sorted(shapes)))} from {examples} examples of "
            f"{tokens} tokens, and their rows do not go by example: routed experts, and layers that mix a batch's "
            "tokens, are not supported; leave them out of target_modules",
            module=layer.name,
        )


def _observe(model: PeftModel, layers: list[AdaptedLinear], head: OutputEmbeddings, runs: Runs) -> _Observed:
    ramp = ramp_logits(head.vocabulary, head.device, head.dtype)
    at_head: list[Tensor] = []

    def show_ramp(hidden: Tensor) -> Tensor:
        at_head.append(hidden.clone())
        if tuple(hidden.shape[:2]) != runs.shape:
            raise UnsupportedModelError(f"the output embeddings get inputs of shape {tuple(hidden.shape)}")
        return ramp

    calls = []
    transformed = ramp
    for number, ids in enumerate(runs.ids):
        with replaced_forward(head.module, show_ramp), recorded({layer.name: layer.module for layer in layers}) as seen:
            logits = model(input_ids=ids, use_cache=False).logits
        calls.append(seen)
        transformed = transformed if number else logits
        if len(at_head) != number + 1:
            raise UnsupportedModelError(
                f"the model uses its output embeddings {len(at_head) - number} times in a forward pass, not once"
            )
    return _Observed(runs, calls, at_head, ramp, transformed)


def _check_causal(model: PeftModel, observed: _Observed) -> None:
    """Raises UnsupportedModelError where a token's hidden state changes with later tokens or other examples."""
    difference = changes(observed.at_head).cpu().view(-1, *observed.runs.shape)
    still = difference <= tolerance(observed.at_head[0].dtype)
    if not bool((still | observed.runs.expected()).all()):
        raise UnsupportedModelError(
            f"{type(model.get_base_model()).__name__} lets tokens see later ones, or those of other examples: only "
            "causal language models are supported"
        )


@torch.no_grad()
def find_last_layer(model: PeftModel, layers: list[AdaptedLinear], head: OutputEmbeddings) -> LastLayer | None:
    """The last decoder layer if it can run at supervised positions only; tried on 2 x 3 tokens after `probe`."""
    decoder = cast("PreTrainedModel", model.get_base_model()).get_decoder()
    last = LastLayer.find(getattr(decoder, "layers", None))
    ids = torch.arange(6, device=head.device).view(SMALL) % head.vocabulary
    if last is None or not last.agrees(lambda: model(input_ids=ids, use_cache=False)):
        return None
    per_token = [layer for layer in layers if layer.module in last.per_token]
    if any(layer.uses > 1 or not layer.row_order.by_token for layer in per_token):
        return None  # its rows, of all uses together, are no longer those of the supervised positions
    return last
