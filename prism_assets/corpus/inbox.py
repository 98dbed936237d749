"""The inbox: which files there are, which of them are whole, and the shard key of each.

A shard is one file's content: its key is ``<name>-<first 12 digits of the content's SHA-256>``, so an edited
file is another shard. Two files of one name and one content (in different folders) are one shard, read from
the path that sorts first; the others are reported.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from prism_assets.corpus.files import DATA_EXTENSIONS, LINK_ADVICE, data_extension
from prism_assets.corpus.other_files import describes_a_dataset
from prism_assets.resources.file_hashes import FileHashes, seconds_since_change
from prism_assets.resources.regular_files import leads_outside

AT_REST_SECONDS = 2.0
PARTIAL_EXTENSIONS = (".tmp", ".part", ".partial", ".crdownload", "~")
NAME_CHARACTERS, QUOTED_CHARACTERS = 60, 160


class InboxFile(NamedTuple):
    """One shard's file. ``settled`` is False while the file was changed less than ``at_rest_seconds`` ago."""

    key: str
    path: Path
    size: int
    sha256: str
    settled: bool


class Ignored(NamedTuple):
    """A file that is no shard, and why."""

    path: Path
    reason: str


class Scan(NamedTuple):
    """What a folder holds: shards sorted by key, ignored files sorted by path."""

    files: list[InboxFile]
    ignored: list[Ignored]


def scan(
    folder: Path | str,
    cache_path: Path | str | None = None,
    at_rest_seconds: float = AT_REST_SECONDS,
    follow_links: bool = False,
) -> Scan:
    """Lists the data files under ``folder``, its subfolders included.

    Hidden files and folders are passed over; all else that is no data file is in ``ignored`` with a reason, symbolic
    links to folders included, and links out of the inbox unless ``follow_links``. Hashes are remembered in the JSON
    file ``cache_path``, by path, size and modification time. Raises FileNotFoundError or NotADirectoryError where there
    is no such folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"the inbox {folder} does not exist: create it, or correct the settings")
    if not folder.is_dir():
        raise NotADirectoryError(f"the inbox {folder} is a file: name the folder that holds it")
    hashes = FileHashes(Path(cache_path) if cache_path is not None else None)
    files: dict[str, InboxFile] = {}
    ignored: list[Ignored] = []
    inside = None if follow_links else folder
    for path in _walk(folder, ignored):
        problem = _reason_to_ignore(path, inside)
        found = Ignored(path, problem) if problem else _inspect(path, hashes, at_rest_seconds, inside)
        if isinstance(found, Ignored):
            ignored.append(found)
        elif found.key in files:
            first = files[found.key]
            files[found.key] = first._replace(settled=first.settled or found.settled)
            ignored.append(Ignored(path, f"the same name and content as {first.path}"))
        else:
            files[found.key] = found
    hashes.save(below=folder)
    return Scan(sorted(files.values()), sorted(ignored))


def shard_key(file_name: str, sha256: str) -> str:
    """``<name>-<12 digits>``, fit for a path and for a Dagster partition key.

    Only letters and digits of any alphabet, ``_``, ``.`` and ``-`` are kept, and never two dots in a row ("..." means a
    range of partitions). The name without its data extension is cut to 60 characters, and to what a file name may hold
    of it once it is quoted.
    """
    stem = unicodedata.normalize("NFC", file_name[: len(file_name) - len(data_extension(file_name) or "")])
    # Marks too: vowel signs are no letters to Python.
    kept = "".join(one if one in "_.-" or unicodedata.category(one)[0] in "LNM" else " " for one in stem)
    name = re.sub(r"\.{2,}", ".", re.sub(r" +", "_", kept)).strip("._-")[:NAME_CHARACTERS]
    while len(quote(name)) > QUOTED_CHARACTERS:
        name = name[:-1]
    name = name.strip("._-")
    return f"{name or 'shard'}-{sha256[:12]}"


def _walk(folder: Path, ignored: list[Ignored]) -> Iterator[Path]:
    """Visible files, and links to folders, in order of their path; folders that cannot be read go to `ignored`."""
    unreadable: list[OSError] = []
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
        found += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
    ignored += [Ignored(Path(one.filename), f"the folder cannot be read: {one.strerror}") for one in unreadable]
    yield from sorted(found)


def _reason_to_ignore(path: Path, inside: Path | None) -> str | None:
    if inside is not None and path.is_symlink() and leads_outside(path, inside):
        return LINK_ADVICE
    if path.is_dir():
        return "a symbolic link to a folder: put the folder itself into the inbox"
    if path.name.lower().endswith(PARTIAL_EXTENSIONS):
        return "a partial or temporary file, by its extension"
    if data_extension(path.name) is None:
        return f"unknown extension; known are {', '.join(DATA_EXTENSIONS)}"
    if path.suffix.lower() == ".json" and describes_a_dataset(path):
        return "describes a folder of `datasets`, whose .arrow files are read"
    if not path.exists():
        return "a symbolic link to nothing, or removed just now"
    if not path.is_file():
        return "not a regular file"
    return None


def _inspect(path: Path, hashes: FileHashes, at_rest_seconds: float, inside: Path | None) -> InboxFile | Ignored:
    try:
        before = path.stat()
        if before.st_size == 0:
            return Ignored(path, "empty")
        age = seconds_since_change(before)
        sha256 = hashes.sha256(path, before, inside)
        after = path.stat()
    except OSError as error:
        return Ignored(path, f"cannot be read: {error.strerror}")
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    settled = age >= at_rest_seconds and unchanged
    return InboxFile(shard_key(path.name, sha256), path, before.st_size, sha256, settled)
