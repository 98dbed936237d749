"""Which modules of a model get LoRA: what the settings say, read against the model that is there.

`all-linear` means every linear layer of the text decoder but the output embeddings, and in a mixture of experts but the
routed experts and their routers: experts are stacked parameters, or layers that see a batch's tokens in parts. Left
out too are layers on which LoRA cannot be put: Mamba's output projections, and those that compute no plain product.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

from prism_assets.compat import names_of_stacked_experts, refused_by_name
from prism_assets.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class LoraTargets(NamedTuple):
    """What PEFT is told, and what is said of it to people."""

    modules: str | list[str]  # as in the settings, or the full names of the modules
    left_out: str  # what `all-linear` does not adapt in this model beside the output embeddings; empty: nothing


def lora_targets(
    base: "PreTrainedModel",
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
) -> LoraTargets:
    """The modules that the settings name in this model.

    As in PEFT a list names modules, or the ends of their names, and a string is a regular expression for whole names.
    `layers` are numbers of decoder layers, from 0. Of a multimodal model the text decoder alone counts. Raises
    ModelError for an entry that names nothing.
    """
    decoder = _text_decoder(base)
    everything = isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR
    experts = _experts(base) if everything else set()
    unfit = _unfit(base) - experts if everything else set()
    left_out = [f"everything outside of {decoder}"] if decoder else []
    left_out += ["routed experts and their routers"] if experts else []
    left_out += [f"{', '.join(sorted({end_of_name(name) for name in unfit}))} (no place for LoRA)"] if unfit else []
    if not (decoder or experts or unfit or exclude_modules or layers is not None):
        return LoraTargets(target_modules if isinstance(target_modules, str) else list(target_modules), "")
    names = [name for name, _ in base.named_modules() if name and (not decoder or name.startswith(f"{decoder}."))]
    if everything:
        linear = set(_linear_layers(base)) - experts - unfit
        chosen = [name for name in names if name in linear]
    else:
        chosen = [name for name in names if _named(name, target_modules)]
    if layers is not None:
        chosen = _in_layers(base, names, chosen, layers)
    for entry in (exclude_modules,) if isinstance(exclude_modules, str) else exclude_modules:
        pattern = entry if isinstance(exclude_modules, str) else (entry,)
        if not any(_named(name, pattern) for name in names):
            raise ModelError(
                f"lora.exclude_modules: {entry!r} names no module of {_called(base)}. A list holds names or their ends "
                "(`k_proj`, `mlp.down_proj`), a string is a regular expression for whole names."
            )
        chosen = [name for name in chosen if not _named(name, pattern)]
    if not chosen:
        raise ModelError(
            f"lora: target_modules {target_modules!r}, exclude_modules {exclude_modules!r} and layers {layers!r} leave "
            f"no module of {_called(base)} to adapt."
        )
    return LoraTargets(chosen, " and ".join(left_out))


def end_of_name(name: str) -> str:
    """What a module is called in every layer: its name behind the number of its layer (`mlp.down_proj`)."""
    return re.split(r"\.\d+\.", name)[-1]


def _named(name: str, entries: str | tuple[str, ...]) -> bool:
    """Whether settings name a module, as PEFT has it."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _text_decoder(base: "PreTrainedModel") -> str:
    """The name of the text decoder in a multimodal model; empty for a model of text alone."""
    if base.config.get_text_config() is base.config:
        return ""
    decoder = base.get_decoder()
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _linear_layers(base: "PreTrainedModel") -> Iterator[str]:
    """The linear layers, output embeddings left out: what PEFT takes for `all-linear`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            yield name


def _unfit(base: "PreTrainedModel") -> set[str]:
    """Linear layers that PEFT refuses by their name, and those whose output is not [..., out] of inputs [..., in]."""
    refused = {name.rpartition(".")[2] for name in _linear_layers(base)}
    refused = {name for name in refused if refused_by_name(base, name)}
    return {
        name
        for name in _linear_layers(base)
        if name.rpartition(".")[2] in refused or not _gives_rows(base.get_submodule(name))
    }


def _gives_rows(module: "nn.Module") -> bool:
    """Whether a linear layer, be it of a class of its own, makes [1, 3, out] of [1, 3, in] (one in groups does not)."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    weight = cast("torch.Tensor", module.weight)
    if type(module) in (nn.Linear, Conv1D) or not weight.is_floating_point():
        return True
    size, out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
    inputs = torch.zeros(1, 3, size, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            found = module(inputs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 3, out)


def _experts(base: "PreTrainedModel") -> set[str]:
    """Every module inside of routed experts, routers, and what PEFT can name only together with stacked experts.

    A block of a mixture is a module with a part that is called `experts`, or is of a class called so. Its parts that
    are called gate or router choose among the experts; the others (shared experts, attention) see every token.
    """
    found: set[str] = set()
    for name, block in base.named_modules():
        parts = dict(block.named_children())
        routed = {key for key, part in parts.items() if key == "experts" or _class_of_experts(part)}
        if not routed:
            continue
        routed |= {key for key in parts if key == "gate" or key.endswith("_gate") or "router" in key}
        for key in routed:
            inside = (end for end, _ in parts[key].named_modules())
            found |= {".".join(filter(None, (name, key, end))) for end in inside}
    if found:
        stacked = names_of_stacked_experts(base.config.model_type)
        found |= {name for name, _ in base.named_modules() if name.rpartition(".")[2] in stacked}
    return found


def _class_of_experts(module: "nn.Module") -> bool:
    return type(module).__name__.endswith("Experts")


def _in_layers(base: "PreTrainedModel", names: list[str], chosen: list[str], layers: tuple[int, ...]) -> list[str]:
    """Those of `chosen` that lie in these decoder layers. Raises ModelError for a number that is none."""
    numbers = {name: found for name in names if (found := _layer_of(name)) is not None}
    there = set(numbers.values())
    if unknown := [layer for layer in layers if layer not in there]:
        raise ModelError(
            f"lora.layers: {_called(base)} has no decoder layer {unknown[0]}; its {len(there)} layers are numbered "
            f"{min(there, default=0)} to {max(there, default=0)}."
        )
    return [name for name in chosen if numbers.get(name) in layers]


def _layer_of(name: str) -> int | None:
    """The first number in a module's name: that of its decoder layer (experts are numbered behind it)."""
    found = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _called(base: "PreTrainedModel") -> str:
    return base.name_or_path or type(base).__name__
