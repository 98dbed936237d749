"""The header of an artefact: in the Parquet footer, in safetensors' metadata, or in a folder's `artifact.json`."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_assets.errors import DamagedArtifact
from prism_assets.resources.lake.recipe import SIDECAR, Artifact, Recipe

HEADER_KEY = "prism"


def new_header(recipe: Recipe, content_hash: str, run_id: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """The header of something made from this recipe, as plain JSON values."""
    header = {
        "table": recipe.table,
        "version": recipe.version,
        "partition": recipe.partition,
        "fingerprint": recipe.fingerprint,
        "content_hash": content_hash,
        "stage_version": recipe.stage_version,
        "settings": dict(recipe.settings),
        "inputs": {role: _reference(value) for role, value in recipe.inputs.items()},
        "lineage": {role: _reference(value) for role, value in recipe.lineage.items()},
        "run_id": run_id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "notes": dict(notes),
    }
    return json.loads(json.dumps(header, default=_plain))


def header_of(path: Path) -> Mapping[str, Any]:
    """The header of a file or folder. Raises DamagedArtifact where there is none to be read.

    A file's is read once a process while the file stays the same: many partitions ask for the same ones.
    """
    status = path.stat()
    if path.is_dir():  # what lies in a folder does not show in its own status
        return _read(path)
    return _known_header(path, status.st_size, status.st_mtime_ns, status.st_ino)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a folder artefact by relative name, the sidecar left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SIDECAR)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@lru_cache(maxsize=16384)
def _known_header(path: Path, size: int, modified: int, inode: int) -> Mapping[str, Any]:
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            header = json.loads((path / SIDECAR).read_text())
            found = sizes(path)
            if header.get("files", found) != found:
                raise DamagedArtifact(f"{path} is damaged (a file is missing, is too many or has another size).")
            return header
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return json.loads(pq.read_metadata(path).metadata[HEADER_KEY.encode()])
        from safetensors import safe_open

        with safe_open(path, framework="np") as handle:
            return json.loads(handle.metadata()[HEADER_KEY])
    except FileNotFoundError as error:
        raise DamagedArtifact(f"{path} is incomplete: {error}.") from error
    except DamagedArtifact:
        raise
    except Exception as error:  # pyarrow, safetensors and json each have their own for a broken file
        raise DamagedArtifact(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def _reference(value: "Artifact | Sequence[Artifact] | str") -> Any:
    if isinstance(value, Artifact):
        return {"table": value.table, "fingerprint": value.fingerprint, "content_hash": value.content_hash}
    return {"content_hash": value} if isinstance(value, str) else [_reference(one) for one in value]


def _plain(value: Any) -> Any:
    """JSON for numpy scalars and arrays."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
