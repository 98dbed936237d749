"""Folders that an export writes: never over something else, and whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from prism_assets.errors import CannotExport


def check_free(place: Path, known: Collection[str], force: bool) -> None:
    """Only what an export wrote (the files `known`) is ever replaced: `--to .` must not take a project's own `data`
    with it. Raises CannotExport."""
    if not os.path.lexists(place):
        return
    if not force:
        raise CannotExport(
            f"{place} is there already: name another folder, or use --force to replace an earlier export."
        )
    plain = place.is_dir() and not place.is_symlink()
    others = [one.name for one in place.iterdir() if one.name not in known] if plain else ["it"]
    if others:
        raise CannotExport(
            f"{place} was not written by an export ({others[0]} is no file of one): name another folder."
        )


def make_folder(folder: Path) -> None:
    """The folder that exports are written into. Raises CannotExport where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotExport(f"{folder} cannot be made ({error.strerror}): name another folder.") from error


def put(place: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then rename into place."""
    draft = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        write(draft)
        if place.exists():
            shutil.rmtree(place)
        os.replace(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
