"""Whether what an artefact holds is what was published: its content hash, computed again from the file."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prism_assets.errors import DamagedArtifact, LakeError
from prism_assets.resources.lake.hashing import ROWS_A_BLOCK, hash_folder, hash_rows
from prism_assets.resources.lake.lake import SUFFIXES, Lake
from prism_assets.resources.lake.recipe import FINGERPRINT, Artifact

if TYPE_CHECKING:
    import pyarrow as pa


def verify(lake: Lake, artifact: Artifact) -> None:
    """Read an artefact whole. Raises DamagedArtifact where its content is not what its header says, having set it
    aside, so that the next run makes it again; and LakeError where it cannot be read now."""
    path = lake.local(artifact)
    try:
        if path.suffix == ".safetensors":
            lake.read_tensors(artifact)
            return
        found = _hash_of_parquet(lake, artifact) if path.suffix == ".parquet" else hash_folder(path)
    except OSError as error:
        raise LakeError(f"{path} cannot be read: {error}. Look again when it can.") from error
    if found not in (None, artifact.content_hash):
        raise lake.damaged(artifact, "its content differs from its content hash")


def damaged_among(lake: Lake, part: int = 0, parts: int = 1) -> Iterator[str]:
    """Verify every artefact whose fingerprint falls into a part of so many; yields a sentence for each damaged one.

    A file whose header cannot be read is damaged too.
    """
    for key in lake.store.keys("artifacts/*/*"):
        table, name = key.split("/")[1:3]
        fingerprint, dot, suffix = name.partition(".")
        if dot + suffix not in SUFFIXES or not FINGERPRINT.match(fingerprint):
            continue  # what lies beside artefacts, or is none of ours
        if int(fingerprint[:8], 16) % parts != part:
            continue
        found = lake.get(table, fingerprint)
        if found is None and lake.store.exists(key):
            found = lake.get(table, fingerprint)  # another process may have published it anew meanwhile
        if found is None:
            there = lake.store.exists(key)
            what = "could not be moved aside: do that, or remove it" if there else "was set aside"
            yield f"{lake.store.local(key)} could not be read and {what}. Run again: `prism run`."
            continue
        try:
            verify(lake, found)
        except DamagedArtifact as damage:
            yield str(damage)
        except LakeError as error:
            yield f"{table} {fingerprint} cannot be read: {error}"


class _ParquetRows:
    """A Parquet file as `hash_rows` reads tables: a column of a block of rows at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.schema = file.schema_arrow.remove_metadata()
        self.num_rows = file.metadata.num_rows
        self._ends = []
        for group in range(file.num_row_groups):
            self._ends.append((self._ends[-1] if self._ends else 0) + file.metadata.row_group(group).num_rows)

    def read(self, start: int, rows: int, columns: Sequence[str] | None = None) -> "pa.Table":
        """So many rows from the row `start`."""
        starts = [0, *self._ends[:-1]]
        spans = enumerate(zip(starts, self._ends, strict=False))
        groups = [group for group, (first, end) in spans if end > start and first < start + rows]
        table = self._file.read_row_groups(groups, columns=list(columns) if columns else None)
        table = table.select(list(columns)) if columns else table
        return table.slice(start - starts[groups[0]], rows) if groups else table


def _hash_of_parquet(lake: Lake, artifact: Artifact) -> str | None:
    """The content hash; None for a large table of before tables were hashed in blocks, whose pages have checksums."""
    import pyarrow.parquet as pq

    with lake.reading(artifact) as path, pq.ParquetFile(path, page_checksum_verification=True) as file:
        rows = _ParquetRows(file)
        if rows.num_rows > ROWS_A_BLOCK and not artifact.header.get("hashed_in_blocks"):
            for group in range(file.num_row_groups):
                file.read_row_group(group)
            return None
        return hash_rows(rows)
