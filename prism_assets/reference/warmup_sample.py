"""The asset `warmup_sample`: the pinned share of the pool that the warm-up trains on."""

import hashlib
import math

import dagster as dg

from prism_assets.metadata import preview
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, Rows
from prism_assets.stage import Made, Stage
from prism_assets.work import Outcome, stage_of, the_whole

COVERS_POOL = Check(
    "sample_covers_pool",
    "At least half of the live pool was there when the warm-up sample was drawn. Otherwise raise `warmup.generation`: "
    "a new warm-up and a new feature version follow.",
)


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset("warmup_sample", group="reference", kinds={"parquet"}, deps=["live_pool"], checks=[COVERS_POOL])
    def warmup_sample(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """The random share of the pool that the warm-up trains on, drawn once a generation and then kept.

        The rows are copied, so a retired shard takes nothing away. New shards do not change the sample: a new warm-up
        would make every gradient feature stale.
        """
        stage = stage_of(project, context)
        pool = stage.shown("live_pool")
        sample, computed = _pinned_or_drawn(stage, pool)
        stage.show(sample)
        eligible = set(sample.notes["shards"])
        live = stage.lake.read_table(pool, ["shard", "canonical_rows"]).to_pylist()
        rows = sum(row["canonical_rows"] for row in live)
        share = sum(row["canonical_rows"] for row in live if row["shard"] in eligible) / max(rows, 1)
        shown = stage.lake.read_table(sample, ["source", "prompt", "completion"]).slice(0, 8)
        metadata = {
            "dagster/row_count": sample.notes["rows"],
            "generation": stage.settings.warmup.generation,
            "sampled_from_shards": len(eligible),
            "rows": preview(shown.to_pylist()),
        }
        checks = [COVERS_POOL(share >= 0.5, share_of_live_pool=share)]
        return the_whole(context, stage, Outcome([sample], computed, metadata, checks))

    return warmup_sample


def _pinned_or_drawn(stage: Stage, pool: Artifact) -> Made:
    """The sample of this scope; where its head was lost, the first drawn: a new one would make every feature stale."""
    drawn = [one for one in stage.lake.artifacts("warmup_sample") if one.header["version"] == stage.warmup_scope]
    first = min(drawn, key=lambda one: one.header["created"], default=None)
    pinned = stage.shown_or_none("warmup_sample") or first
    if pinned is not None:
        return Made(pinned, 0)
    settings = stage.settings.warmup.model_dump(include={"share", "min_rows", "seed", "generation"})
    recipe = stage.recipe("warmup_sample", settings, {"scope": stage.warmup_scope, "pool": pool})
    return stage.make(recipe, lambda: _draw(stage, pool))


def _draw(stage: Stage, pool: Artifact) -> Rows:
    """The `share` of canonical rows with the smallest keyed hash, so the order of arrival does not matter."""
    import pyarrow as pa

    warmup = stage.settings.warmup
    parts, keys = [], []
    shards = stage.lake.read_table(pool).to_pylist()
    for row in shards:
        rows = stage.lake.read_table(stage.shown("candidates", row["shard"]))
        excluded = set(row["excluded_rows"])
        kept = [position for position in range(rows.num_rows) if position not in excluded]
        rows = rows.take(pa.array(kept, pa.int64()))  # no row may be left
        parts.append(rows)
        keys += [
            hashlib.sha256(f"{warmup.seed}:{warmup.generation}:{one}".encode()).hexdigest()
            for one in rows["id"].to_pylist()
        ]
    wanted = min(len(keys), max(warmup.min_rows, math.ceil(warmup.share * len(keys))))
    chosen = sorted(range(len(keys)), key=keys.__getitem__)[:wanted]
    return Rows(pa.concat_tables(parts).take(chosen), {"shards": [row["shard"] for row in shards]})
