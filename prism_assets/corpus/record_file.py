"""A file of records that becomes tables of the lake: what it is, and what is known of it before it is read."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.corpus.records import Example, Reject

# The field of a reject that is about a whole file.
WHOLE_FILE = "file"


class RecordFile(NamedTuple):
    """A file to be read into two tables."""

    path: Path
    sha256: str
    table: str  # of the accepted rows
    rejects: str  # table of the records that were not accepted
    partition: str
    schema: "pa.Schema"
    read: "Callable[[Path], Iterator[Example | Reject]]"
    inside: Path | None = None  # the folder that it must lie in
    columns: Mapping[str, str] = {}  # of the settings: by our name the file's own
    fields: str | None = None  # table of the accepted records' other fields; None: they are not kept
    may_be_unreadable: bool = False  # then a file that cannot be read has one reject; else UnreadableFile is raised
