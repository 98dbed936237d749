"""Rows of an answer as JSON, CSV or Parquet, on stdout: for a file or the next program."""

import csv
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prism_assets.errors import UserMistake
from prism_assets.text import visible

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["table", "json", "csv", "parquet"]
AsFormat = Annotated[
    Format, typer.Option("--format", "-f", help="How the rows are printed; csv and parquet print all of them.")
]


def chosen(form: Format, as_json: bool) -> Format:
    """The format that the options ask for: --json is short for --format json. Raises UserMistake where both are given
    and differ."""
    if as_json and form not in ("table", "json"):
        raise UserMistake(f"--json and --format {form} ask for two formats: give one of them.")
    return "json" if as_json else form


def write_rows(batches: Iterable["pa.RecordBatch"], schema: "pa.Schema", form: Format) -> None:
    """Write rows as CSV (a first line with the names; nested values as JSON text, nothing for null) or as Parquet.

    Raises UserMistake for Parquet on a terminal.
    """
    if form == "parquet":
        _write_parquet(batches, schema)
        return
    # What a terminal would act on is shown; a file gets the texts as they are.
    as_shown = visible if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([as_shown(name) for name in schema.names])
    for batch in batches:
        for row in batch.to_pylist():
            writer.writerow([as_shown(_cell(row[name])) for name in schema.names])


def _write_parquet(batches: Iterable["pa.RecordBatch"], schema: "pa.Schema") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sys.stdout.isatty():
        raise UserMistake("Parquet is no text for a terminal: write it to a file (… --format parquet > rows.parquet).")
    # Into memory first: a writer seeks, and a pipe cannot.
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    sys.stdout.buffer.write(buffer.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
