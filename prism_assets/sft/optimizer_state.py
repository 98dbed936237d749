"""Adam's moments from a fine-tuning run of the user's own, matched to the adapter's parameters by name.

A state of FSDP names its parameters. The Trainer's `optimizer.pt` has their positions only: the Trainer fills two
groups, parameters with weight decay and those without, each in the model's order, so the names of the positions follow
from the model with the same adapter. Number and shape of every tensor must agree, and where the adapter's weights lie
beside the state they must be those of the adapter that gradients are taken at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from prism_assets.compat import names_with_decay
from prism_assets.errors import UnreadableFile
from prism_assets.resources.model.optimizer_place import locate
from prism_assets.sft.checkpoints import Checkpoint, trainable_lora_names
from prism_assets.sft.optimizer_files import read_nested

_ADAPTER = "adapter_model.safetensors"


class OptimizerState(NamedTuple):
    """What an optimiser's file says of the parameters of an adapter, by canonical name."""

    form: str  # how the names were found
    exp_avg: dict[str, Tensor]  # float32, as AdamW has it: of the loss, not bias-corrected
    exp_avg_sq: dict[str, Tensor]
    step: int  # t of the bias corrections
    betas: tuple[float, float]
    eps: float
    learning_rate: float  # the one that the schedule began with, where that is noted

    def at(self, model: PeftModel) -> Checkpoint:
        """The adapter of the model as it is, with these moments."""
        parameters = {name: one.detach().cpu().clone() for name, one in trainable_lora_names(model).items()}
        return Checkpoint(
            step=self.step,
            mean_learning_rate=self.learning_rate,
            lora_state=parameters,
            exp_avg=self.exp_avg,
            exp_avg_sq=self.exp_avg_sq,
            optimizer_step=self.step,
            betas=self.betas,
            eps=self.eps,
        )


def read_optimizer_state(path: Path, model: PeftModel) -> OptimizerState:
    """The state at `path` (a checkpoint's folder, or a part of it) for the adapter of `model`, which is in its place.

    Raises UnreadableFile, naming tensor and shapes, where the state is not that of Adam or AdamW over exactly these
    parameters.
    """
    place = locate(path)
    shapes = {name: tuple(one.shape) for name, one in trainable_lora_names(model).items()}
    _check_adapter(place, model)
    found = read_nested(place)
    groups: list[Mapping[str, Any]] = found["param_groups"]
    keys, names, form = _names(place, groups, model)
    entries: dict[str, Mapping[str, Any]] = {}
    for key, name in zip(keys, map(canonical, names), strict=True):
        if name in entries:
            raise UnreadableFile(place, f"has {name} twice: it is a state of several adapters")
        entry = found["state"].get(key)
        entries[name] = entry if isinstance(entry, Mapping) else {}
    _check_names(place, entries, shapes)
    used = [group for group in groups if len(group["params"])]
    betas, eps = _constants(place, used)
    steps = {name: _step(place, name, entry) for name, entry in entries.items()}
    if len(set(steps.values())) != 1:
        least, most = min(steps, key=lambda name: steps[name]), max(steps, key=lambda name: steps[name])
        raise UnreadableFile(
            place, f"has taken {steps[least]} steps of {least} and {steps[most]} of {most}: all must be of one step"
        )
    moments = {
        kind: {name: _moment(place, name, entries[name], kind, shapes[name]) for name in shapes} for kind in _KINDS
    }
    rate = max(float(group.get("initial_lr", group.get("lr", 0.0))) for group in used)
    return OptimizerState(form, moments["exp_avg"], moments["exp_avg_sq"], next(iter(steps.values())), betas, eps, rate)


_KINDS = ("exp_avg", "exp_avg_sq")


def canonical(name: str) -> str:
    """`….lora_A.default.weight` -> `….lora_A.weight`, whatever the adapter is called."""
    return re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name)


# -- names --------------------------------------------------------------------------------------------------------


def _names(place: Path, groups: list[Mapping[str, Any]], model: PeftModel) -> tuple[list[Any], list[str], str]:
    """The keys of the state in the groups' order, the parameter of each, and how that is known."""
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        return keys, keys, "names in the file"
    if all("param_names" in group for group in groups):
        names = [str(name) for group in groups for name in group["param_names"]]
        if len(names) != len(keys):
            raise UnreadableFile(place, f"has {len(keys)} parameters and {len(names)} names of them")
        return keys, names, "names in the file"
    decayed = set(names_with_decay(model))
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = [[name for name in own if name in decayed], [name for name in own if name not in decayed]]
    sizes, wanted = [len(group["params"]) for group in groups], [len(one) for one in expected]
    if sizes != wanted:
        raise UnreadableFile(
            place,
            f"has positions in place of names, in groups of {_listed(sizes)} parameters. The Trainer's two groups for "
            f"this adapter would have {_listed(wanted)} (with weight decay and without): it is the state of another "
            "adapter, or of an optimiser made in another way; save it with names (torch's `named_parameters`)",
        )
    return keys, [name for one in expected for name in one], "the Trainer's order of the model's parameters"


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))


def _check_names(place: Path, entries: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    missing, unknown = (
        [name for name in shapes if name not in entries],
        [name for name in entries if name not in shapes],
    )
    if missing or unknown:
        what = [f"no {missing[0]} ({len(missing)} are missing)"] if missing else []
        what += [f"{unknown[0]}, which the adapter has not ({len(unknown)} in all)"] if unknown else []
        raise UnreadableFile(place, f"has {' and '.join(what)}: it is not the state of model.adapter")


def _check_adapter(place: Path, model: PeftModel) -> None:
    """Raises UnreadableFile where the checkpoint that the state lies in holds another adapter than the model has."""
    beside = place.parent / _ADAPTER
    if not beside.is_file():
        return
    own = {canonical(name): one.detach().cpu() for name, one in trainable_lora_names(model).items()}
    there = load_file(beside)
    for name, value in own.items():
        if name not in there:
            raise UnreadableFile(beside, f"has no {name}: it is not the adapter that model.adapter names")
        other = there[name]
        if other.shape != value.shape:
            raise UnreadableFile(
                beside, f"has {name} of shape {tuple(other.shape)}, that of model.adapter has {tuple(value.shape)}"
            )
        if not torch.equal(other.to(value.dtype), value):
            raise UnreadableFile(
                beside,
                f"has other values of {name} than model.adapter: the state beside it belongs to that adapter; name "
                f"{place.parent} in model.adapter, or the state of the adapter that you start from",
            )


# -- values -------------------------------------------------------------------------------------------------------


def _constants(place: Path, groups: list[Mapping[str, Any]]) -> tuple[tuple[float, float], float]:
    """betas and eps, the same of all groups."""
    for group in groups:
        if "betas" not in group or "eps" not in group:
            raise UnreadableFile(place, "has a group without betas and eps: only states of Adam and AdamW are read")
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise UnreadableFile(place, f"is of an optimiser with {option}, which takes another step than AdamW")
    found = {(tuple(map(float, group["betas"])), float(group["eps"])) for group in groups}
    if len(found) != 1:
        raise UnreadableFile(place, f"has groups of different betas or eps: {sorted(found)}")
    betas, eps = found.pop()
    if len(betas) != 2:
        raise UnreadableFile(place, f"has betas {betas}: only states of Adam and AdamW, with two, are read")
    return cast("tuple[float, float]", betas), eps


def _step(place: Path, name: str, entry: Mapping[str, Any]) -> int:
    if "state1" in entry:
        raise UnreadableFile(
            place,
            f"is of an optimiser of bitsandbytes (state1 of {name}), whose state is not read: train with "
            "optim='adamw_torch'",
        )
    if not entry:
        raise UnreadableFile(place, f"has no state of {name}: the optimiser has not taken a step with it")
    if lacking := [kind for kind in (*_KINDS, "step") if kind not in entry]:
        raise UnreadableFile(place, f"has no {lacking[0]} of {name}: only states of Adam and AdamW are read")
    step = int(entry["step"])
    if step < 1:
        raise UnreadableFile(place, f"has taken {step} steps of {name}: there are no moments yet")
    return step


def _moment(place: Path, name: str, entry: Mapping[str, Any], kind: str, shape: tuple[int, ...]) -> Tensor:
    value = entry[kind]
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UnreadableFile(place, f"has {kind} of {name} of shape {found}, the parameter has {shape}")
    value = value.detach().float().contiguous()
    if not bool(torch.isfinite(value).all()):
        raise UnreadableFile(place, f"has {kind} of {name} with values that are not finite")
    if kind == "exp_avg_sq" and bool((value < 0).any()):
        raise UnreadableFile(place, f"has exp_avg_sq of {name} with negative values")
    return value
