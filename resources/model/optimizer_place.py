"""Where the optimiser state of a fine-tuning run lies, and the hash of its content."""

import hashlib
from pathlib import Path

from prism_assets.errors import UnreadableFile
from prism_assets.resources.file_hashes import FileHashes

METADATA = ".metadata"
# Where the Trainer and accelerate put them in a checkpoint: of one process, of FSDP as a whole, of FSDP in shards.
_PLACES = ("optimizer.pt", "optimizer.bin", "optimizer_0")


def locate(path: Path) -> Path:
    """The file, or the folder of a distributed checkpoint, that holds the state: `path`, or a part of it.

    Raises UnreadableFile where there is none, where there are several, and for DeepSpeed's.
    """
    if path.is_file() or (path / METADATA).is_file():
        return path
    if not path.is_dir():
        raise UnreadableFile(path, "warmup.optimizer_state names nothing that is there")
    found = [path / name for name in _PLACES if (path / name).is_file() or (path / name / METADATA).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(one.name for one in found)
        raise UnreadableFile(path, f"holds {names}: let warmup.optimizer_state name one of them")
    if any(path.glob("global_step*")) or any(path.glob("**/zero_pp_rank_*")):
        raise UnreadableFile(
            path, "holds a state of DeepSpeed, which is not read: only that of the Trainer and of FSDP"
        )
    if any(path.glob("optimizer_*_rank*.bin")):
        raise UnreadableFile(path, "holds a file for each process, which is not read: save with use_dcp=True")
    raise UnreadableFile(
        path, f"holds no {', '.join(_PLACES)}: was the checkpoint saved with save_only_model? name a folder with one"
    )


def files_of(place: Path) -> list[Path]:
    """The files of what `locate` has found."""
    return [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())


def content_hash(path: Path, known_hashes: Path | None) -> str:
    """The hash of the state at `path`: 32 hex digits. Of a file its name is no part of it, nor is its place."""
    place, known = locate(path), FileHashes(known_hashes)
    files = files_of(place)
    parts = [f"{'' if file == place else file.name}:{known.sha256(file)}" for file in files]
    known.save()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
