"""Starting adapters: PEFT LoRA folders that training and gradients begin from, checked before they count.

PEFT passes over tensors that it does not know, leaves fresh what a file lacks, and asks nobody whether the base is the
one that the adapter was trained on. Here each of these is an error.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_assets.errors import ModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = FILES = ("adapter_config.json", "adapter_model.safetensors")

# Initialisations that leave the base as it is. The others (pissa, pissa_niter_*, olora, loftq, corda, lora_ga) have
# PEFT
# write a residual into the base whenever the adapter is loaded, and `unload` does not take it out again.
_LEAVES_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises ModelError where a file is missing or the adapter is no LoRA that leaves
    the base alone."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ModelError(f"model.adapter: {folder} has no {' and no '.join(missing)}: name a PEFT LoRA folder.")
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.adapter: {path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError(f"model.adapter: {path} has peft_type {kind!r}; only LORA can be started from.")
    initialised = config.get("init_lora_weights", True)
    known = initialised.lower() if isinstance(initialised, str) else initialised
    if known not in _LEAVES_THE_BASE:
        raise ModelError(
            f"model.adapter: {folder} was made with init_lora_weights {initialised!r}, which changes the base model "
            "whenever the adapter is loaded. Convert it to plain LoRA: load it with PEFT and call "
            "`save_pretrained(folder, path_initial_model_for_weight_conversion=…)` with the adapter as it was before "
            "training (PEFT's guide on LoRA initialisation shows it). Where model.name is the residual model already, "
            f"set init_lora_weights to true in {CONFIG}."
        )
    return config


def check_base(
    folder: Path, config: Mapping[str, Any], model_name: str, declared: str | None, same_weights: Callable[[Path], bool]
) -> None:
    """Raises ModelError where the adapter names another base than `model_name`.

    It names the same one by the same text, by the same last part (folders move, organisations do not matter), or by a
    folder here with the same weights (`same_weights`). `declared` is the setting model.adapter_base: the name in the
    adapter's configuration that the user says is `model_name`. An adapter that names no base passes.
    """
    recorded = str(config.get("base_model_name_or_path") or "")
    if declared is not None and declared != recorded:
        raise ModelError(
            f"model.adapter_base: {declared!r} is not what {folder / CONFIG} names as its base, which is {recorded!r}: "
            "write that, or leave the setting out."
        )
    if not recorded or declared is not None or recorded == model_name or _last_part(recorded) == _last_part(model_name):
        return
    if Path(recorded).is_dir() and same_weights(Path(recorded)):
        return
    raise ModelError(
        f"model.adapter: {folder} was trained on {recorded!r} (base_model_name_or_path in its {CONFIG}), and "
        f"model.name is {model_name!r}. Name the adapter's own base in model.name; or, where the two are the same "
        f"model under two names, say so with `adapter_base: {json.dumps(recorded, ensure_ascii=False)}` under `model:`."
    )


def _last_part(name: str) -> str:
    """`qwen3-0.6b` of Qwen/Qwen3-0.6B, of /models/Qwen3-0.6B/ and of the hub's cache, …/models--Qwen--Qwen3-0.6B/…"""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else (parts or [""])[-1]
    return last.lower()


def load(base: "PreTrainedModel", folder: Path) -> "PeftModel":
    """The base model with the adapter of a folder, trainable. Raises ModelError, naming the first of the tensors that
    are missing, unknown or of another shape, and their number."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    config.base_model_name_or_path = base.name_or_path or None  # which model this is was checked already
    model = get_peft_model(base, config)
    adapter = model.active_adapter
    assert isinstance(model, PeftModel) and isinstance(adapter, str)
    where = f"model.adapter: {folder} does not fit {base.name_or_path or type(base).__name__}"
    try:
        # PEFT's own loader: it renames what older releases of transformers named otherwise.
        result = model.load_adapter(str(folder), adapter, is_trainable=True)
    except RuntimeError as error:
        check_fit(get_peft_model_state_dict(model), load_file(folder / WEIGHTS), where)
        raise ModelError(f"{where}: {error}") from error
    own = f".{adapter}"
    wrong = [f"{name.replace(own, '')} is missing" for name in result.missing_keys]
    wrong += [f"{name.replace(own, '')} is unknown" for name in result.unexpected_keys]
    if wrong:
        raise ModelError(f"{where}: {wrong[0]} ({len(wrong)} in all).")
    return model


def check_fit(own: "Mapping[str, torch.Tensor]", state: "Mapping[str, torch.Tensor]", where: str) -> None:
    """Raises ModelError where `state` lacks a name of `own`, has another, or has another shape."""
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise ModelError(f"{where}: {wrong[0]} ({len(wrong)} in all).")
