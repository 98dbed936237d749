"""Folders that hold what people brought: made for their owner alone, whatever the umask; an existing one stays as it
is, since its owner may have opened it to a group."""

import stat
from pathlib import Path

_OWNER_ALONE = 0o700
_OTHERS = stat.S_IRWXO


def make_private(folder: Path) -> None:
    """Make a folder, where there is none, that only its owner enters; parents that are missing are made as usual."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=_OWNER_ALONE, exist_ok=True)


def open_to_all(folder: Path) -> bool:
    """Whether every user of this machine may read, enter or change a folder."""
    return folder.is_dir() and bool(folder.stat().st_mode & _OTHERS)
