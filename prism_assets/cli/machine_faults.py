"""What the machine refuses, and not the user's data: full or read-only disks, permissions, a damaged Dagster history.

Such an error comes out of whatever library met it; here it gets a sentence that says what to do. What was finished is
in the lake, so every one of them ends in: mend it and run again.
"""

import errno
import os
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from prism_assets.resources.store import DISK_FULL

_DENIED = (errno.EACCES, errno.EPERM)
_LITTLE_BYTES = 2**20
_AGAIN = "What was finished is kept; run again then."


def advice(error: BaseException) -> str | None:
    """What to do about an error that is the machine's; None for any other, which is a fault of the program."""
    for one in _chain(error):
        if type(one).__module__.partition(".")[0] in ("sqlalchemy", "sqlite3", "alembic") and _met_by_dagster(error):
            return _of_the_database(str(one))
        if isinstance(one, OSError) and one.errno is not None:
            found = _of_the_disk(one)
            if found:
                return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, the first of them last. What was merely being handled is not the cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _met_by_dagster(error: BaseException) -> bool:
    """Whether Dagster was at work where an error came up: others have databases too (MLflow its own)."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("dagster" in Path(name).parts for name in frames)


def _of_the_disk(error: OSError) -> str | None:
    where = error.filename or "the disk"
    if error.errno in DISK_FULL:
        return f"The disk of {where} is full. Free some space (`prism gc` lists what no kept version needs). {_AGAIN}"
    if error.errno == errno.EROFS:
        return f"{where} is on a read-only file system, and this command has to write. Mount it for writing. {_AGAIN}"
    if error.errno in _DENIED:
        return f"{where}: permission denied. Let this user read and write it (chmod, chown). {_AGAIN}"
    if error.errno == errno.EIO:
        return f"{where} cannot be read or written: the disk reports an input/output error. Look at the disk. {_AGAIN}"
    return None


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < _LITTLE_BYTES


def _of_the_database(words: str) -> str:
    """Dagster keeps runs, events and schedules in SQLite files, which no result depends on."""
    home = Path(os.environ.get("DAGSTER_HOME", "."))
    said = (words.strip().splitlines() or ["no reason given"])[0].rpartition(") ")[2]
    what = f"Dagster's own database in {home} cannot be used: {said}."
    lowered = words.lower()
    # SQLite calls a full disk an input/output error where it meets it in its journal.
    if "full" in lowered or ("i/o error" in lowered and _is_full(home)):
        return f"{what} The disk is full: free some space. {_AGAIN}"
    if "readonly" in lowered or "read-only" in lowered or "unable to open" in lowered:
        return f"{what} Let this user write there, or set DAGSTER_HOME to a folder that can be written. {_AGAIN}"
    if any(one in lowered for one in ("not a database", "malformed", "corrupt", "more than one head")):
        return (
            f"{what} It holds the history of runs, no result: move {home / 'history'} and {home / 'schedules'} away. "
            "What was finished is in the lake and is found again; the UI begins a new history."
        )
    if "locked" in lowered:
        return f"{what} Another process holds it: wait for it, or end it. {_AGAIN}"
    return f"{what} {_AGAIN}"
