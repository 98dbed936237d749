"""Rows on their way into the lake: as many as there are, and only a few of them in memory."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_A_BATCH = 4096
_BYTES_A_BATCH = 2**25  # of what rows hold, as their writer counts it


class RowSource(Protocol):
    """Rows that are read in parts."""

    schema: "pa.Schema"
    num_rows: int

    def read(self, start: int, rows: int, columns: Sequence[str] | None = None) -> "pa.Table":
        """So many rows from the row `start`, fewer at the end: all columns, or those named."""
        ...


class Spool:
    """A table that is written row by row and then read in parts: Arrow batches in a file without a name.

    The file lies in `folder` (which must exist) and goes with this object, or with its process. No other thread may use
    it at the same time.
    """

    def __init__(self, schema: "pa.Schema", folder: Path) -> None:
        import pyarrow as pa

        self.schema, self.num_rows = schema, 0
        self._rows: list[Mapping[str, Any]] = []
        self._bytes = 0
        self._file = tempfile.TemporaryFile(dir=folder)
        self._writer: Any = pa.ipc.new_file(
            pa.PythonFile(self._file, "w"), schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
        )
        self._reader: Any = None
        self._starts: list[int] = []  # of each batch, its first row

    def append(self, row: Mapping[str, Any], size: int = 0) -> None:
        """Add a row, of about so many bytes. ValueError once the spool is being read."""
        if self._writer is None:
            raise ValueError("a spool that is being read takes no more rows")
        self._rows.append(row)
        self._bytes += size
        if len(self._rows) == _ROWS_A_BATCH or self._bytes >= _BYTES_A_BATCH:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        self._starts.append(self.num_rows)
        self.num_rows += len(self._rows)
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self.schema))
        self._rows, self._bytes = [], 0

    def finish(self, leave_out: Sequence[str] = ()) -> "Spool":
        """Take no more rows; read no more of the columns that are left out. The spool itself."""
        import pyarrow as pa

        if self._rows:
            self._write()
        self._writer.close()
        self._writer = None
        self._file.flush()
        self._reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
        self.schema = pa.schema([field for field in self.schema if field.name not in leave_out])
        return self

    def read(self, start: int, rows: int, columns: Sequence[str] | None = None) -> "pa.Table":
        """So many rows from the row `start`, fewer at the end: all columns, or those named."""
        import pyarrow as pa

        names = list(columns or self.schema.names)
        schema = pa.schema([self.schema.field(name) for name in names])
        batches = list(self._batches(start, start + rows, names))
        return pa.Table.from_batches(batches, schema)

    def _batches(self, start: int, end: int, names: list[str]) -> "Iterator[pa.RecordBatch]":
        for number, first in enumerate(self._starts):
            after = self._starts[number + 1] if number + 1 < len(self._starts) else self.num_rows
            if after > start and first < end:
                batch = self._reader.get_batch(number).select(names)
                yield batch.slice(max(start - first, 0), min(end, after) - max(start, first))


def rows_between(
    rows: "pa.Table | RowSource", start: int, count: int, columns: Sequence[str] | None = None
) -> "pa.Table":
    """So many rows of a table or another source from the row `start`, fewer at the end: all columns, or those named."""
    import pyarrow as pa

    if not isinstance(rows, pa.Table):
        return rows.read(start, count, columns)
    table = cast("Any", rows)
    return (table if columns is None else table.select(list(columns))).slice(start, count)
