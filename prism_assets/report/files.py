"""Where pages are written, and what their JSON begins with."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_assets.stage import Stage


def page_head(stage: Stage) -> dict[str, Any]:
    """What the JSON of every page begins with: when, of which model and with which settings it was made."""
    kind = stage.model_identity.quantized
    quantized = f" in {kind}" if kind else ""
    return {
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": {"name": f"{stage.settings.model.name}{quantized}", "fingerprint": stage.model_identity.fingerprint},
        "settings": stage.settings.model_dump(mode="json"),
    }


def relative_to(value: Any, folder: Path) -> Any:
    """A JSON value with absolute paths, of what there is or may be made, as seen from a folder."""
    if isinstance(value, Mapping):
        return {name: relative_to(one, folder) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [relative_to(one, folder) for one in value]
    is_path = isinstance(value, str) and os.path.isabs(value) and len(Path(value).parts) > 2  # "/n" may be a separator
    if is_path and os.path.exists(os.path.dirname(value)):
        return os.path.relpath(value, folder)
    return value


def replace_texts(folder: Path, texts: Mapping[str, str]) -> Path:
    """Write files, each renamed into place whole; returns the folder, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        draft = folder / f".{name}.{os.getpid()}"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, folder / name)
    return folder
