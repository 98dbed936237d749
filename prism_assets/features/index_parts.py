"""Where the rows of each shard are stored in the index."""

from typing import NamedTuple

from prism_assets.errors import StageError
from prism_assets.resources.index import SegmentPart
from prism_assets.resources.lake import Artifact, Lake

SEGMENT_FILE = "segment.faiss"


class IndexedShard(NamedTuple):
    """Where the rows of a shard are stored in the index: a segment of its own, or a part of a compacted one."""

    shard: str
    segment: str  # fingerprint
    rows: int
    features: str  # fingerprint
    first_row: int = 0  # in the segment


def indexed_shards(lake: Lake, index: Artifact) -> list[IndexedShard]:
    """The shards of an index, in key order."""
    return [IndexedShard(**row) for row in lake.read_table(index).to_pylist()]


def segment_part(lake: Lake, one: IndexedShard) -> SegmentPart:
    """The rows of a shard, to be opened. Raises StageError where their segment is not in the lake."""
    segment = lake.get("index_segments", one.segment)
    if segment is None:
        raise StageError(f"Shard {one.shard} lost its segment: materialise candidate_index again.")
    return SegmentPart(lake.local(segment, SEGMENT_FILE), one.first_row, one.rows)
