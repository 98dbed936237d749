"""Sizes of columns by a Parquet footer, read so that no footer, however it is damaged, ends the process."""

from typing import BinaryIO, NamedTuple


class ColumnChunk(NamedTuple):
    """A column of a row group, as the footer has it."""

    column: int  # the number of the leaf in the schema
    uncompressed: int  # bytes
    values: int


def column_chunks(file: BinaryIO) -> list[ColumnChunk]:
    """All chunks of an open Parquet file. Raises OSError for a footer that cannot be read.

    By DuckDB: pyarrow 26 aborts the process in `RowGroupMetaData.column` where a footer's size statistics do not fit
    its schema.
    """
    import duckdb

    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        try:
            # The open file, not its path, which may be another by now.
            found = connection.execute(
                "SELECT column_id, total_uncompressed_size, num_values FROM parquet_metadata(?)",
                [f"/dev/fd/{file.fileno()}"],
            )
            return [ColumnChunk(*row) for row in found.fetchall()]
        except duckdb.Error as error:
            raise OSError(f"the footer cannot be read: {error}") from error
