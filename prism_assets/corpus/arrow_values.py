"""Arrow columns as Python values: what pandas alone could read becomes text first."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from prism_assets.corpus.json_text import json_value

if TYPE_CHECKING:
    import pyarrow as pa


def readable(batch: pa.RecordBatch, as_they_are: Collection[str] = ()) -> pa.RecordBatch:
    """The batch with times, dates and durations as text, at any depth, but for the columns `as_they_are`: Python has
    no value for nanoseconds."""
    import pyarrow as pa

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = column.type if name in as_they_are else _readable_type(column.type)
        columns.append(column if kind == column.type else column.cast(kind))
    return pa.record_batch(columns, names=batch.schema.names)


def without_runs(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with columns of runs of equal values as dictionaries: Arrow takes no rows of runs."""
    import numpy as np
    import pyarrow as pa

    def entries(column: Any) -> Any:
        if not pa.types.is_run_end_encoded(column.type):
            return column
        ends = np.minimum(np.asarray(column.run_ends) - column.offset, len(column))
        lengths = np.diff(np.maximum(ends, 0), prepend=0)
        return pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(lengths)), lengths), column.values)

    return pa.record_batch([entries(column) for column in batch.columns], names=batch.schema.names)


def schema_without_views(schema: pa.Schema) -> pa.Schema:
    """The schema with what views show written out, to cast a batch to: Arrow takes no rows of views."""
    import pyarrow as pa

    return pa.schema([field.with_type(_written_out(field.type)) for field in schema])


def _written_out(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_written_out(kind.value_type)))
    return _with_parts(kind, _written_out)


def require_sound(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid where lengths, offsets or indices of a batch lead out of it: Arrow takes them from a file as
    they are, and a damaged one ends the process. Texts need not be UTF-8: that costs the row, not the file."""
    import pyarrow as pa

    batch.validate()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type of the same layout that says nothing of the encoding of its texts."""
    import pyarrow as pa

    texts = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if kind in texts:
        return texts[kind]
    if isinstance(kind, pa.BaseExtensionType):
        return _as_bytes(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    return _with_parts(kind, _as_bytes)


def _readable_type(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_duration(kind):
        return pa.int64()  # Arrow writes no duration as text: its number of units
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return pa.string()
    return _with_parts(kind, _readable_type)


def _with_parts(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A struct or list with the types of its parts changed; any other type as it is."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(change(field.type)) for field in kind.fields])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(change(kind.value_type)), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(change(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(change(kind.value_type)))
    return kind


def json_decoders(schema: pa.Schema) -> dict[str, Callable[[Any], Any]]:
    """For each column that holds JSON text by its type, at any depth, what makes the values of its Python value."""
    found = {field.name: _json_decoder(field.type) for field in schema}
    return {name: decode for name, decode in found.items() if decode is not None}


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    import pyarrow as pa

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json_value(value)
    if pa.types.is_struct(kind):
        inner = {field.name: _json_decoder(field.type) for field in kind.fields}
        inner = {name: decode for name, decode in inner.items() if decode is not None}
        if not inner:
            return None
        return lambda value: value and value | {name: decode(value[name]) for name, decode in inner.items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _json_decoder(kind.value_type)
        return item and (lambda value: value and [item(one) for one in value])
    return None
