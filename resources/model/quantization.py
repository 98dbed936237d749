"""How a model is quantised by bitsandbytes: what its checkpoint says, what the setting asks for, how it is loaded."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prism_assets.errors import ModelError

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'prism-assets[quantized]'"
# What transformers' BitsAndBytesConfig is given for each value of the setting; nf4 with scales quantised too, as QLoRA.
ASKED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def kind_in(config: Mapping[str, Any]) -> str | None:
    """How bitsandbytes has quantised a checkpoint, by its config.json: nf4, fp4 or int8. None where it has not; other
    methods are left to transformers."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    in_four = found.get("load_in_4bit", found.get("_load_in_4bit"))
    in_eight = found.get("load_in_8bit", found.get("_load_in_8bit"))
    if found.get("quant_method") != "bitsandbytes" and not (in_four or in_eight):
        return None
    return str(found.get("bnb_4bit_quant_type") or "fp4") if in_four else "int8"


def kind_of(setting: str, config: Mapping[str, Any], folder: Path) -> str | None:
    """How the model is quantised: as its checkpoint is, else as the setting model.quantization asks; None: not at all.

    Raises ModelError where the two are at odds, where another method has quantised the checkpoint that the setting is
    about, and where bitsandbytes is needed and not installed.
    """
    there, asked = kind_in(config), None if setting == "none" else setting
    other = config.get("quantization_config")
    if asked and there is None and isinstance(other, Mapping):
        raise ModelError(
            f"model.quantization: {asked} was asked for, but {folder} is quantised already (quant_method "
            f"{other.get('quant_method')!r} in its config.json): name the model that it was made from."
        )
    if asked and there and asked != there:
        raise ModelError(
            f"model.quantization: {asked} was asked for, but the weights in {folder} are {there} already (quantization_"
            f"config in its config.json): leave the setting out, or name the model that they were made from."
        )
    if there == "int8" and cast("Mapping", other).get("llm_int8_has_fp16_weight"):
        raise ModelError(
            f"model.name: {folder} keeps float16 weights that are quantised in every product "
            "(llm_int8_has_fp16_weight in its config.json), which is not supported: set that to false."
        )
    kind = there or asked
    if kind and find_spec("bitsandbytes") is None:
        where = f"the weights in {folder} are {kind}" if there else f"model.quantization is {kind}"
        raise ModelError(f"{where}, which takes bitsandbytes: `{INSTALL}`.")
    return kind


def loading(kind: str, config: Mapping[str, Any], dtype: "torch.dtype", device: "torch.device") -> dict[str, Any]:
    """What `from_pretrained` is told of a quantised model."""
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": {"": device}}
    if kind_in(config):
        return options  # the checkpoint says all
    options["quantization_config"] = BitsAndBytesConfig(**ASKED[kind], bnb_4bit_compute_dtype=dtype)
    return options
