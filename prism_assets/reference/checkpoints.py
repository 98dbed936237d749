"""Warm-up checkpoints as files, and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from prism_assets.sft.checkpoints import Checkpoint

_LIST = "checkpoints.json"


class WarmupCheckpoint(NamedTuple):
    """One point θ_k: the LoRA parameters, the learning rate that led there and AdamW's state."""

    step: int
    mean_learning_rate: float
    lora: "dict[str, torch.Tensor]"
    exp_avg: "dict[str, torch.Tensor]"
    exp_avg_sq: "dict[str, torch.Tensor]"
    optimizer_step: int
    betas: tuple[float, float]
    eps: float


def write_checkpoints(folder: Path, checkpoints: "Sequence[Checkpoint]") -> None:
    """A safetensors file for each checkpoint, and the list of them."""
    from safetensors.torch import save_file

    entries = []
    for position, checkpoint in enumerate(checkpoints):
        name = f"checkpoint-{position}.safetensors"
        states = {"lora": checkpoint.lora_state, "exp_avg": checkpoint.exp_avg, "exp_avg_sq": checkpoint.exp_avg_sq}
        tensors = {
            f"{kind}/{parameter}": tensor.detach().cpu().contiguous()
            for kind, state in states.items()
            for parameter, tensor in state.items()
        }
        save_file(tensors, folder / name)
        entries.append(
            {
                "file": name,
                "step": checkpoint.step,
                "mean_learning_rate": checkpoint.mean_learning_rate,
                "optimizer_step": checkpoint.optimizer_step,
                "betas": list(checkpoint.betas),
                "eps": checkpoint.eps,
            }
        )
    (folder / _LIST).write_text(json.dumps(entries, indent=1))


def read_checkpoints(folder: Path) -> list[WarmupCheckpoint]:
    """The checkpoints in a folder, in training order."""
    from safetensors.torch import load_file

    checkpoints = []
    for entry in json.loads((folder / _LIST).read_text()):
        tensors = load_file(folder / entry.pop("file"))
        kinds: dict[str, dict[str, torch.Tensor]] = {"lora": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition("/")
            kinds[kind][parameter] = tensor
        entry["betas"] = tuple(entry["betas"])
        lora, exp_avg, exp_avg_sq = (kinds[kind] for kind in ("lora", "exp_avg", "exp_avg_sq"))
        checkpoints.append(WarmupCheckpoint(**entry, lora=lora, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq))
    return checkpoints


def learning_rates(folder: Path) -> list[float]:
    """The mean learning rate of each checkpoint in a folder."""
    return [one["mean_learning_rate"] for one in json.loads((folder / _LIST).read_text())]
