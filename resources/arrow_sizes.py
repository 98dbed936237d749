"""Bytes that an Arrow file takes once it is decompressed, read from its messages before any buffer is."""

import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from flatbuffers.number_types import Int64Flags, Uint8Flags
from flatbuffers.table import Table

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
BYTES_A_VALUE = 8  # of a column at least: nulls have no buffer, equal values little, and all become values

# Positions of fields in flatbuffer tables: 4 + 2 * the field's number in format/Message.fbs and File.fbs of Arrow.
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 6, 8, 10
_NODES, _BUFFERS, _COMPRESSION = 6, 8, 10
_DATA = 6
_DICTIONARIES, _RECORD_BATCHES = 8, 10
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])
_NODE = np.dtype([("length", "<i8"), ("nulls", "<i8")])
_BUFFER = np.dtype([("offset", "<i8"), ("length", "<i8")])


def decompressed_size(file: BinaryIO) -> int:
    """Bytes of all batches and dictionaries of an open Arrow file or stream, every batch counted as often as the
    file's footer names it. The position of `file` is where it was. Raises OSError where a message cannot be read.

    Arrow allocates what a compressed buffer says of itself in its first eight bytes, so a file of a megabyte can ask
    for any amount of memory.
    """
    before = file.tell()
    try:
        return sum(_size_of(file, metadata, body) for metadata, body in _messages(file))
    except (struct.error, ValueError, IndexError, TypeError, OverflowError) as error:
        raise OSError(f"a message cannot be read: {error}") from error
    finally:
        file.seek(before)


def _messages(file: BinaryIO) -> Iterator[tuple[Table, int]]:
    """Each message, and where its body begins."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        yield from _stream_messages(file, size)
        return
    file.seek(size - 10)
    length, magic = struct.unpack("<i6s", file.read(10))
    if magic != _MAGIC or not 0 < length <= size - 16:
        raise OSError("its end is missing")
    file.seek(size - 10 - length)
    footer = _root(file.read(length))
    for field in (_DICTIONARIES, _RECORD_BATCHES):
        for block in _vector(footer, field, _BLOCK):
            file.seek(int(block["offset"]))
            metadata = _next_metadata(file, size)
            if metadata is None:
                raise OSError("its footer names a message that there is none of")
            # The body lies behind the metadata, by the footer and by the message alike; Arrow goes by the footer.
            yield metadata, int(block["offset"]) + int(block["metadata"])


def _stream_messages(file: BinaryIO, size: int) -> Iterator[tuple[Table, int]]:
    file.seek(0)
    while (message := _next_metadata(file, size)) is not None:
        body = file.tell()
        yield message, body
        length = _number(message, _BODY_LENGTH, Int64Flags)
        if not 0 <= length <= size - body:
            raise OSError("a body is longer than the file")
        file.seek(body + length)


def _next_metadata(file: BinaryIO, size: int) -> Table | None:
    """The metadata of the message at the file's position, which is then at its body; None at the end of a stream."""
    prefix = file.read(4)
    if prefix and struct.unpack("<I", prefix)[0] == _CONTINUATION:  # files before Arrow 0.15 have the length alone
        prefix = file.read(4)
    if not prefix:
        return None
    length = struct.unpack("<i", prefix)[0]
    if not 0 <= length <= size:
        raise OSError("the metadata of a message are longer than the file")
    return _root(file.read(length)) if length else None


def _size_of(file: BinaryIO, message: Table, body: int) -> int:
    kind = _number(message, _HEADER_TYPE, Uint8Flags)
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return 0
    batch = _inner(message, _HEADER)
    if batch is not None and kind == _DICTIONARY_BATCH:
        batch = _inner(batch, _DATA)
    if batch is None:
        raise OSError("a batch has no data")
    values = int(np.maximum(_vector(batch, _NODES, _NODE)["length"], 0).sum(dtype=np.float64))
    buffers = _vector(batch, _BUFFERS, _BUFFER)
    if batch.Offset(_COMPRESSION) == 0:
        size = int(np.maximum(buffers["length"], 0).sum(dtype=np.float64))
    else:
        size = sum(_decompressed(file, body + int(one["offset"]), int(one["length"])) for one in buffers)
    return max(size, BYTES_A_VALUE * values)


def _decompressed(file: BinaryIO, start: int, length: int) -> int:
    """Bytes of a compressed buffer: it begins with their number, -1 where it is not compressed after all."""
    if length < 8:
        return max(length, 0)
    file.seek(start)
    (size,) = struct.unpack("<q", file.read(8))
    return size if size >= 0 else length


# -- flatbuffers --------------------------------------------------------------------------------------------------


def _root(content: bytes) -> Table:
    return Table(content, *struct.unpack_from("<I", content))


def _number(table: Table, field: int, kind: Any) -> int:
    offset = table.Offset(field)
    return table.Get(kind, table.Pos + offset) if offset else 0


def _inner(table: Table, field: int) -> Table | None:
    offset = table.Offset(field)
    return Table(table.Bytes, table.Indirect(table.Pos + offset)) if offset else None


def _vector(table: Table, field: int, kind: np.dtype) -> np.ndarray:
    """A vector of structs. Raises ValueError for one that leads out of the message."""
    offset = table.Offset(field)
    if not offset:
        return np.empty(0, kind)
    return np.frombuffer(table.Bytes, kind, table.VectorLen(offset), table.Vector(offset))
