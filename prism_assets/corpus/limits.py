"""What one file of records may take: no file, however it was made, costs all memory or all time.

A compressed file of megabytes can hold gigabytes of one line or of blank lines, a Parquet file a text that every one of
a million rows repeats. Every limit is a setting (`limits`), and what exceeds one is refused with its figure: a record
becomes a reject, a file as a whole raises UnreadableFile.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from prism_assets.corpus.records import BadRecord
from prism_assets.errors import UnreadableFile
from prism_assets.resources.arrow_sizes import BYTES_A_VALUE, decompressed_size
from prism_assets.resources.parquet_footer import column_chunks

FREE_BYTES = 2**26  # what a file may expand to in any case: a small one of little variety is no attack
_SLICE_BYTES = 2**25  # of Parquet rows that are turned into Python values at a time
_SKIP_BYTES = 2**20
_COMPRESSION_BUFFER = 2**16


class Limits(NamedTuple):
    """What may be read of a file. The fields but the first are those of `limits` in prism.yaml."""

    inside: Path | None = None  # the folder that a file must lie in; None: any
    record: int = 16_000_000  # bytes of a line, or of the texts of a row
    expansion: int = 200  # times its own size that a file may expand to, beyond FREE_BYTES
    expanded: int = 32_000_000_000  # bytes that a file may expand to
    blank_lines: int = 1_000_000
    depth: int = 64  # of arrays and objects within each other
    rejects: int = 1_000_000

    def require_expansion(self, path: Path, size: int, expanded: int) -> None:
        """Raise UnreadableFile where a file of `size` bytes expands to more than is allowed."""
        if expanded > self.expanded:
            raise UnreadableFile(
                path,
                f"expands to more than the {self.expanded:,} bytes that limits.expanded allows; split it, or raise it",
            )
        if expanded > max(FREE_BYTES, self.expansion * size):
            raise UnreadableFile(
                path,
                f"expands to more than {self.expansion} times its {size:,} bytes, all that limits.expansion allows; "
                "written text expands to less than 20 times. Look into it, and raise the limit if it is sound",
            )


class _Counted(io.RawIOBase):
    """A stream of decompressed bytes that raises where they are too many for the file."""

    def __init__(self, stream: Any, path: Path, size: int, limits: Limits) -> None:
        self._stream, self._path, self._size, self._limits = stream, path, size, limits
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._total += count
        self._limits.require_expansion(self._path, self._size, self._total)
        return count


def decompressed(file: BinaryIO, compression: str, path: Path, limits: Limits) -> io.BufferedReader:
    """What a compressed file holds. Raises UnreadableFile while it is read."""
    if compression == "gzip":
        stream: Any = _GzipFile(fileobj=file, mode="rb")  # unlike Arrow's it knows zeros at the end as padding
    else:
        import pyarrow as pa  # here, so that listing an inbox needs no pyarrow

        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)
    return io.BufferedReader(_Counted(stream, path, os.fstat(file.fileno()).st_size, limits), _COMPRESSION_BUFFER)


class _GzipFile(gzip.GzipFile):
    """Damage is an OSError, as of any other file."""

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer)
        except (EOFError, zlib.error) as error:
            raise OSError(str(error)) from error


class TooLong(NamedTuple):
    """A line that is longer than allowed: its beginning, and how many bytes it has."""

    beginning: bytes
    size: int


def bounded_lines(stream: Any, path: Path, limits: Limits) -> Iterator[tuple[int, bytes | TooLong]]:
    """The lines that are not blank with their numbers from 1, without line end; no more of a line is held than is
    allowed. Raises UnreadableFile for more blank lines than are allowed."""
    line = blank = 0
    while raw := stream.readline(limits.record + 1):
        line += 1
        if len(raw) > limits.record and not raw.endswith(b"\n"):
            size, rest = len(raw), raw
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(_SKIP_BYTES)
                size += len(rest)
            yield line, TooLong(raw[:_SKIP_BYTES], size - rest.endswith(b"\n"))
            continue
        raw = raw.rstrip(b" \t\r\n")
        if raw:
            yield line, raw
            continue
        blank += 1
        if blank > limits.blank_lines:
            raise UnreadableFile(
                path, f"has more than the {limits.blank_lines:,} blank lines that limits.blank_lines allows"
            )


def too_long(size: int, limits: Limits) -> BadRecord:
    """Why a record of so many bytes is rejected."""
    return BadRecord("", f"{size:,} bytes, and limits.record allows {limits.record:,}")


def require_depth(record: Any, raw: bytes, limits: Limits) -> None:
    """Raise BadRecord for arrays and objects that lie too deep within each other."""
    if raw.count(b"[") + raw.count(b"{") <= limits.depth:
        return
    level: list[Any] = [record]
    for _ in range(limits.depth):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise BadRecord("", f"more than {limits.depth} arrays and objects within each other (limits.depth)")


# -- Parquet and Arrow --------------------------------------------------------------------------------------------


def require_bounded_parquet(raw: BinaryIO, file: Any, columns: list[str], path: Path, limits: Limits) -> None:
    """Raise UnreadableFile where the columns of a Parquet file, by its footer, expand to more than is allowed; OSError
    where the footer cannot be read."""
    leaves = [file.schema.column(number).path.split(".")[0] for number in range(len(file.schema))]
    expanded = 0
    for chunk in column_chunks(raw):
        if not 0 <= chunk.column < len(leaves) or chunk.values < 0 or chunk.uncompressed < 0:
            raise OSError("the footer names a column or a size that there cannot be")
        if leaves[chunk.column] in columns:
            expanded += max(chunk.uncompressed, BYTES_A_VALUE * chunk.values)
    limits.require_expansion(path, os.fstat(raw.fileno()).st_size, expanded)


def require_bounded_arrow(raw: BinaryIO, path: Path, limits: Limits) -> None:
    """Raise UnreadableFile where the batches of an Arrow file or stream, by its messages, expand to more than is
    allowed; OSError where a message cannot be read."""
    limits.require_expansion(path, os.fstat(raw.fileno()).st_size, decompressed_size(raw))


def text_leaves(file: Any, columns: list[str]) -> list[str]:
    """Paths of the columns of texts, to be read as dictionaries: a text that many rows repeat is held once."""
    schema = file.schema
    leaves = [schema.column(number) for number in range(len(schema))]
    return [
        one.path
        for one in leaves
        if one.physical_type == "BYTE_ARRAY" and one.path.split(".")[0] in columns and ".key_value." not in one.path
    ]


def bounded_slices(batch: Any, limits: Limits) -> Iterator[Any]:
    """The rows of an Arrow batch in parts whose texts take no more than `_SLICE_BYTES`; a row that takes more than a
    record may comes as the figure."""
    import pyarrow as pa

    size = bytes_of_rows(batch)
    if batch.num_rows == 1 and size > limits.record:
        yield size
    elif batch.num_rows <= 1 or size <= min(_SLICE_BYTES, limits.record):
        yield batch
    else:
        half = batch.num_rows // 2
        # Taken, not sliced: of a slice with lists Arrow converts all that the lists of the whole hold.
        for rows in (range(half), range(half, batch.num_rows)):
            yield from bounded_slices(batch.take(pa.array(rows)), limits)


def bytes_of_rows(batch: Any) -> int:
    """Bytes of an Arrow batch once each of its texts is written out."""
    return sum(_bytes_of(column) for column in batch.columns)


def _bytes_of(array: Any) -> int:
    """Bytes of an array once each of its texts is written out."""
    import pyarrow as pa
    from pyarrow import compute

    kind = array.type
    if pa.types.is_dictionary(kind):
        return _bytes_of_entries(array)
    if pa.types.is_run_end_encoded(kind):
        raise pa.ArrowInvalid("runs of equal values within a list or struct, which are not read")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return BYTES_A_VALUE * len(array) + _bytes_of(array.flatten())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        if (compute.call_function("sum", [compute.call_function("list_value_length", [array])]).as_py() or 0) > len(
            array.values
        ):
            raise pa.ArrowInvalid("lists that share values with each other")  # to flatten them would copy each share
        return BYTES_A_VALUE * len(array) + _bytes_of(array.flatten())
    if pa.types.is_struct(kind):
        return sum(map(_bytes_of, array.flatten()))
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return _bytes_of_views(array)
    return array.nbytes


def _bytes_of_entries(array: Any) -> int:
    """Bytes of a dictionary's entries, each counted as often as it is named."""
    import pyarrow as pa
    from pyarrow import compute

    kind = array.type.value_type
    if any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        lengths = compute.call_function("binary_length", [array.dictionary])
    else:
        lengths = pa.array([_bytes_of(array.dictionary.slice(entry, 1)) for entry in range(len(array.dictionary))])
    return compute.call_function("sum", [lengths.cast(pa.int64()).take(array.indices)]).as_py() or 0


def _bytes_of_views(array: Any) -> int:
    """Bytes of the texts that views show; any number of them may show the same."""
    lengths = np.frombuffer(array.buffers()[1], np.int32)[::4][array.offset : array.offset + len(array)]
    return 16 * len(array) + int(lengths[array.is_valid().to_numpy(zero_copy_only=False)].sum(dtype=np.int64))
