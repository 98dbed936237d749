"""The asset `candidate_index`: immutable FAISS segments, reconciled with the live pool."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg

from prism_assets.features.blocks import read_blocks, vectors_of, weighted_mean
from prism_assets.features.index_parts import SEGMENT_FILE, IndexedShard, indexed_shards
from prism_assets.metadata import preview
from prism_assets.project import Check, CheckResult, Project
from prism_assets.resources.lake import Artifact, Folder, Rows
from prism_assets.stage import Made, Stage
from prism_assets.work import Outcome, stage_of, the_whole

COMPACT_BELOW_ROWS = 16_384  # larger segments are left alone by compaction
COMPACT_TAG = "prism/compact"
MOST_DRIFT = 0.5  # nats per token

INDEX_COMPLETE = Check("index_complete", "Every live shard has a segment.")
WARMUP_DRIFT = Check(
    "warmup_drift",
    "Shards that came after the warm-up sample are no harder for the warm-up model than the shards it was drawn from "
    f"(difference of mean log-probability within {MOST_DRIFT} nats per token). Otherwise raise `warmup.generation`.",
)


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "candidate_index",
        group="features",
        kinds={"faiss"},
        deps=["live_pool", project.all_shards_of("candidate_features")],
        checks=[INDEX_COMPLETE, WARMUP_DRIFT],
    )
    def candidate_index(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Immutable FAISS inner-product segments, reconciled with the live pool.

        A new shard is a segment of its own; once a night the small ones are compacted into one (run tag
        `prism/compact`), which changes no answer. A shard whose features are not finished is left out and counted; the
        next materialisation takes it in.
        """
        stage = stage_of(project, context)
        return the_whole(context, stage, _reconcile(stage, context.run.tags.get(COMPACT_TAG) == "true"))

    return candidate_index


class Placed(NamedTuple):
    """Shards with their places in segments, and how many segments were made for them."""

    shards: list[IndexedShard]
    computed: int


def _reconcile(stage: Stage, compact: bool) -> Outcome:
    pool = stage.shown("live_pool")
    keys = stage.lake.read_table(pool, ["shard"])["shard"].to_pylist()
    found = {key: stage.shown_or_none("candidate_features", key) for key in keys}
    ready = {key: features for key, features in found.items() if features is not None}
    placed = _place(stage, ready)
    if compact:
        compacted = _compact(stage, placed.shards)
        placed = Placed(compacted.shards, placed.computed + compacted.computed)
    index, made = _list_segments(stage, pool, placed.shards)
    stage.show(index)
    missing = [key for key in keys if key not in ready]
    metadata = {
        "dagster/row_count": index.notes["rows"],
        "feature_version": stage.feature_version,
        "shards": len(placed.shards),
        "segments": index.notes["segments"],
        "segments_computed": placed.computed,
        "rows": preview(stage.lake.read_table(index).to_pylist()),
    }
    complete = INDEX_COMPLETE(not missing, missing=len(missing), shards=", ".join(missing[:20]))
    sampled = set(stage.shown("warmup_sample").notes["shards"])
    return Outcome([index], placed.computed + made, metadata, [complete, _drift(ready, sampled)])


def _place(stage: Stage, ready: Mapping[str, Artifact]) -> Placed:
    """Every ready shard in a segment: the one it is in already, else a new one of its own."""
    before = stage.shown_or_none("candidate_index")
    known = {one.features: one for one in indexed_shards(stage.lake, before)} if before is not None else {}
    shards, computed = [], 0
    with stage.progress("index segments", len(ready), "segments") as progress:
        for key, features in ready.items():
            place = known.get(features.fingerprint)
            if place is None or stage.lake.get("index_segments", place.segment) is None:
                segment, made = _segment(stage, features)
                computed += made
                place = IndexedShard(key, segment.fingerprint, segment.notes["rows"], features.fingerprint)
            shards.append(place._replace(shard=key))
            progress.advance()
    return Placed(shards, computed)


def _segment(stage: Stage, features: Artifact) -> Made:
    """The segment of one shard's rows."""

    def write(folder: Path) -> dict[str, Any]:
        vectors = vectors_of(read_blocks(stage.lake, features, ["vector"]))
        stage.index.write_segment(folder / SEGMENT_FILE, vectors)
        return {"rows": len(vectors)}

    recipe = stage.recipe(
        "index_segments", {"storage": stage.index.storage}, {"features": features}, partition=features.partition
    )
    return stage.make(recipe, lambda: Folder(write))


def _compact(stage: Stage, shards: Sequence[IndexedShard]) -> Placed:
    """The same shards with the small segments that hold one shard each copied into one, code for code.

    No answer changes. A segment that is compacted already, or large, stays as it is.
    """
    holders = Counter(one.segment for one in shards)
    small = [one for one in shards if holders[one.segment] == 1 and one.rows <= COMPACT_BELOW_ROWS]
    if len(small) < 2:
        return Placed(list(shards), 0)
    parts = _segments(stage, small)

    def write(folder: Path) -> dict[str, Any]:
        files = [stage.lake.local(part, SEGMENT_FILE) for part in parts]
        offsets = stage.index.compact(files, folder / SEGMENT_FILE)
        return {"rows": sum(one.rows for one in small), "first_rows": offsets}

    recipe = stage.recipe("index_segments", {"storage": stage.index.storage}, {"segments": parts})
    whole, computed = stage.make(recipe, lambda: Folder(write))
    compacted = {
        one.shard: one._replace(segment=whole.fingerprint, first_row=first)
        for one, first in zip(small, whole.notes["first_rows"], strict=True)
    }
    return Placed([compacted.get(one.shard, one) for one in shards], computed)


def _list_segments(stage: Stage, pool: Artifact, shards: Sequence[IndexedShard]) -> Made:
    """The list of segments that are queried for one state of the pool."""
    segments = _segments(stage, shards)
    recipe = stage.recipe(
        "candidate_index", {"shards": [list(one) for one in shards]}, {"pool": pool, "segments": segments}
    )
    return stage.make(recipe, lambda: _index_rows(pool, shards, len(segments)))


def _index_rows(pool: Artifact, shards: Sequence[IndexedShard], segments: int) -> Rows:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("shard", pa.string()),
            ("segment", pa.string()),
            ("first_row", pa.int64()),
            ("rows", pa.int64()),
            ("features", pa.string()),
        ]
    )
    notes = {"rows": sum(one.rows for one in shards), "pool": pool.fingerprint, "segments": segments}
    return Rows(pa.Table.from_pylist([one._asdict() for one in shards], schema), notes)


def _segments(stage: Stage, shards: Sequence[IndexedShard]) -> list[Artifact]:
    """The segments of these shards, each once."""
    found = [stage.lake.get("index_segments", name) for name in dict.fromkeys(one.segment for one in shards)]
    return [segment for segment in found if segment is not None]


def _drift(features: Mapping[str, Artifact], sampled: set[str]) -> CheckResult:
    """Mean log-probability of old shards against new ones under the warm-up model, from the stored features."""
    facts = [(key in sampled, one.notes["mean_log_prob"], one.notes["rows"]) for key, one in features.items()]
    old = weighted_mean([(value, rows) for known, value, rows in facts if known])
    new = weighted_mean([(value, rows) for known, value, rows in facts if not known])
    if old is None or new is None:
        return WARMUP_DRIFT(True, new_shards=sum(not known for known, *_ in facts))
    return WARMUP_DRIFT(new >= old - MOST_DRIFT, mean_log_prob_sampled_shards=old, mean_log_prob_new_shards=new)
