"""The store: the one place that owns paths. Keys are relative names with slashes, stored below a folder.

Two ways to write: `put_new` gives a key its content once, and of two writers the first wins; `put` replaces, as a head
or a cache entry needs it. Both are atomic: no reader finds half a file, and a killed writer leaves a draft at most.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_assets.errors import LakeError
from prism_assets.resources.private_folders import make_private

DRAFTS = "unpublished"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What os.link says on a file system that has none.
_NO_HARD_LINKS = (
    *(errno.EPERM, errno.EACCES, errno.EXDEV),
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK),
)


class FolderStore:
    """Files and folders below `root`, which is made when first needed, for its owner alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def local(self, key: str) -> Path:
        """Where the content of a key can be read on this machine."""
        return self.root / key

    def key_of(self, path: Path) -> str | None:
        """The key of a path below the store, None for another."""
        root = self.root.resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

    def exists(self, key: str) -> bool:
        """Whether there is a file or folder at the key."""
        return self.local(key).exists()

    def keys(self, pattern: str) -> list[str]:
        """Keys that match a glob pattern, in order. Folders are keys too."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def files(self, pattern: str) -> list[str]:
        """As `keys`, files alone."""
        return [key for key in self.keys(pattern) if self.local(key).is_file()]

    # -- writing -----------------------------------------------------------------------------------------------

    def put_new(self, key: str, write: Callable[[Path], None]) -> None:
        """Give a key the file or folder that `write(path)` makes, unless it has one: then that one stays."""
        with self._draft(key) as draft:
            write(draft)
            _flush(draft)
            _move_unless_there(draft, self._place(key))

    def put(self, key: str, write: Callable[[Path], object], durable: bool = True) -> None:
        """Give a key the file that `write(path)` makes, in place of what it has.

        `durable` False does not wait for the disk: for what can be made again.
        """
        with self._draft(key) as draft:
            write(draft)
            if durable:
                _flush(draft)
            os.replace(draft, self._place(key))

    def workshop(self) -> Path:
        """The folder of half-written things, made if it is not there; always safe to empty."""
        make_private(self.root)
        workshop = self.root / DRAFTS
        workshop.mkdir(parents=True, exist_ok=True)
        return workshop

    @contextmanager
    def _draft(self, key: str) -> Iterator[Path]:
        """A path of its own for something half-written; nothing is left there at the end."""
        draft = self.workshop() / f"{uuid.uuid4().hex}{Path(key).suffix}"
        try:
            yield draft
        finally:
            _remove(draft)

    def _place(self, key: str) -> Path:
        make_private(self.root)
        place = self.root / key
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    # -- removing ----------------------------------------------------------------------------------------------

    def set_aside(self, key: str) -> str:
        """Take something damaged out of the way, so that it counts as not made; returns a sentence that says so."""
        path = self.local(key)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as error:
            return f"It cannot be moved aside ({error.strerror}): do that, or remove it, and it will be rebuilt."
        return f"It was moved to {aside.name} and will be rebuilt."

    def delete(self, key: str) -> None:
        """Remove a small file; nothing happens where there is none."""
        self.local(key).unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Remove a file or a folder: it is renamed first, so no reader finds half of it."""
        with self._draft(f"{key}.removed") as draft, suppress(FileNotFoundError):
            os.replace(self.local(key), draft)

    # -- sizes and ages ----------------------------------------------------------------------------------------

    def size(self, key: str) -> int:
        """Bytes of a file, or of all files of a folder; 0 where it vanished meanwhile."""
        path = self.local(key)
        with suppress(FileNotFoundError):
            files = (path,) if path.is_file() else path.rglob("*")
            return sum(file.stat().st_size for file in files if file.is_file())
        return 0

    def changed(self, key: str) -> float:
        """When anything at the key was last written, seconds since the epoch; now, where it vanished meanwhile."""
        path = self.local(key)
        with suppress(FileNotFoundError):
            return max(file.stat().st_mtime for file in (path, *(path.rglob("*") if path.is_dir() else ())))
        return time.time()

    # -- errors ------------------------------------------------------------------------------------------------

    @contextmanager
    def disk_errors(self, what: str) -> Iterator[None]:
        """Turn a full disk, whichever library reports it, into a LakeError that says what was not published."""
        try:
            yield
        except Exception as error:
            if not _says_disk_full(error):
                raise
            free = shutil.disk_usage(self.root).free / 2**20
            raise LakeError(
                f"The disk of the lake {self.root} is full ({free:.0f} MiB free): {what} was not "
                "published and nothing half-written is left. Free some space (`prism gc` lists what no kept "
                "version needs) and run again: finished work is kept."
            ) from error


@contextmanager
def unless_read_only() -> Iterator[None]:
    """For what is remembered to save time: where nothing may be written, it is not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def _move_unless_there(draft: Path, target: Path) -> None:
    """Give a draft its place in one atomic step. The second of two writers leaves the first one's content as it is."""
    try:
        if draft.is_dir():
            os.replace(draft, target)  # fails where a folder with files is in place
        else:
            os.link(draft, target)  # a rename would replace the winner's file
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and target.exists():
            return
        if draft.is_dir() or error.errno not in _NO_HARD_LINKS:
            raise
        os.replace(draft, target)


def _says_disk_full(error: Exception) -> bool:
    """safetensors and FAISS put the operating system's words into exceptions of their own."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return any(os.strerror(number) in str(error) for number in DISK_FULL)


def _flush(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():  # asked first: on a read-only file system even a file that is not there cannot be removed
        path.unlink(missing_ok=True)
