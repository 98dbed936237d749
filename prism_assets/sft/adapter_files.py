"""Adapters as files, with the same bytes for the same parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file


def save_adapter(
    model: PeftModel, folder: Path, card: dict[str, Any] | None = None, *, base_model: str | None = None
) -> None:
    """Write the adapter as PEFT does (`adapter_model.safetensors`, `adapter_config.json`), with the same
    bytes for the same parameters, and `card` as a README.md of one `key: value` line each.

    `base_model` becomes `base_model_name_or_path`; by default it is that of the adapter's
    configuration.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[cast("str", model.active_adapter)].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"inference_mode": True} | ({} if base_model is None else {"base_model_name_or_path": base_model})
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    if card is not None:
        front = f"---\nbase_model: {json.dumps(config['base_model_name_or_path'])}\nlibrary_name: peft\n---\n"
        lines = "".join(
            f"- {key}: {value if isinstance(value, str) else json.dumps(value, default=_plain)}\n"
            for key, value in card.items()
        )
        (folder / "README.md").write_text(front + lines, encoding="utf-8")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", None) or str(value)
