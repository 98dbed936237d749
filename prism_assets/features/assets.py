"""Features: sketched gradient rows of candidates in content-keyed blocks, index segments, and target gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version
from prism_assets.partitions import shards, targets_of
from prism_assets.reference.assets import (
    WarmupCheckpoint,
    adapted,
    load_checkpoints,
    lora_identity,
    warmup_scope,
)
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake, Recipe, digest
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from prism_assets.features.gradients import FeatureRows, GradientEngine
    from prism_assets.features.preconditioner import Preconditioner
    from prism_assets.features.sketch import Projection
    from prism_assets.selection.direction import TargetSet
    from resources.vector_store import SegmentPart

ENGINE_VERSION = 1  # raised by hand when the same rows get other numbers, beyond rounding
SEGMENT_VERSION = 1
INDEX_VERSION = 1
TARGET_VERSION = 1
BLOCK_ROWS = 4096
COMPACT_BELOW_ROWS = 16_384  # larger segments are left alone by compaction
COMPACT_TAG = "prism/compact"

GROUP = "features"


def feature_identity(settings: Settings, model: LanguageModel, warmup: Artifact) -> dict[str, Any]:
    """What a candidate's row depends on beside its tokens."""
    return {
        "engine": ENGINE_VERSION,
        "model": model.identify().fingerprint,
        "warmup": warmup.content_hash,
        "lora": lora_identity(settings),
        "dtype": str(model.torch_dtype()),
        **settings.features.model_dump(exclude={"token_budget"}),
    }


def feature_version(settings: Settings, lake: Lake, model: LanguageModel) -> str:
    """The version under which features, index and directions live side by side with those of other versions."""
    warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))
    return digest([corpus_version(settings, model), feature_identity(settings, model, warmup)])[:12]


class GradientPass:
    """Loads model, checkpoints and sketch on first use, once for all partitions of a run."""

    def __init__(self, settings: Settings, model: LanguageModel, warmup: Artifact) -> None:
        self.settings, self.model = settings, model
        self.checkpoints: list[WarmupCheckpoint] = load_checkpoints(warmup)
        self._stack = ExitStack()
        self._engine: GradientEngine | None = None
        self._start: dict[str, torch.Tensor] = {}

    def close(self) -> None:
        self._stack.close()

    def at(self, checkpoint: WarmupCheckpoint | None) -> "GradientEngine":
        """The gradient engine with its parameters at a checkpoint, or (None) where fine-tuning starts."""
        if self._engine is None:
            with stage.uncounted():  # whoever comes first would pay for the others
                self._engine = self._build()
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._engine.model, checkpoint.lora if checkpoint else self._start)
        return self._engine

    def _build(self) -> "GradientEngine":
        from peft import get_peft_model_state_dict

        from prism_assets.features.gradients import GradientEngine

        peft_model = self._stack.enter_context(adapted(self.settings, self.model))
        self._start = {name: value.clone() for name, value in get_peft_model_state_dict(peft_model).items()}
        return GradientEngine(peft_model, token_budget=self.settings.features.token_budget)

    def projection(self, engine: "GradientEngine") -> "Projection":
        """The sketch of the settings, or exact features."""
        from prism_assets.features.sketch import ExactFeatures, Sketch

        features = self.settings.features
        if features.sketch_dim == "exact":
            return ExactFeatures(engine.parameter_shapes)
        return Sketch(features.sketch_dim, features.seed)

    def preconditioner(self, checkpoint: WarmupCheckpoint) -> "Preconditioner":
        """The frozen optimiser state of a checkpoint in the form that the settings name."""
        from prism_assets.features.preconditioner import Moments, Preconditioner

        moments = {
            name: Moments(checkpoint.exp_avg[name], checkpoint.exp_avg_sq[name]) for name in checkpoint.exp_avg
        }
        return Preconditioner.build(
            self.settings.features.optimizer,
            moments,
            step=checkpoint.optimizer_step,
            betas=checkpoint.betas,
            eps=checkpoint.eps,
        )


@contextmanager
def gradient_pass(settings: Settings, model: LanguageModel, warmup: Artifact) -> Iterator[GradientPass]:
    """A `GradientPass` that gives the model back at the end."""
    work = GradientPass(settings, model, warmup)
    try:
        yield work
    finally:
        work.close()


def pending_features(settings: Settings, lake: Lake, model: LanguageModel, keys: Sequence[str]) -> list[str]:
    """The shards among `keys` without features of today's version, or with a missing or damaged block."""
    version = feature_version(settings, lake, model)
    found = {key: lake.head("candidate_features", key, version) for key in keys}
    return [key for key, features in found.items() if features is None or None in _blocks_of(lake, features)]


@dg.asset(
    partitions_def=shards,
    group_name=GROUP,
    kinds={"pytorch", "parquet"},
    code_version=str(ENGINE_VERSION),
    deps=["candidates", "warmup_checkpoints"],
    backfill_policy=dg.BackfillPolicy.single_run(),
    pool="model",
    check_specs=[
        dg.AssetCheckSpec(
            "gradients_usable", asset="candidate_features", description="No row was refused for its gradient."
        )
    ],
)
def candidate_features(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
) -> dg.MaterializeResult:
    """Per-example LoRA gradients at the warm-up checkpoints: preconditioned, sketched, unit-normalised, float16.

    Rows lie in immutable blocks of at most 4,096, keyed by their content, beside exact norms and mean
    log-probabilities. A finished block is never computed again; a row whose gradient is not finite or vanishes is
    refused with its reason.
    """
    warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, language_model))
    version = feature_version(settings, lake, language_model)
    corpus = corpus_version(settings, language_model)

    with gradient_pass(settings, language_model, warmup) as work:
        return stage.each_partition(
            context, lambda shard: _shard_features(context, settings, lake, work, warmup, version, corpus, shard)
        )


def _shard_features(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    warmup: Artifact,
    version: str,
    corpus: str,
    shard: str,
) -> stage.Outcome:
    """All blocks of one shard, and the list of them that is the shard's feature artefact."""
    import pyarrow as pa

    candidates = lake.require("candidates", shard, corpus)
    identity = feature_identity(settings, work.model, warmup)
    recipe = Recipe(
        "candidate_features", ENGINE_VERSION, identity, {"candidates": candidates, "warmup": warmup},
        partition=shard, version=version,
    )  # fmt: skip
    artifact = lake.find(recipe)
    computed = 0
    blocks = _blocks_of(lake, artifact) if artifact is not None else []
    if artifact is None or None in blocks:
        rows = lake.read_table(candidates, ["id", "input_ids", "loss_mask"])
        blocks = []
        with stage.progress(context, f"gradients of {shard}", rows.num_rows * len(work.checkpoints)) as progress:
            # A shard without rows has one empty block, which says how wide its features are.
            for first in range(0, max(rows.num_rows, 1), BLOCK_ROWS):
                block, made = _publish_block(
                    lake, work, rows.slice(first, BLOCK_ROWS), identity, warmup, version, context.run_id, progress
                )
                blocks.append(block)
                computed += made
        artifact = lake.publish_table(
            recipe,
            pa.Table.from_pylist(
                [
                    {
                        "block": block.fingerprint,
                        "block_content_hash": block.content_hash,
                        "rows": block.notes["rows"],
                        "refused": block.notes["refused"],
                    }
                    for block in blocks
                ],
                pa.schema(
                    [
                        ("block", pa.string()),
                        ("block_content_hash", pa.string()),
                        ("rows", pa.int64()),
                        ("refused", pa.int64()),
                    ]
                ),
            ),
            run_id=context.run_id,
            notes={
                "rows": rows.num_rows,
                "refused": sum(block.notes["refused"] for block in blocks),
                "mean_log_prob": _weighted_mean([(b.notes["mean_log_prob"], b.notes["rows"]) for b in blocks]),
            },
        )
    for block in blocks:
        lake.point(block, block.fingerprint, version, context.run_id)
    lake.point(artifact, shard, version, context.run_id)
    refused = artifact.notes["refused"]
    return stage.Outcome(
        [artifact],
        computed,
        metadata={
            "dagster/row_count": artifact.notes["rows"],
            "feature_version": version,
            "blocks": len(blocks),
            "blocks_computed": computed,
            "refused": refused,
            "mean_log_prob": artifact.notes["mean_log_prob"],
            "rows": stage.preview(_feature_preview(lake, blocks)),
        },
        checks={"gradients_usable": (not refused, {"refused": refused, "rows": artifact.notes["rows"]})},
    )


def _blocks_of(lake: Lake, features: Artifact) -> list[Artifact | None]:
    """The blocks of a shard's features in row order; None where one is missing or was found damaged."""
    return [lake.get("feature_blocks", name) for name in lake.read_table(features, ["block"])["block"].to_pylist()]


def read_blocks(lake: Lake, features: Artifact, columns: Sequence[str]) -> "pa.Table":
    """Columns of all rows of a shard's features, in the order of the shard. Raises LakeError for a missing block."""
    import pyarrow as pa

    names = lake.read_table(features, ["block"])["block"].to_pylist()
    tables = []
    for name in names:
        block = lake.get("feature_blocks", name)
        if block is None:
            raise dg.Failure(
                f"Feature block {name} of shard {features.partition} is missing or damaged: materialise "
                f"candidate_features[{features.partition}] again, it rebuilds that block alone."
            )
        tables.append(lake.read_table(block, columns))
    return pa.concat_tables(tables)


def _publish_block(
    lake: Lake,
    work: GradientPass,
    rows: "pa.Table",
    identity: dict[str, Any],
    warmup: Artifact,
    version: str,
    run_id: str,
    progress: stage.Progress,
) -> tuple[Artifact, int]:
    from prism_assets.corpus.tokenization import from_table
    from resources.lake import hash_table

    recipe = Recipe(
        "feature_blocks", ENGINE_VERSION, identity, {"rows": hash_table(rows), "warmup": warmup}, version=version
    )
    artifact = lake.find(recipe)
    if artifact is not None:
        progress.advance(rows.num_rows * len(work.checkpoints))
        return artifact, 0
    examples = from_table(rows)
    stopwatch = stage.Stopwatch()
    passes = []
    for checkpoint in work.checkpoints:
        engine = work.at(checkpoint)
        start = progress.done
        passes.append(
            engine.feature_rows(
                examples,
                sketch=work.projection(engine),
                preconditioner=work.preconditioner(checkpoint),
                progress=lambda done, _, start=start: progress.update(start + done),
            )
        )
        progress.update(start + len(examples))
    table = feature_table(rows["id"].to_pylist(), passes)
    scores = [score for one in passes[-1:] for score in one.mean_log_probs]
    notes = {
        "refused": sum(reason is not None for reason in table["refused"].to_pylist()),
        "mean_log_prob": _weighted_mean([(float(score), 1) for score in scores]),
        "cost": stopwatch.cost(),
    }
    return lake.publish_table(recipe, table, run_id=run_id, notes=notes, compression="none"), 1


def feature_table(ids: Sequence[str], passes: "Sequence[FeatureRows]") -> "pa.Table":
    """Rows [n] with unit blocks of each checkpoint side by side: vector float16 [C·K], norms float64 [C]."""
    import numpy as np
    import pyarrow as pa

    blocks, reasons = [], np.array([None] * len(ids), dtype=object)
    for one in passes:
        usable = np.array([reason is None for reason in one.refused], dtype=bool)
        unit = np.zeros_like(one.rows)
        unit[usable] = one.rows[usable] / one.norms[usable, None]
        blocks.append(unit.astype(np.float16))
        for position in np.flatnonzero(~usable):
            reasons[position] = reasons[position] or one.refused[position]
    vectors = np.concatenate(blocks, axis=1)
    vectors[[reason is not None for reason in reasons]] = 0

    def per_checkpoint(name: str) -> "pa.Array":
        return pa.array(np.stack([getattr(one, name) for one in passes], axis=1).tolist(), pa.list_(pa.float64()))

    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            "norm": per_checkpoint("norms"),
            "gradient_norm": per_checkpoint("gradient_norms"),
            "mean_log_prob": per_checkpoint("mean_log_probs"),
            "refused": pa.array(reasons.tolist(), pa.string()),
        }
    )


def _weighted_mean(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    import math

    finite = [(value, weight) for value, weight in pairs if value is not None and math.isfinite(value)]
    total = sum(weight for _, weight in finite)
    return sum(value * weight for value, weight in finite) / total if total else None


def _feature_preview(lake: Lake, blocks: Sequence[Artifact]) -> list[dict[str, Any]]:
    if not blocks:
        return []
    columns = ["id", "norm", "gradient_norm", "mean_log_prob", "refused"]
    return lake.read_table(blocks[0], columns).slice(0, 8).to_pylist()


# -- index -------------------------------------------------------------------------------------------------------


def vectors_of(table: "pa.Table") -> "np.ndarray":
    """The column `vector` as float16 [n, C·K]."""
    import numpy as np

    column = table["vector"].combine_chunks()
    column = column if not hasattr(column, "chunks") else column.chunk(0)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    return values.reshape(len(column), column.type.list_size)


@dg.asset(
    group_name=GROUP,
    kinds={"faiss"},
    code_version=str(INDEX_VERSION),
    deps=["live_pool", dg.AssetDep("candidate_features", partition_mapping=dg.AllPartitionMapping())],
    check_specs=[
        dg.AssetCheckSpec("index_complete", asset="candidate_index", description="Every live shard has a segment."),
        dg.AssetCheckSpec(
            "warmup_drift",
            asset="candidate_index",
            description="Shards that came after the warm-up sample are no harder for the warm-up model than the "
            "shards it was drawn from (difference of mean log-probability within 0.5 nats per token). Otherwise "
            "raise `warmup.generation`.",
        ),
    ],
)
def candidate_index(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
    vector_store: VectorStore,
) -> dg.MaterializeResult:
    """Immutable FAISS inner-product segments, reconciled with the live pool.

    A new shard is a segment of its own; once a night the small ones are compacted into one (run tag `prism/compact`),
    which changes no answer. A shard whose features are not finished is left out and counted; the next materialisation
    takes it in.
    """
    version = feature_version(settings, lake, language_model)
    pool = lake.require("live_pool", None, corpus_version(settings, language_model))
    keys = lake.read_table(pool, ["shard"])["shard"].to_pylist()
    features = {key: lake.head("candidate_features", key, version) for key in keys}
    ready = {key: artifact for key, artifact in features.items() if artifact is not None}
    placed, computed = _placed(context, lake, vector_store, ready, version)
    if context.run.tags.get(COMPACT_TAG) == "true":
        placed, compacted = _compacted(lake, vector_store, placed, version, context.run_id)
        computed += compacted
    index, made = _publish_index(lake, pool, placed, version, context.run_id)
    lake.point(index, None, version, context.run_id)
    missing = [key for key in keys if key not in ready]
    sampled = set(lake.require("warmup_sample", None, warmup_scope(settings, language_model)).notes["shards"])
    return stage.each_partition(
        context,
        lambda _: stage.Outcome(
            [index],
            computed + made,
            {
                "dagster/row_count": index.notes["rows"],
                "feature_version": version,
                "shards": len(placed),
                "segments": index.notes["segments"],
                "segments_computed": computed,
                "rows": stage.preview(lake.read_table(index).to_pylist()),
            },
            {
                "index_complete": (not missing, {"missing": len(missing), "shards": ", ".join(missing[:20])}),
                "warmup_drift": _drift(ready, sampled),
            },
        ),
    )


class IndexedShard(NamedTuple):
    """Where the rows of a shard stand in the index: a segment of its own, or a part of a compacted one."""

    shard: str
    segment: str  # fingerprint
    rows: int
    features: str  # fingerprint
    first_row: int = 0  # in the segment


def indexed_shards(lake: Lake, index: Artifact) -> list[IndexedShard]:
    """The shards of an index, in key order."""
    return [IndexedShard(**row) for row in lake.read_table(index).to_pylist()]


def segment_part(lake: Lake, one: IndexedShard) -> "SegmentPart":
    """The rows of a shard, to be opened. Raises dagster.Failure where their segment is not in the lake."""
    from resources.vector_store import SegmentPart

    segment = lake.get("index_segments", one.segment)
    if segment is None:
        raise dg.Failure(f"Shard {one.shard} lost its segment: materialise candidate_index again.")
    return SegmentPart(segment.path / "segment.faiss", one.first_row, one.rows)


def _placed(
    context: dg.AssetExecutionContext, lake: Lake, store: VectorStore, ready: Mapping[str, Artifact], version: str
) -> tuple[list[IndexedShard], int]:
    """Every ready shard in a segment: where it stood already, else in a new one of its own; and how many were made."""
    before = lake.head("candidate_index", None, version)
    known = {one.features: one for one in indexed_shards(lake, before)} if before is not None else {}
    placed, computed = [], 0
    with stage.progress(context, "index segments", len(ready), "segments") as progress:
        for key, features in ready.items():
            found = known.get(features.fingerprint)
            if found is None or lake.get("index_segments", found.segment) is None:
                segment, made = _publish_segment(lake, store, features, version, context.run_id)
                computed += made
                found = IndexedShard(key, segment.fingerprint, segment.notes["rows"], features.fingerprint)
            placed.append(found._replace(shard=key))
            progress.advance()
    return placed, computed


def _publish_segment(
    lake: Lake, store: VectorStore, features: Artifact, version: str, run_id: str
) -> tuple[Artifact, int]:
    recipe = Recipe(
        "index_segments", SEGMENT_VERSION, {"storage": store.storage}, {"features": features},
        partition=features.partition, version=version,
    )  # fmt: skip
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0

    def write(folder: Any) -> dict[str, Any]:
        vectors = vectors_of(read_blocks(lake, features, ["vector"]))
        store.write_segment(folder / "segment.faiss", vectors)
        return {"rows": len(vectors)}

    return lake.publish_folder(recipe, write, run_id=run_id), 1


def _compacted(
    lake: Lake, store: VectorStore, placed: Sequence[IndexedShard], version: str, run_id: str
) -> tuple[list[IndexedShard], int]:
    """The same shards with the small segments that hold one shard each copied into one, code for code.

    No answer changes. A segment that is compacted already, or large, stays as it is.
    """
    holders: dict[str, int] = {}
    for one in placed:
        holders[one.segment] = holders.get(one.segment, 0) + 1
    small = [one for one in placed if holders[one.segment] == 1 and one.rows <= COMPACT_BELOW_ROWS]
    if len(small) < 2:
        return list(placed), 0
    parts = [lake.get("index_segments", one.segment) for one in small]
    recipe = Recipe("index_segments", SEGMENT_VERSION, {"storage": store.storage}, {"segments": parts}, version=version)
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:

        def write(folder: Any) -> dict[str, Any]:
            offsets = store.compact([part.path / "segment.faiss" for part in parts], folder / "segment.faiss")
            return {"rows": sum(one.rows for one in small), "first_rows": offsets}

        artifact = lake.publish_folder(recipe, write, run_id=run_id)
    moved = {
        one.shard: one._replace(segment=artifact.fingerprint, first_row=first)
        for one, first in zip(small, artifact.notes["first_rows"], strict=True)
    }
    return [moved.get(one.shard, one) for one in placed], int(computed)


def _publish_index(
    lake: Lake, pool: Artifact, placed: Sequence[IndexedShard], version: str, run_id: str
) -> tuple[Artifact, int]:
    """The list of segments that answer queries for one state of the pool."""
    import pyarrow as pa

    segments = [lake.get("index_segments", name) for name in dict.fromkeys(one.segment for one in placed)]
    recipe = Recipe(
        "candidate_index", INDEX_VERSION, {"shards": [list(one) for one in placed]},
        {"pool": pool, "segments": segments}, version=version,
    )  # fmt: skip
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    schema = pa.schema(
        [
            ("shard", pa.string()),
            ("segment", pa.string()),
            ("first_row", pa.int64()),
            ("rows", pa.int64()),
            ("features", pa.string()),
        ]
    )
    table = pa.Table.from_pylist([one._asdict() for one in placed], schema)
    notes = {"rows": sum(one.rows for one in placed), "pool": pool.fingerprint, "segments": len(segments)}
    return lake.publish_table(recipe, table, run_id=run_id, notes=notes), 1


def _drift(features: dict[str, Artifact], sampled: set[str]) -> tuple[bool, dict[str, Any]]:
    """Mean log-probability of old shards against new ones under the warm-up model, from the stored features."""
    facts = [(key in sampled, one.notes["mean_log_prob"], one.notes["rows"]) for key, one in features.items()]
    old = _weighted_mean([(value, rows) for known, value, rows in facts if known])
    new = _weighted_mean([(value, rows) for known, value, rows in facts if not known])
    if old is None or new is None:
        return True, {"new_shards": sum(not known for known, *_ in facts)}
    return new >= old - 0.5, {"mean_log_prob_sampled_shards": old, "mean_log_prob_new_shards": new}


# -- targets -----------------------------------------------------------------------------------------------------


def target_set(targets: "pa.Table") -> "TargetSet":
    """The tokenised targets, plain or pairs."""
    from prism_assets.corpus.tokenization import from_table, rejected_from_table
    from prism_assets.selection.direction import TargetSet

    examples = from_table(targets)
    pairs = targets["rejected"].null_count < targets.num_rows
    if pairs:
        examples = [*examples, *rejected_from_table(targets)]
    return TargetSet(examples, targets.num_rows, pairs)


def build_target_features(settings: Settings) -> dg.AssetsDefinition:
    """The asset `target_features`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"pytorch", "parquet"},
        code_version=str(TARGET_VERSION),
        deps=["targets", "warmup_checkpoints"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        check_specs=[
            dg.AssetCheckSpec(
                "target_gradients_usable", asset="target_features", description="No target was refused for its gradient."
            )
        ],
    )
    def target_features(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
    ) -> dg.MaterializeResult:
        """Preference scores and gradients of the target examples at each warm-up checkpoint, raw (not normalised).

        For a pair the score is the margin of the two completions and the gradient is the margin's.
        """
        warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, language_model))
        version = feature_version(settings, lake, language_model)
        corpus = corpus_version(settings, language_model)

        def compute(name: str) -> stage.Outcome:
            targets = lake.require("targets", name, corpus)
            artifact, computed = publish_target_features(context, settings, lake, work, warmup, targets, name, version)
            lake.point(artifact, name, version, context.run_id)
            columns = ["id", "score", "norm", "refused"]
            return stage.Outcome(
                [artifact],
                computed,
                {
                    "dagster/row_count": artifact.notes["rows"],
                    "feature_version": version,
                    "rows": stage.preview(lake.read_table(artifact, columns).slice(0, 8).to_pylist()),
                },
                {"target_gradients_usable": (not artifact.notes["refused"], {"refused": artifact.notes["refused"]})},
            )

        with gradient_pass(settings, language_model, warmup) as work:
            return stage.each_partition(context, compute)

    return target_features


def publish_target_features(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    warmup: Artifact,
    targets: Artifact,
    name: str,
    version: str,
) -> tuple[Artifact, int]:
    """The gradients of these targets. Raises dagster.Failure where none of them is usable."""
    recipe = Recipe(
        "target_features", TARGET_VERSION, feature_identity(settings, work.model, warmup),
        {"targets": targets, "warmup": warmup}, partition=name, version=version,
    )  # fmt: skip
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        stopwatch = stage.Stopwatch()
        table = _target_table(context, work, lake.read_table(targets))
        refused = sum(reason is not None for reason in table["refused"].to_pylist())
        notes = {"refused": refused, "cost": stopwatch.cost()}
        artifact = lake.publish_table(recipe, table, run_id=context.run_id, notes=notes)
    if artifact.notes["refused"] == artifact.notes["rows"]:
        first = lake.read_table(artifact, ["refused"])["refused"][0].as_py()
        raise dg.Failure(f"No target of {name} has a usable gradient; the first: {first}")
    return artifact, int(computed)


def _target_table(context: dg.AssetExecutionContext, work: GradientPass, targets: "pa.Table") -> "pa.Table":
    """Rows [m]: id, score [C], norm [C], sketch float32 [C·K] of the raw gradient, base_score, refused."""
    import numpy as np
    import pyarrow as pa

    chosen = target_set(targets)
    passes = []
    with stage.progress(context, "target gradients", len(work.checkpoints) * chosen.size) as progress:
        for checkpoint in work.checkpoints:
            passes.append(_target_pass(work, checkpoint, chosen, progress))
    base = chosen.scores(work.at(None).mean_log_probs(chosen.examples))
    refused = [next((one.refused[j] for one in passes if one.refused[j]), None) for j in range(chosen.size)]
    sketches = np.concatenate([one.rows for one in passes], axis=1)

    def column(name: str) -> "pa.Array":
        return pa.array(np.stack([getattr(one, name) for one in passes], axis=1).tolist(), pa.list_(pa.float64()))

    return pa.table(
        {
            "id": targets["id"],
            "score": column("mean_log_probs"),
            "norm": column("norms"),
            "base_score": pa.array(base, pa.float64()),
            "sketch": pa.FixedSizeListArray.from_arrays(
                pa.array(sketches.reshape(-1), pa.float32()), sketches.shape[1]
            ),
            "refused": pa.array(refused, pa.string()),
        }
    )


def _target_pass(
    work: GradientPass, checkpoint: WarmupCheckpoint, targets: "TargetSet", progress: stage.Progress
) -> "FeatureRows":
    """Raw target gradients at one checkpoint. Pairs go one by one: the norm of a difference needs both, unsketched."""
    import numpy as np

    from prism_assets.features.gradients import NORM_FLOOR, FeatureRows
    from prism_assets.selection.direction import norm

    engine = work.at(checkpoint)
    sketch = work.projection(engine)
    start = progress.done
    if not targets.pairs:
        rows = engine.feature_rows(
            targets.examples, sketch=sketch, progress=lambda done, _: progress.update(start + done)
        )
        progress.update(start + targets.size)
        return rows
    rows = np.zeros((targets.size, sketch.dim), np.float32)
    norms, scores = np.zeros(targets.size), np.zeros(targets.size)
    refused: list[str | None] = []
    for position in range(targets.size):
        pair = targets.target(position)
        result = engine.weighted_gradient(pair.examples, pair.expand(np.ones(1)))
        scores[position] = pair.scores(result.mean_log_probs)[0]
        norms[position] = norm(result.gradient)
        usable = np.isfinite(norms[position]) and norms[position] >= NORM_FLOOR and np.isfinite(scores[position])
        refused.append(None if usable else f"the margin's gradient has norm {norms[position]}")
        if usable:
            rows[position] = sketch.sketch_vector(result.gradient).cpu().numpy()
        progress.update(start + position + 1)
    return FeatureRows(rows, norms, scores, norms, refused)
