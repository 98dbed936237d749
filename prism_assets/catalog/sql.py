"""SQL over the lake: one reading statement, confined to the lake."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.catalog.views import additions
from prism_assets.errors import QueryRefused
from prism_assets.resources.lake.lake import Lake

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class QueryResult(NamedTuple):
    """What a query returned, as far as it was asked for."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    more: bool  # whether rows beyond the limit were left out


def refresh(lake: Lake) -> Path:
    """Write the catalogue file again; returns its path."""
    return lake.rebuild_catalog(additions())


def refreshed(lake: Lake) -> "duckdb.DuckDBPyConnection":
    """A connection to the catalogue file, written again; to views in memory where the lake can only be read."""
    import duckdb

    try:
        return duckdb.connect(str(refresh(lake)), read_only=True)
    except (OSError, duckdb.IOException):
        return connect(lake)


def connect(lake: Lake) -> "duckdb.DuckDBPyConnection":
    """The views of today's lake on a connection of its own, in memory; it locks nothing."""
    return lake.connect(additions())


def ask(
    connection: "duckdb.DuckDBPyConnection", query: str, limit: int = 0, parameters: Mapping[str, Any] | None = None
) -> QueryResult:
    """Answer one SELECT (or SHOW, DESCRIBE, SUMMARIZE), at most `limit` rows of it; 0 means all.

    `$name` in the query stands for a value of `parameters`, whatever quotes it holds.
    Raises QueryRefused for anything that is not one reading statement, and for what DuckDB cannot answer.
    """
    with _one_statement(connection, query) as statement:
        answer = connection.execute(statement, dict(parameters) if parameters else None)
        columns = [column[0] for column in answer.description]
        rows = answer.fetchmany(limit + 1) if limit else answer.fetchall()
    shown = rows[:limit] if limit else rows
    return QueryResult(columns, shown, len(rows) > len(shown))


@contextmanager
def ask_batches(
    connection: "duckdb.DuckDBPyConnection", query: str, parameters: Mapping[str, Any] | None = None
) -> "Iterator[pa.RecordBatchReader]":
    """All rows of the answer to one SELECT as Arrow batches; as `ask`."""
    with _one_statement(connection, query) as statement:
        yield connection.sql(statement, params=dict(parameters) if parameters else None).to_arrow_reader()


@contextmanager
def _one_statement(connection: "duckdb.DuckDBPyConnection", query: str) -> "Iterator[duckdb.Statement]":
    """The one reading statement of a query. Raises QueryRefused for another, and for what DuckDB says within."""
    import duckdb

    try:
        statements = connection.extract_statements(query)
        if len(statements) != 1:
            raise QueryRefused(f"One statement at a time: this text holds {len(statements)}.")
        if statements[0].type != duckdb.StatementType.SELECT:
            raise QueryRefused(
                f"Only reading is possible here, and this is a statement of type {statements[0].type.name}: artefacts "
                "are never changed. Write a SELECT, or DESCRIBE a view; `SHOW ALL TABLES` lists them."
            )
        yield statements[0]
    except duckdb.Error as error:
        raise QueryRefused(f"DuckDB: {error}") from error
