"""The lake: immutable, self-describing artefacts, and DuckDB views over them.

Layout of the store below `root`:

    artifacts/<table>/<fingerprint>.parquet|.safetensors|/    what was computed, never changed once published
    heads/<table>/<scope>/<partition>.json                    which artefact a partition shows now
    unpublished/                                              half-written things; always safe to delete
    cache/                                                    what can be recomputed at no harm (file hashes)
    tracking/                                                 what other tools log of a run; no part of any artefact
    dagster/                                                  a Dagster instance, where DAGSTER_HOME names no other
    prism.duckdb                                              views over all of it; delete it at any time

An artefact is published by one atomic step to a key that names its fingerprint. Of two runs that publish the
same one, the second finds the first's in place and discards its own. What an artefact is, and what it was made from, is
stored in the artefact.
"""

import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from prism_assets.errors import DamagedArtifact, LakeError, NotMadeYet
from prism_assets.resources.lake.hashing import ROWS_A_BLOCK, hash_arrays, hash_folder, hash_rows, hash_tensors
from prism_assets.resources.lake.headers import HEADER_KEY, header_of, new_header, sizes
from prism_assets.resources.lake.recipe import SIDECAR, Artifact, Content, Recipe, Rows, Tensors
from prism_assets.resources.lake.spool import Spool, rows_between
from prism_assets.resources.lake.views import CatalogAdditions, define_views
from prism_assets.resources.store import FolderStore, unless_read_only

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pyarrow as pa
    import torch

SUFFIXES = (".parquet", ".safetensors", "")  # of the kinds of artefacts
_CHECKSUM_BYTES = 4
_ROWS_A_GROUP = 4096  # of a Parquet file
_CATALOG_BLOCK = "16384"  # bytes, DuckDB's least
_HEAD_TEXTS = ("table", "scope", "fingerprint", "content_hash", "run_id")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lake:
    """Publishes and finds artefacts below `root` (a folder, made when first needed)."""

    root: str

    @cached_property
    def store(self) -> FolderStore:
        """The store of all files below `root`."""
        return FolderStore(Path(self.root))

    @property
    def folder(self) -> Path:
        """The folder of the lake, to be named in messages."""
        return Path(self.root)

    def local(self, artifact: Artifact, *inside: str, suffix: str | None = None) -> Path:
        """Where an artefact can be read on this machine: its file or folder, a file in it, or the attachment with
        `suffix`."""
        path = self.store.local(artifact.key)
        return (path.with_suffix(suffix) if suffix else path).joinpath(*inside)

    # -- finding -----------------------------------------------------------------------------------------------

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artefact of this recipe, or None where it has not been made (or was found damaged and set aside)."""
        return self.get(recipe.table, recipe.fingerprint)

    def get(self, table: str, fingerprint: str) -> Artifact | None:
        """The artefact of `table` with this fingerprint, or None.

        A damaged file is renamed to `*.damaged` and reported as absent, so the next run rebuilds it from its inputs.
        """
        for suffix in SUFFIXES:
            key = f"artifacts/{table}/{fingerprint}{suffix}"
            if not self.store.exists(key):
                continue
            try:
                return self._artifact(key)
            except DamagedArtifact as damage:
                _log.warning("%s %s", damage, self.store.set_aside(key))
        return None

    def artifacts(self, table: str | None = None) -> Iterator[Artifact]:
        """Every published artefact, or every one of a table; damaged files are left out."""
        for key in self.store.keys(f"artifacts/{table or '*'}/*"):
            if Path(key).suffix in SUFFIXES:
                try:
                    yield self._artifact(key)
                except DamagedArtifact:
                    continue

    def beginning_with(self, prefix: str) -> list[tuple[str, str]]:
        """Table and fingerprint of every artefact whose fingerprint begins so, also of damaged ones."""
        keys = self.store.keys(f"artifacts/*/{prefix}*")
        return list(dict.fromkeys((Path(key).parent.name, Path(key).name.split(".")[0]) for key in keys))

    def owner_of(self, path: Path) -> tuple[str, str] | None:
        """Table and fingerprint of the artefact that a file is, lies beside or lies in; None for another file."""
        parts = Path(self.store.key_of(path) or "").parts
        return (parts[1], parts[2].split(".")[0]) if parts[:1] == ("artifacts",) and len(parts) > 2 else None

    def _artifact(self, key: str) -> Artifact:
        header = header_of(self.store.local(key))
        return Artifact(header["table"], header["fingerprint"], header["content_hash"], key, header)

    # -- heads -------------------------------------------------------------------------------------------------

    def head(self, table: str, partition: str | None = None, scope: str = "") -> Artifact | None:
        """The artefact that a partition shows now, or None where it has none."""
        entry = self._read_json(_head_key(table, partition, scope))
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
        keys = self.store.keys(f"heads/{table or '*'}/*/*.json")
        return [entry for key in keys if (entry := self._read_json(key))]

    def point(self, artifact: Artifact, partition: str | None = None, scope: str = "", run_id: str = "") -> Artifact:
        """Make `artifact` what the partition shows now, by one atomic rename."""
        entry = {
            "table": artifact.table,
            "scope": scope,
            "partition": partition,
            "fingerprint": artifact.fingerprint,
            "content_hash": artifact.content_hash,
            "run_id": run_id,
            "time": time.time(),
        }
        with self.store.disk_errors(f"the head of {artifact.table}"):
            self.store.put(_head_key(artifact.table, partition, scope), _writer(json.dumps(entry, indent=1)))
        return artifact

    def retire(self, table: str, partition: str | None = None, scope: str = "") -> None:
        """Forget what a partition shows. The artefact stays until `prism gc`."""
        self.store.delete(_head_key(table, partition, scope))

    def _read_json(self, key: str) -> dict[str, Any] | None:
        """The entry of a head; None where there is none, or what is there is none: the next run points it again."""
        try:
            entry = json.loads(self.store.local(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            entry = None
        if isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in _HEAD_TEXTS):
            return entry
        _log.warning("%s is damaged: it counts as showing nothing, and the next run writes it again", key)
        return None

    # -- publishing --------------------------------------------------------------------------------------------

    def publish(self, recipe: Recipe, content: Content, *, run_id: str = "") -> Artifact:
        """Publish what was made from a recipe, with its header in it; another run's where that one was faster."""
        if isinstance(content, Rows):
            return self.publish_table(
                recipe,
                content.table,
                run_id=run_id,
                notes=content.notes,
                attachments=content.attachments,
                compression=content.compression,
            )
        if isinstance(content, Tensors):
            return self.publish_tensors(recipe, content.tensors, run_id=run_id, notes=content.notes)
        return self.publish_folder(recipe, content.write, run_id=run_id, notes=content.notes)

    def publish_table(
        self,
        recipe: Recipe,
        table: "pa.Table | Spool",
        *,
        run_id: str = "",
        notes: Mapping[str, Any] | None = None,
        attachments: Mapping[str, Callable[[Path], object]] | None = None,
        compression: str = "zstd",
    ) -> Artifact:
        """Publish a table as Parquet with its header in the footer.

        `attachments` maps a file suffix (".jsonl") to a function that writes such a file; they lie beside the
        Parquet file under the same fingerprint and are in place before it, so a reader that finds the table finds them
        too.
        """
        import pyarrow.parquet as pq

        header = new_header(recipe, hash_rows(table), run_id, {"rows": table.num_rows, **(notes or {})})
        header |= {"hashed_in_blocks": True} if table.num_rows > ROWS_A_BLOCK else {}
        key = _artifact_key(recipe)

        def write(path: Path) -> None:
            schema = table.schema.with_metadata({**(table.schema.metadata or {}), HEADER_KEY: json.dumps(header)})
            with pq.ParquetWriter(path, schema, compression=compression, write_page_checksum=True) as writer:
                for start in range(0, table.num_rows, _ROWS_A_GROUP):
                    writer.write_table(rows_between(table, start, _ROWS_A_GROUP), _ROWS_A_GROUP)

        with self.store.disk_errors(recipe.table):
            for suffix, writer in (attachments or {}).items():
                if not self.store.exists(f"{key}.parquet"):
                    self.store.put(f"{key}{suffix}", writer)
            self.store.put_new(f"{key}.parquet", write)
        return self._published(recipe)

    def attach(self, artifact: Artifact, suffix: str, write: Callable[[Path], object]) -> None:
        """Write a file beside an artefact again, in the place of what is there."""
        with self.store.disk_errors(f"{artifact.table}{suffix}"):
            self.store.put(f"{artifact.key.rpartition('.')[0]}{suffix}", write)

    def spool(self, schema: "pa.Schema") -> Spool:
        """Somewhere to write the rows of a table that may be larger than the memory, before they are published."""
        return Spool(schema, self.store.workshop())

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
        header = new_header(recipe, hash_tensors(contiguous), run_id, notes or {})

        def write(path: Path) -> None:
            save_file(contiguous, path, metadata={HEADER_KEY: json.dumps(header)})

        with self.store.disk_errors(recipe.table):
            self.store.put_new(f"{_artifact_key(recipe)}.safetensors", write)
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

        def fill(folder: Path) -> None:
            folder.mkdir()
            extra = write(folder)
            header = new_header(recipe, hash_folder(folder), run_id, {**(notes or {}), **(extra or {})})
            header["files"] = sizes(folder)
            (folder / SIDECAR).write_text(json.dumps(header, indent=1))

        with self.store.disk_errors(recipe.table):
            self.store.put_new(_artifact_key(recipe), fill)
        return self._published(recipe)

    def _published(self, recipe: Recipe) -> Artifact:
        artifact = self.find(recipe)
        if artifact is None:
            raise LakeError(f"{recipe.table} {recipe.fingerprint} vanished right after it was published.")
        return artifact

    # -- reading -----------------------------------------------------------------------------------------------

    def read_table(self, artifact: Artifact, columns: Sequence[str] | None = None) -> "pa.Table":
        """The rows of a Parquet artefact, all columns or the named ones.

        Raises DamagedArtifact where the file cannot be read, or its bytes differ from their checksums. It is set aside
        then, so the next run misses it and makes it again.
        """
        import pyarrow.parquet as pq

        wanted = list(columns) if columns else None
        # Not `pq.read_table`: for a single file it takes twice as long.
        with self.reading(artifact) as path, pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(wanted)
        table = table.select(wanted) if wanted else table  # the file has them in its own order
        return table.replace_schema_metadata(None)

    @contextmanager
    def reading(self, artifact: Artifact) -> Iterator[Path]:
        """The file of an artefact. What pyarrow says of a damaged one, or the disk of one that it cannot reach, becomes
        what `read_table` raises."""
        import pyarrow as pa

        path = self.local(artifact)
        try:
            yield path
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # The operating system's own: the file went, or cannot be reached now. It may be whole.
                raise LakeError(f"{path} cannot be read: {error}. Run again when it can.") from error
            raise self.damaged(artifact, str(error)) from error

    def read_first(self, artifact: Artifact, rows: int, columns: Sequence[str] | None = None) -> "pa.Table":
        """The first rows of a Parquet artefact, however many it has. Raises as `read_table`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = list(columns) if columns else None
        with self.reading(artifact) as path, pq.ParquetFile(path, page_checksum_verification=True) as file:
            batch = next(file.iter_batches(rows, columns=wanted), None)
            table = pa.Table.from_batches([] if batch is None else [batch], None if batch else file.schema_arrow)
        table = table.select(wanted) if wanted else table
        return table.replace_schema_metadata(None).slice(0, rows)

    def schema(self, artifact: Artifact) -> "pa.Schema | None":
        """Columns and types of a table; None of an artefact of another kind."""
        import pyarrow.parquet as pq

        path = self.local(artifact)
        return pq.read_schema(path) if path.suffix == ".parquet" else None

    def read_tensors(self, artifact: Artifact) -> "dict[str, torch.Tensor]":
        """The tensors of a safetensors artefact.

        Raises DamagedArtifact where they differ from their content hash (safetensors has no checksums); as
        `read_table`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.local(artifact))
        except SafetensorError as error:
            raise self.damaged(artifact, str(error)) from error
        if hash_tensors(tensors) != artifact.content_hash:
            raise self.damaged(artifact, "the tensors differ from their content hash")
        return tensors

    def read_arrays(self, artifact: Artifact) -> "dict[str, np.ndarray]":
        """As `read_tensors`, in numpy: torch, which takes a second to import, is left out. Raises ValueError for
        tensors of a type that numpy lacks (bfloat16)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(self.local(artifact))
        except SafetensorError as error:
            raise self.damaged(artifact, str(error)) from error
        except KeyError as error:
            raise ValueError(f"{artifact.table} holds tensors of {error}, which numpy does not know") from error
        if hash_arrays(arrays) != artifact.content_hash:
            raise self.damaged(artifact, "the tensors differ from their content hash")
        return arrays

    def damaged(self, artifact: Artifact, why: str) -> DamagedArtifact:
        """What to raise for an artefact that turned out to be damaged when it was read; it is set aside."""
        name = f"{artifact.table}[{artifact.partition}]" if artifact.partition else artifact.table
        aside = self.store.set_aside(artifact.key)
        return DamagedArtifact(
            f"{self.local(artifact)} ({name}) is damaged ({why.rstrip('.')}). {aside} Run again: `prism run`."
        )

    # -- what is remembered ------------------------------------------------------------------------------------

    def cache_file(self, name: str) -> Path:
        """A file that may be deleted at any time, for code that remembers things in a format of its own."""
        return self.store.local(f"cache/{name}")

    def log_folder(self, *names: str) -> Path:
        """Where other tools write about a run, TensorBoard its event files: beside the artefacts, part of none."""
        return self.store.local("/".join(("tracking", *names)))

    def home_of(self, tool: str) -> Path:
        """A folder in the lake for what another tool keeps of its own: Dagster its instance."""
        return self.store.local(tool)

    def recall(self, name: str) -> bytes | None:
        """What was remembered under this name, or None where nothing was, or it is damaged."""
        try:
            content = self.store.local(f"cache/{name}").read_bytes()
        except FileNotFoundError:
            return None
        data, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return data if checksum == _checksum(data) else None

    def remember(self, name: str, data: bytes) -> None:
        """Keep what can be computed again at any time: `cache/<name>`, with a checksum, in place at once. In a lake
        that can only be read it is not kept."""
        with self.store.disk_errors(f"the cache entry {name}"), unless_read_only():
            self.store.put(f"cache/{name}", lambda path: path.write_bytes(data + _checksum(data)), durable=False)

    # -- the views ---------------------------------------------------------------------------------------------

    @property
    def catalog_path(self) -> Path:
        """The DuckDB file with the views over the lake."""
        return self.store.local("prism.duckdb")

    def connect(self, additions: CatalogAdditions | None = None) -> "duckdb.DuckDBPyConnection":
        """An in-memory DuckDB connection with the lake's views; it locks nothing."""
        import duckdb

        connection = duckdb.connect(":memory:")
        self._define_views(connection, additions)
        return connection

    def rebuild_catalog(self, additions: CatalogAdditions | None = None) -> Path:
        """Write a new `prism.duckdb` and rename it into place, so no reader and no step waits for another."""
        import duckdb

        def write(path: Path) -> None:
            # The tables are small: DuckDB's usual blocks of 256 KiB would be mostly empty.
            with duckdb.connect(str(path), config={"default_block_size": _CATALOG_BLOCK}) as connection:
                self._define_views(connection, additions)

        self.store.put("prism.duckdb", write, durable=False)
        return self.catalog_path

    def confine(self, connection: "duckdb.DuckDBPyConnection") -> None:
        """Let a connection read files of the lake's artefacts and no others, whatever functions a query calls."""
        folder = str(self.store.local("artifacts").resolve()).replace("'", "''")
        connection.execute(f"SET allowed_directories = ['{folder}']")
        connection.execute("SET enable_external_access = false")  # for good: DuckDB does not take it back

    def _define_views(self, connection: "duckdb.DuckDBPyConnection", additions: CatalogAdditions | None) -> None:
        artifacts = list(self.artifacts())
        files = {(one.table, one.fingerprint): str(self.local(one).resolve()) for one in artifacts}
        define_views(connection, files, artifacts, self.heads(), additions or CatalogAdditions())


def _artifact_key(recipe: Recipe) -> str:
    """The key of a recipe's artefact, without the suffix of its kind."""
    return f"artifacts/{recipe.table}/{recipe.fingerprint}"


def _head_key(table: str, partition: str | None, scope: str) -> str:
    return f"heads/{table}/{_safe(scope)}/{_safe(partition or '')}.json"


def _safe(name: str) -> str:
    return "_" + quote(name, safe="")


def _writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big")
