"""Hashes of file contents that are remembered, so that a file is read again only after it has changed."""

import hashlib
import json
import os
import time
from pathlib import Path

from prism_assets.resources.private_folders import make_private
from prism_assets.resources.regular_files import open_regular
from prism_assets.resources.store import unless_read_only

# A hash is remembered only for a file older than this: a younger one may be written again within one tick of
# the file system's clock, with the same size and modification time.
YOUNG_SECONDS = 2.0


def seconds_since_change(status: os.stat_result) -> float:
    """Seconds since a file was last changed.

    A modification time ahead of the clock (a copy from a machine whose clock is fast) would never be
    old enough; there, the time at which this machine changed the file counts.
    """
    now = time.time()
    changed = status.st_mtime if status.st_mtime <= now else status.st_ctime
    return max(0.0, now - changed)


class FileHashes:
    """SHA-256 by absolute path, size and modification time, kept in a JSON file: {path: [size, ns, SHA-256]}.

    Without a `path` nothing is remembered beyond this object. A JSON file that is absent, damaged or of another kind
    costs only time.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stored = _read(path)
        self._seen: dict[str, list] = {}  # what this object was asked for, without young files

    def sha256(self, file: Path, status: os.stat_result | None = None, inside: Path | None = None) -> str:
        """The SHA-256 of a file's content, in hexadecimal; `status` where the caller has it already.

        Symbolic links are followed to the content, but the hash is remembered under the path as given. With `inside`
        the file must lie in that folder. Raises OSError where the file cannot be read.
        """
        status = status or file.stat()
        name, stamp = os.path.abspath(file), [status.st_size, status.st_mtime_ns]
        known = self._seen.get(name) or self._stored.get(name)
        if known and known[:2] == stamp:
            digest = known[2]
        else:
            with open_regular(file, inside) as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        if seconds_since_change(status) >= YOUNG_SECONDS:
            self._seen[name] = [*stamp, digest]
        return digest

    def save(self, below: Path | None = None) -> None:
        """Replace the JSON file as a whole, if anything is new. In a lake that can only be read it stays as it is.

        Of the files under the folder `below`, only those that this object was asked for are kept: the others are gone.
        """
        if self.path is None:
            return
        inside = os.path.join(os.path.abspath(below), "") if below is not None else None
        others = {name: entry for name, entry in self._stored.items() if inside is None or not name.startswith(inside)}
        kept = others | self._seen
        if kept == self._stored:
            return
        with unless_read_only():
            for folder in (self.path.parent.parent, self.path.parent):
                make_private(folder)
            draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            draft.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(draft, self.path)
        self._stored = kept


def _read(path: Path | None) -> dict[str, list]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):  # absent or damaged
        return {}
    if not isinstance(stored, dict):
        return {}
    return {name: entry for name, entry in stored.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    """[size, modification time in ns, SHA-256]"""
    return isinstance(entry, list) and [type(value) for value in entry] == [int, int, str]
