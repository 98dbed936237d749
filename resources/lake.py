"""The lake: immutable, self-describing artefacts on disk, and DuckDB as the lens over them.

Layout below `root`:

    artifacts/<table>/<fingerprint>.parquet|.safetensors|/    what was computed, never changed once published
    heads/<table>/<scope>/<partition>.json                    which artefact a partition shows now
    unpublished/                                              half-written things; always safe to delete
    cache/                                                    what can be recomputed at no harm (file hashes)
    prism.duckdb                                              views over all of it; delete it at any time

An artefact is published by one atomic step (a rename; for a file a hard link, which replaces nothing) to a path that
names its fingerprint. Whoever loses a race finds the winner's artefact in place and discards its own. What an artefact
is, and what it was made from, stands in the artefact: in the Parquet footer, in the safetensors header, or in
`artifact.json` inside a folder.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import dagster as dg

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa
    import torch

HEADER_KEY = "prism"
SIDECAR = "artifact.json"
FINGERPRINT_LENGTH = 32
_SUFFIXES = (".parquet", ".safetensors", "")
_CHECKSUM_BYTES = 4
_CATALOG_BLOCK = "16384"  # bytes, DuckDB's least
_SHOWN_ENTRIES = 20
# What os.link says on a file system that has none.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LakeError(Exception):
    """The lake cannot do what was asked; the message says why and what to do."""


class NotMadeYet(LakeError):
    """Nothing was made yet of what was asked for; the message names what to run."""


class DamagedArtifact(LakeError):
    """A published file cannot be read as what it claims to be (truncated, overwritten)."""


def digest(value: Any) -> str:
    """A hash of a JSON-like value that depends on nothing but the value: 32 hex digits of SHA-256."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:FINGERPRINT_LENGTH]


@dataclass(frozen=True)
class Artifact:
    """Something published: a Parquet table, a safetensors file or a folder, with the header that describes it."""

    table: str
    fingerprint: str
    content_hash: str
    path: Path
    header: Mapping[str, Any]

    @property
    def partition(self) -> str | None:
        return self.header.get("partition")

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the maker recorded beside the content: counts, seconds, diagnostics."""
        return self.header.get("notes", {})


@dataclass(frozen=True)
class Recipe:
    """What an artefact is made from. Its fingerprint is known before the work is done.

    `inputs` and `settings` make the identity: inputs count by content hash, never by name or path, so an input
    that was recomputed to the same content changes nothing downstream. `lineage` names further artefacts that the
    work looked at but that do not define it (the pool that a pinned sample was drawn from).
    """

    table: str
    stage_version: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "Artifact | Sequence[Artifact] | str"] = field(default_factory=dict)
    lineage: Mapping[str, "Artifact | Sequence[Artifact] | str"] = field(default_factory=dict)
    partition: str | None = None
    version: str | None = None

    @property
    def fingerprint(self) -> str:
        return digest(
            {
                "table": self.table,
                "stage_version": self.stage_version,
                "settings": dict(self.settings),
                "inputs": {role: _content_of(value) for role, value in self.inputs.items()},
            }
        )


class Reference(NamedTuple):
    """An input as the header of an artefact names it. Plain hashes (a file, a model) have no table and fingerprint."""

    role: str
    table: str | None
    fingerprint: str | None
    content_hash: str | None
    defines: bool  # whether it is part of the artefact's identity


def references(artifact: Artifact) -> Iterator[Reference]:
    """Everything that the header of an artefact names as what it was made from."""
    for defines, key in ((True, "inputs"), (False, "lineage")):
        for role, value in artifact.header.get(key, {}).items():
            for one in value if isinstance(value, list) else [value]:
                yield Reference(role, one.get("table"), one.get("fingerprint"), one.get("content_hash"), defines)


class Lake(dg.ConfigurableResource):
    """Publishes and finds artefacts below `root` (a folder, made when first needed)."""

    root: str

    # -- paths -------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return Path(self.root)

    @property
    def catalog_path(self) -> Path:
        return self.folder / "prism.duckdb"

    @property
    def cache(self) -> Path:
        path = self.folder / "cache"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _home(self, table: str) -> Path:
        return self.folder / "artifacts" / table

    # -- finding -----------------------------------------------------------------------------------------------

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artefact of this recipe, or None where it has not been made (or was found damaged and set aside)."""
        return self.get(recipe.table, recipe.fingerprint)

    def get(self, table: str, fingerprint: str) -> Artifact | None:
        """The artefact of `table` with this fingerprint, or None.

        A damaged file is renamed to `*.damaged` and reported as absent, so the next run rebuilds it from its inputs.
        """
        for suffix in _SUFFIXES:
            path = self._home(table) / f"{fingerprint}{suffix}"
            if not path.exists():
                continue
            try:
                return _artifact(path)
            except DamagedArtifact as damage:
                dg.get_dagster_logger().warning(f"{damage} {_set_aside(path)}")
        return None

    def artifacts(self, table: str | None = None) -> Iterator[Artifact]:
        """Every published artefact, or every one of a table; damaged files are left out."""
        homes = [self._home(table)] if table else sorted((self.folder / "artifacts").glob("*"))
        for home in homes:
            for path in sorted(home.glob("*")) if home.is_dir() else ():
                if path.suffix in _SUFFIXES and not path.name.endswith(".damaged"):
                    try:
                        yield _artifact(path)
                    except DamagedArtifact:
                        continue

    def head(self, table: str, partition: str | None = None, scope: str = "") -> Artifact | None:
        """The artefact that a partition shows now, or None where it has none."""
        entry = _read_json(self._head_path(table, partition, scope))
        return self.get(table, entry["fingerprint"]) if entry else None

    def require(self, table: str, partition: str | None = None, scope: str = "") -> Artifact:
        """The artefact that a partition shows now.

        Raises NotMadeYet where there is none, with the asset to materialise first.
        """
        found = self.head(table, partition, scope)
        if found is None:
            name = f"{table}[{partition}]" if partition else table
            raise NotMadeYet(f"The lake at {self.folder} has no {name} yet: materialise it first, or run `prism run`.")
        return found

    def heads(self, table: str | None = None) -> list[dict[str, Any]]:
        """The entries of all heads (of a table): table, scope, partition, fingerprint, content_hash, run_id, time."""
        top = self.folder / "heads"
        pattern = f"{table}/*/*.json" if table else "*/*/*.json"
        return [entry for path in sorted(top.glob(pattern)) if (entry := _read_json(path))]

    def point(self, artifact: Artifact, partition: str | None = None, scope: str = "", run_id: str = "") -> Artifact:
        """Make `artifact` what the partition shows now, by one atomic rename."""
        path = self._head_path(artifact.table, partition, scope)
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "table": artifact.table,
            "scope": scope,
            "partition": partition,
            "fingerprint": artifact.fingerprint,
            "content_hash": artifact.content_hash,
            "run_id": run_id,
            "time": time.time(),
        }
        with self._disk_errors(f"the head of {artifact.table}"):
            _write_text(path, json.dumps(entry, indent=1))
        return artifact

    def retire(self, table: str, partition: str | None = None, scope: str = "") -> None:
        """Forget what a partition shows. The artefact stays until `prism gc`."""
        self._head_path(table, partition, scope).unlink(missing_ok=True)

    def _head_path(self, table: str, partition: str | None, scope: str) -> Path:
        return self.folder / "heads" / table / _safe(scope) / f"{_safe(partition or '')}.json"

    # -- publishing --------------------------------------------------------------------------------------------

    def publish_table(
        self,
        recipe: Recipe,
        table: "pa.Table",
        *,
        run_id: str = "",
        notes: Mapping[str, Any] | None = None,
        attachments: Mapping[str, Callable[[Path], None]] | None = None,
        row_group_size: int = 4096,
        compression: str = "zstd",
    ) -> Artifact:
        """Publish a table as Parquet with its header in the footer.

        `attachments` maps a file suffix (".jsonl") to a function that writes such a file; they lie beside the
        Parquet file under the same fingerprint and are in place before it, so whoever sees the table sees them too.
        """
        import pyarrow.parquet as pq

        content_hash = hash_table(table)
        header = self._header(recipe, content_hash, run_id, {"rows": table.num_rows, **(notes or {})})
        target = self._home(recipe.table) / f"{recipe.fingerprint}.parquet"

        def write(path: Path) -> None:
            metadata = {**(table.schema.metadata or {}), HEADER_KEY: json.dumps(header)}
            pq.write_table(
                table.replace_schema_metadata(metadata),
                path,
                compression=compression,
                row_group_size=row_group_size,
                store_schema=True,
                write_page_checksum=True,
            )

        with self._disk_errors(recipe.table):
            for suffix, writer in (attachments or {}).items():
                if not target.exists():
                    self._put(target.with_suffix(suffix), writer, os.replace)
            self._put(target, write)
        return self._published(recipe)

    def publish_tensors(
        self,
        recipe: Recipe,
        tensors: "Mapping[str, torch.Tensor]",
        *,
        run_id: str = "",
        notes: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Publish named tensors as one safetensors file with the header in its metadata."""
        from safetensors.torch import save_file

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        header = self._header(recipe, hash_tensors(contiguous), run_id, notes)
        target = self._home(recipe.table) / f"{recipe.fingerprint}.safetensors"
        with self._disk_errors(recipe.table):
            self._put(target, lambda path: save_file(contiguous, path, metadata={HEADER_KEY: json.dumps(header)}))
        return self._published(recipe)

    def publish_folder(
        self,
        recipe: Recipe,
        write: Callable[[Path], Mapping[str, Any] | None],
        *,
        run_id: str = "",
        notes: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Publish a folder that `write(folder)` fills; what it returns is added to the notes."""
        target = self._home(recipe.table) / recipe.fingerprint

        def fill(folder: Path) -> None:
            folder.mkdir()
            extra = write(folder)
            header = self._header(recipe, hash_folder(folder), run_id, {**(notes or {}), **(extra or {})})
            header["files"] = _sizes(folder)
            (folder / SIDECAR).write_text(json.dumps(header, indent=1))

        with self._disk_errors(recipe.table):
            self._put(target, fill)
        return self._published(recipe)

    def _header(
        self, recipe: Recipe, content_hash: str, run_id: str, notes: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        header = {
            "table": recipe.table,
            "version": recipe.version,
            "partition": recipe.partition,
            "fingerprint": recipe.fingerprint,
            "content_hash": content_hash,
            "stage_version": recipe.stage_version,
            "settings": dict(recipe.settings),
            "inputs": {role: _reference(value) for role, value in recipe.inputs.items()},
            "lineage": {role: _reference(value) for role, value in recipe.lineage.items()},
            "run_id": run_id,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "notes": dict(notes or {}),
        }
        return json.loads(json.dumps(header, default=_plain))

    def _put(
        self, target: Path, write: Callable[[Path], None], move: "Callable[[Path, Path], None] | None" = None
    ) -> None:
        """Write beside, flush, move into place in one step. A draft never outlives the call."""
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = self.folder / "unpublished"
        workshop.mkdir(parents=True, exist_ok=True)
        draft = workshop / f"{uuid.uuid4().hex}{target.suffix}"
        try:
            write(draft)
            _flush(draft)
            (move or _move_unless_there)(draft, target)
        finally:
            _remove(draft)

    def _published(self, recipe: Recipe) -> Artifact:
        artifact = self.find(recipe)
        if artifact is None:
            raise LakeError(f"{recipe.table} {recipe.fingerprint} vanished right after it was published.")
        return artifact

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _says_disk_full(error):
                raise
            free = shutil.disk_usage(self.folder).free / 2**20
            raise LakeError(
                f"The disk of the lake {self.folder} is full ({free:.0f} MiB free): {what} was not "
                "published and nothing half-written is left. Free some space (`prism gc` lists what no kept "
                "version needs) and run again: finished work is kept."
            ) from error

    # -- reading -----------------------------------------------------------------------------------------------

    def read_table(self, artifact: Artifact, columns: Sequence[str] | None = None) -> "pa.Table":
        """The rows of a Parquet artefact, all columns or the named ones.

        Raises DamagedArtifact where the file cannot be read, or its bytes differ from their checksums. It is set aside
        then, so the next run misses it and makes it again.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Not `pq.read_table`: for a single file it takes twice as long.
            with pq.ParquetFile(artifact.path, page_checksum_verification=True) as file:
                wanted = list(columns) if columns else None
                table = file.read(wanted)
            table = table.select(wanted) if wanted else table  # the file has them in its own order
            return table.replace_schema_metadata(None)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # The operating system's own: the file went, or cannot be reached now. It may be whole.
                raise LakeError(f"{artifact.path} cannot be read: {error}. Run again when it can.") from error
            raise self._damaged(artifact, str(error)) from error

    def read_tensors(self, artifact: Artifact) -> "dict[str, torch.Tensor]":
        """The tensors of a safetensors artefact.

        Raises DamagedArtifact where they differ from their content hash (safetensors has no checksums); as `read_table`.
        """
        from safetensors.torch import load_file

        tensors = load_file(artifact.path)
        if hash_tensors(tensors) != artifact.content_hash:
            raise self._damaged(artifact, "the tensors differ from their content hash")
        return tensors

    def _damaged(self, artifact: Artifact, why: str) -> DamagedArtifact:
        """What to raise for an artefact that turned out to be damaged when it was read; it is set aside."""
        name = f"{artifact.table}[{artifact.partition}]" if artifact.partition else artifact.table
        return DamagedArtifact(
            f"{artifact.path} ({name}) is damaged ({why.rstrip('.')}). {_set_aside(artifact.path)} Run again: `prism run`."
        )

    # -- what is remembered ------------------------------------------------------------------------------------

    def recall(self, name: str) -> bytes | None:
        """What was remembered under this name, or None where nothing was, or it is damaged."""
        try:
            content = (self.cache / name).read_bytes()
        except FileNotFoundError:
            return None
        data, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return data if checksum == _checksum(data) else None

    def remember(self, name: str, data: bytes) -> None:
        """Keep what can be computed again at any time: `cache/<name>`, with a checksum, in place at once."""
        path = self.cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with self._disk_errors(f"the cache entry {name}"):
            try:
                draft.write_bytes(data + _checksum(data))
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)

    # -- the lens ----------------------------------------------------------------------------------------------

    def connect(self, additions: "CatalogAdditions | None" = None) -> "duckdb.DuckDBPyConnection":
        """An in-memory DuckDB connection with the lake's views; it locks nothing."""
        import duckdb

        connection = duckdb.connect(":memory:")
        self._define_views(connection, additions or CatalogAdditions())
        return connection

    def rebuild_catalog(self, additions: "CatalogAdditions | None" = None) -> Path:
        """Write `prism.duckdb` anew and rename it into place, so no reader and no step waits for another."""
        import duckdb

        workshop = self.folder / "unpublished"
        workshop.mkdir(parents=True, exist_ok=True)
        draft = workshop / f"{uuid.uuid4().hex}.duckdb"
        try:
            # The tables are small: DuckDB's usual blocks of 256 KiB would be mostly empty.
            with duckdb.connect(str(draft), config={"default_block_size": _CATALOG_BLOCK}) as connection:
                self._define_views(connection, additions or CatalogAdditions())
            os.replace(draft, self.catalog_path)
        finally:
            _remove(draft)
            _remove(draft.with_name(f"{draft.name}.wal"))
        return self.catalog_path

    def _define_views(self, connection: "duckdb.DuckDBPyConnection", additions: "CatalogAdditions") -> None:
        """`artifacts`, `heads` and `lineage` as tables; one view per Parquet table over its heads' files.

        The view of a table stands in the schema `raw` and, under the same name, in `main`, where the statements of
        `additions` may replace it. It carries the partition, version and fingerprint of the head beside each row.
        """
        artifacts = list(self.artifacts())
        root = self.folder.resolve()
        files = {(one.table, one.fingerprint): str(root / one.path.relative_to(self.folder)) for one in artifacts}
        heads = self.heads()
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


# -- the catalogue -----------------------------------------------------------------------------------------------


class CatalogAdditions(NamedTuple):
    """What a project adds to the catalogue of its lake."""

    # table -> column -> SQL type. These columns are there also while the table, or a column of it, has no data.
    columns: Mapping[str, Mapping[str, str]] = {}
    # SQL run last: views of the project's own over `raw.<table>`, `artifacts`, `heads` and `lineage`.
    statements: Sequence[str] = ()


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
        json.dumps(_shortened(header.get("settings"))),
        json.dumps(header.get("notes")),
        file,
    )


def _shortened(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings without long lists. A manifest and an index list every shard; the catalogue would hold that list once an
    arrival. It stands in the artefact's header, and what matters of it in its rows."""
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


# -- content hashes ----------------------------------------------------------------------------------------------


def hash_table(table: "pa.Table") -> str:
    """A hash of the values, names and types of a table; chunking, compression and metadata do not count."""
    import numpy as np
    import pyarrow as pa

    hasher = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = _canonical_type(column.type)
        hasher.update(f"{name}:{kind}:{len(column)}\n".encode())
        # Taking every row copies it into fresh buffers: slices and chunks no longer show in the bytes.
        array = pa.chunked_array(column.cast(kind)).take(np.arange(len(column))).combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        sink = pa.BufferOutputStream()
        schema = pa.schema([pa.field("values", kind)])
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([array], schema=schema))
        hasher.update(memoryview(sink.getvalue()))
    return hasher.hexdigest()[:FINGERPRINT_LENGTH]


def _canonical_type(kind: "pa.DataType") -> "pa.DataType":
    """The same type with list items named alike: Parquet calls them `element`, Arrow `item`."""
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


def hash_folder(folder: Path) -> str:
    """A hash of the files of a folder: relative names and bytes, the sidecar left out."""
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SIDECAR:
            hasher.update(f"{path.relative_to(folder).as_posix()}:{hash_file(path)}\n".encode())
    return hasher.hexdigest()[:FINGERPRINT_LENGTH]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# -- small parts -------------------------------------------------------------------------------------------------


def _content_of(value: "Artifact | Sequence[Artifact] | str") -> Any:
    if isinstance(value, Artifact):
        return value.content_hash
    return value if isinstance(value, str) else [_content_of(one) for one in value]


def _reference(value: "Artifact | Sequence[Artifact] | str") -> Any:
    if isinstance(value, Artifact):
        return {"table": value.table, "fingerprint": value.fingerprint, "content_hash": value.content_hash}
    return {"content_hash": value} if isinstance(value, str) else [_reference(one) for one in value]


def _artifact(path: Path) -> Artifact:
    status = path.stat()
    if path.is_dir():  # what lies in a folder does not show in its own status
        header = _read_header(path)
    else:
        header = _known_header(path, status.st_size, status.st_mtime_ns, status.st_ino)
    return Artifact(header["table"], header["fingerprint"], header["content_hash"], path, header)


@lru_cache(maxsize=16384)
def _known_header(path: Path, size: int, modified: int, inode: int) -> Mapping[str, Any]:
    """The header of a file, read once a process while the file stays the same. Many partitions ask for the same ones."""
    return _read_header(path)


def _set_aside(path: Path) -> str:
    """Take a damaged artefact out of the way, so that it counts as not made; returns a sentence that says so."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
    with suppress(FileNotFoundError):  # another process was faster
        os.replace(path, aside)
    return f"It was moved to {aside.name} and will be rebuilt."


def _read_header(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            header = json.loads((path / SIDECAR).read_text())
            sizes = _sizes(path)
            if header.get("files", sizes) != sizes:
                raise DamagedArtifact(f"{path} is damaged (a file is missing, is too many or has another size).")
            return header
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return json.loads(pq.read_metadata(path).metadata[HEADER_KEY.encode()])
        from safetensors import safe_open

        with safe_open(path, framework="np") as handle:
            return json.loads(handle.metadata()[HEADER_KEY])
    except FileNotFoundError as error:
        raise DamagedArtifact(f"{path} is incomplete: {error}.") from error
    except DamagedArtifact:
        raise
    except Exception as error:  # pyarrow, safetensors and json each have their own for a broken file
        raise DamagedArtifact(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return None


def _write_text(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(text)
        _flush(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _move_unless_there(draft: Path, target: Path) -> None:
    """Give a draft its place in one atomic step. Whoever comes second leaves the winner's artefact as it is."""
    try:
        if draft.is_dir():
            os.replace(draft, target)  # fails where a folder with files is in place
        else:
            os.link(draft, target)  # a rename would replace the winner's file
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and target.exists():
            return
        if draft.is_dir() or error.errno not in _NO_HARD_LINKS:
            raise
        os.replace(draft, target)


def _says_disk_full(error: Exception) -> bool:
    """safetensors and FAISS put the operating system's words into exceptions of their own."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(os.strerror(number) in str(error) for number in numbers)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a folder artefact by relative name, the sidecar left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SIDECAR)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _flush(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big")


def _safe(name: str) -> str:
    return "_" + quote(name, safe="")


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _plain(value: Any) -> Any:
    """JSON for numpy scalars and arrays."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
