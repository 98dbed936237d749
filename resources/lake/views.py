"""The catalogue: DuckDB tables and views over what a lake holds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.resources.lake.recipe import Artifact, references

if TYPE_CHECKING:
    import duckdb

_SHOWN_ENTRIES = 20


class CatalogAdditions(NamedTuple):
    """What a project adds to the catalogue of its lake."""

    # table -> column -> SQL type. These columns are there also while the table, or a column of it, has no data.
    columns: Mapping[str, Mapping[str, str]] = {}
    # SQL run last: views of the project's own over `raw.<table>`, `artifacts`, `heads` and `lineage`.
    statements: Sequence[str] = ()


def define_views(
    connection: "duckdb.DuckDBPyConnection",
    files: Mapping[tuple[str, str], str],
    artifacts: Sequence[Artifact],
    heads: Sequence[Mapping[str, Any]],
    additions: CatalogAdditions,
) -> None:
    """`artifacts`, `heads` and `lineage` as tables; one view per Parquet table over its heads' files.

    `files` maps table and fingerprint to the file that DuckDB reads. The view of a table is defined in the schema `raw`
    and, under the same name, in `main`, where the statements of `additions` may replace it. It carries the partition,
    version and fingerprint of the head beside each row.
    """
    rows = [_artifact_row(one, files[one.table, one.fingerprint]) for one in artifacts]
    _insert(connection, "artifacts", _ARTIFACT_COLUMNS, rows)
    _insert(connection, "lineage", _LINEAGE_COLUMNS, [edge for one in artifacts for edge in _edges(one)])
    _insert(
        connection,
        "heads",
        _HEAD_COLUMNS,
        [_head_row(entry, files.get((entry["table"], entry["fingerprint"]))) for entry in heads],
    )
    paths: dict[str, set[str]] = {name: set() for name in additions.columns}
    for entry in heads:
        path = files.get((entry["table"], entry["fingerprint"]), "")
        if path.endswith(".parquet"):
            paths.setdefault(entry["table"], set()).add(path)
    connection.execute("CREATE SCHEMA raw")
    for table, its_paths in paths.items():
        query = _table_query(table, sorted(its_paths), additions.columns.get(table, {}))
        connection.execute(f"CREATE VIEW raw.{_identifier(table)} AS {query}")
        connection.execute(f"CREATE VIEW main.{_identifier(table)} AS FROM raw.{_identifier(table)}")
    for statement in additions.statements:
        connection.execute(statement)


_ARTIFACT_COLUMNS = {
    "table_name": "VARCHAR",
    "version": "VARCHAR",
    "partition": "VARCHAR",
    "fingerprint": "VARCHAR",
    "content_hash": "VARCHAR",
    "stage_version": "INTEGER",
    "run_id": "VARCHAR",
    "created": "VARCHAR",
    "settings": "JSON",
    "notes": "JSON",
    "file": "VARCHAR",
}
_HEAD_COLUMNS = {
    "table_name": "VARCHAR",
    "version": "VARCHAR",
    "partition": "VARCHAR",
    "fingerprint": "VARCHAR",
    "content_hash": "VARCHAR",
    "run_id": "VARCHAR",
    "materialized": "TIMESTAMP",
    "file": "VARCHAR",
}
_LINEAGE_COLUMNS = {
    "table_name": "VARCHAR",
    "fingerprint": "VARCHAR",
    "role": "VARCHAR",
    "input_table": "VARCHAR",
    "input_fingerprint": "VARCHAR",
    "input_content_hash": "VARCHAR",
    "defines": "BOOLEAN",
}


def _artifact_row(artifact: Artifact, file: str) -> tuple[Any, ...]:
    header = artifact.header
    return (
        artifact.table,
        header.get("version"),
        header.get("partition"),
        artifact.fingerprint,
        artifact.content_hash,
        header.get("stage_version"),
        header.get("run_id"),
        header.get("created"),
        json.dumps(_without_long_lists(header.get("settings"))),
        json.dumps(header.get("notes")),
        file,
    )


def _without_long_lists(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings without long lists. A manifest and an index list every shard; the catalogue would hold that list once an
    arrival. The list is stored in the artefact's header, and what matters of it in its rows."""
    return {
        name: f"{len(value)} entries" if isinstance(value, list) and len(value) > _SHOWN_ENTRIES else value
        for name, value in (settings or {}).items()
    }


def _head_row(entry: Mapping[str, Any], file: str | None) -> tuple[Any, ...]:
    known = [entry[name] for name in ("table", "scope", "partition", "fingerprint", "content_hash", "run_id")]
    return (*known, datetime.fromtimestamp(entry["time"], UTC).replace(tzinfo=None), file)


def _edges(artifact: Artifact) -> Iterator[tuple[Any, ...]]:
    """One row per input of an artefact, those that define its identity and those that do not."""
    for reference in references(artifact):
        yield (
            artifact.table,
            artifact.fingerprint,
            reference.role,
            reference.table,
            reference.fingerprint,
            reference.content_hash,
            reference.defines,
        )


def _insert(
    connection: "duckdb.DuckDBPyConnection", table: str, columns: Mapping[str, str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """A new table with these rows, taken over from Arrow in one go: row by row DuckDB takes a second per thousand."""
    import pyarrow as pa

    described = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    connection.execute(f"CREATE TABLE {_identifier(table)}({described})")
    if not rows:
        return
    values = [pa.array(column) for column in zip(*rows, strict=True)]
    connection.register("prism_rows", pa.table(dict(zip(columns, values, strict=True))))
    connection.execute(f"INSERT INTO {_identifier(table)} FROM prism_rows")
    connection.unregister("prism_rows")


def _table_query(table: str, paths: Sequence[str], columns: Mapping[str, str]) -> str:
    """The rows of a table's heads, with at least the named columns."""
    always = {"partition": "VARCHAR", "version": "VARCHAR", "fingerprint": "VARCHAR", **columns}
    nothing = ", ".join(f"NULL::{kind} AS {_identifier(name)}" for name, kind in always.items())
    stub = f"SELECT {nothing}, NULL::BIGINT AS file_row_number WHERE false"
    if not paths:
        return stub
    listed = ", ".join(_literal(path) for path in paths)
    rows = (
        'SELECT h."partition", h.version, h.fingerprint, t.* EXCLUDE (filename) '
        f"FROM read_parquet([{listed}], filename = true, file_row_number = true, union_by_name = true) t "
        f"JOIN heads h ON h.file = t.filename AND h.table_name = {_literal(table)}"
    )
    return f"{stub} UNION ALL BY NAME {rows}" if columns else rows


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
