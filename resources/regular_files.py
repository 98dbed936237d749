"""Opening files that others put there: regular files alone, and none outside of a folder where one is given."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_READ = os.O_RDONLY | os.O_CLOEXEC
# A named pipe without a writer would block the opening, a terminal could become that of this process.
_CAREFULLY = _READ | os.O_NONBLOCK | os.O_NOCTTY


class LeadsOutside(PermissionError):
    """A path that leads out of the folder that it must stay in, by a symbolic link."""


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a path, its symbolic links followed, ends outside of a folder."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def open_regular(path: Path, inside: Path | None = None) -> BufferedReader:
    """A regular file, opened to be read; its content is that of the descriptor, whatever becomes of the path.

    With `inside` the file lies in that folder, also where links are exchanged meanwhile: the path is resolved first,
    and then opened part by part without following any link. Raises LeadsOutside, and OSError for a pipe, a socket, a
    device or a folder, without waiting for anything.
    """
    descriptor = os.open(path, _CAREFULLY) if inside is None else _open_inside(path, inside)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb", opener=lambda *_: descriptor)


def _open_inside(path: Path, inside: Path) -> int:
    root, real = Path(os.path.realpath(inside)), Path(os.path.realpath(path))
    outside = LeadsOutside(errno.EACCES, f"a symbolic link leads out of {inside}", str(path))
    if not real.is_relative_to(root) or real == root:
        raise outside
    *folders, name = real.relative_to(root).parts
    at = os.open(root, _READ | os.O_DIRECTORY)
    try:
        for folder in folders:
            below = os.open(folder, _READ | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, _CAREFULLY | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link took the place of what was there just now
            raise outside from error
        raise
    finally:
        os.close(at)
