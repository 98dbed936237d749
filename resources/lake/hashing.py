"""Content hashes: of the values of a table, of tensors, of the files of a folder; never of paths or times."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prism_assets.resources.lake.recipe import FINGERPRINT_LENGTH, SIDECAR
from prism_assets.resources.lake.spool import RowSource, rows_between
from prism_assets.resources.regular_files import open_regular

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch


ROWS_A_BLOCK = 4096
_MOST_BYTES = 2**31 - 1  # that 32-bit offsets reach


def hash_table(table: "pa.Table | RowSource") -> str:
    """A hash of the values, names and types of a table; chunking, compression and metadata do not count. A column is in
    memory at a time, whole."""
    return _hash_between(table, 0, table.num_rows)


def hash_rows(rows: "pa.Table | RowSource") -> str:
    """The content hash of a published table: its `hash_table`, or of more than 4,096 rows the hash of those of blocks
    of so many, so that a column of a block is all that is in memory."""
    if rows.num_rows <= ROWS_A_BLOCK:
        return hash_table(rows)
    blocks = [_hash_between(rows, start, ROWS_A_BLOCK) for start in range(0, rows.num_rows, ROWS_A_BLOCK)]
    return hashlib.sha256("\n".join(blocks).encode()).hexdigest()[:FINGERPRINT_LENGTH]


def _hash_between(table: "pa.Table | RowSource", start: int, count: int) -> str:
    hasher = hashlib.sha256()
    for name in table.schema.names:
        _add_column(hasher, name, rows_between(table, start, count, [name]).column(0))
    return hasher.hexdigest()[:FINGERPRINT_LENGTH]


def _add_column(hasher: "hashlib._Hash", name: str, column: "pa.ChunkedArray") -> None:
    import numpy as np
    import pyarrow as pa
    from pyarrow import compute

    kind = _canonical_type(column.type)
    hasher.update(f"{name}:{kind}:{len(column)}\n".encode())
    if pa.types.is_string(kind):
        lengths = compute.call_function("binary_length", [column])
        if (compute.call_function("sum", [lengths]).as_py() or 0) > _MOST_BYTES:
            kind = pa.large_string()
    # Taking every row copies it into fresh buffers: slices and chunks no longer show in the bytes.
    array = pa.chunked_array(column.cast(kind)).take(np.arange(len(column))).combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("values", kind)])
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([array], schema=schema))
    hasher.update(memoryview(sink.getvalue()))


def _canonical_type(kind: "pa.DataType") -> "pa.DataType":
    """The same type with list items under one name: Parquet calls them `element`, Arrow `item`."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return pa.list_(pa.field("item", _canonical_type(kind.value_type)), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(pa.field("item", _canonical_type(kind.value_type)))
    return kind


def hash_tensors(tensors: "Mapping[str, torch.Tensor]") -> str:
    """A hash of names, dtypes, shapes and bytes."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return hasher.hexdigest()[:FINGERPRINT_LENGTH]


def hash_arrays(arrays: "Mapping[str, np.ndarray]") -> str:
    """As `hash_tensors`, of arrays: the same for the same values."""
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        hasher.update(f"{name}:torch.{array.dtype}:{array.shape}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()[:FINGERPRINT_LENGTH]


def hash_folder(folder: Path) -> str:
    """A hash of the files of a folder: relative names and bytes, the sidecar left out."""
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SIDECAR:
            hasher.update(f"{path.relative_to(folder).as_posix()}:{hash_file(path)}\n".encode())
    return hasher.hexdigest()[:FINGERPRINT_LENGTH]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
