"""The asset `candidate_features`: sketched gradient rows of candidates in blocks that are keyed by their content."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets.features import blocks
from prism_assets.features.blocks import blocks_of, feature_table, refused_rows, weighted_mean
from prism_assets.features.exact_products import ExactProducts, shown_directions
from prism_assets.features.gradient_pass import GradientPass, gradient_pass
from prism_assets.metadata import preview
from prism_assets.progress import Progress
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, Recipe, Rows, hash_table
from prism_assets.stage import Made, Stage
from prism_assets.tables import schema_of
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    import pyarrow as pa

_TOKENS = ["id", "input_ids", "loss_mask"]
GRADIENTS_USABLE = Check("gradients_usable", "No row was refused for its gradient.")


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "candidate_features",
        group="features",
        kinds={"pytorch", "parquet"},
        deps=["candidates", "warmup_checkpoints"],
        checks=[GRADIENTS_USABLE],
        loads_model=True,
    )
    def candidate_features(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Per-example LoRA gradients at the warm-up checkpoints: preconditioned, sketched, unit-normalised, float16.

        Rows lie in immutable blocks of at most 4,096, keyed by their content, beside exact norms and mean
        log-probabilities. A finished block is never computed again; a row whose gradient is not finite or vanishes is
        refused with its reason.
        """
        stage = stage_of(project, context)
        with gradient_pass(stage) as work:
            return each_partition(context, stage, lambda shard: _shard(work, shard))

    return candidate_features


def pending_features(stage: Stage, keys: Sequence[str]) -> list[str]:
    """The shards among `keys` without features of today's version, or with a missing or damaged block."""
    found = {key: stage.shown_or_none("candidate_features", key) for key in keys}
    return [key for key, features in found.items() if features is None or None in blocks_of(stage.lake, features)]


def _shard(work: GradientPass, shard: str) -> Outcome:
    """All blocks of one shard, and the list of them that is the shard's feature artefact."""
    stage = work.stage
    candidates = stage.shown("candidates", shard)
    inputs = {"candidates": candidates, "warmup": stage.warmup}
    recipe = stage.recipe("candidate_features", stage.feature_identity, inputs, partition=shard)
    features = stage.lake.find(recipe)
    made: list[Made] = []
    found = blocks_of(stage.lake, features) if features is not None else []
    if features is None or None in found:
        rows = stage.lake.read_table(candidates, _TOKENS)
        with stage.progress(f"gradients of {shard}", rows.num_rows * len(work.checkpoints)) as progress:
            # A shard without rows has one empty block, which says how wide its features are.
            firsts = range(0, max(rows.num_rows, 1), blocks.BLOCK_ROWS)
            made = [_block(work, rows.slice(first, blocks.BLOCK_ROWS), progress) for first in firsts]
        found = [block for block, _ in made]
        features = stage.make(recipe, lambda: _list_blocks([block for block, _ in made])).artifact
    present = [block for block in found if block is not None]
    for block in present:
        stage.show(block, block.fingerprint)
    stage.show(features, shard)
    return _outcome(stage, features, present, sum(computed for _, computed in made))


def _block(work: GradientPass, rows: "pa.Table", progress: Progress) -> Made:
    stage, before = work.stage, progress.done
    recipe = _block_recipe(stage, rows)
    made = stage.make(recipe, lambda: _gradients(work, rows, progress, recipe.fingerprint))
    progress.update(before + rows.num_rows * len(work.checkpoints))
    return made


def _block_recipe(stage: Stage, rows: "pa.Table") -> Recipe:
    inputs = {"rows": hash_table(rows), "warmup": stage.warmup}
    return stage.recipe("feature_blocks", stage.feature_identity, inputs)


def missing_blocks(stage: Stage, shard: str) -> "list[pa.Table]":
    """The tokens of an ingested shard's rows whose blocks are not in the lake, a table for each block."""
    rows = stage.lake.read_table(stage.shown("candidates", shard), _TOKENS)
    blocks_of_rows = [rows.slice(first, blocks.BLOCK_ROWS) for first in range(0, rows.num_rows, blocks.BLOCK_ROWS)]
    return [one for one in blocks_of_rows if stage.lake.find(_block_recipe(stage, one)) is None]


def _gradients(work: GradientPass, rows: "pa.Table", progress: Progress, block: str) -> Rows:
    """The rows of a block; exact products with the directions that are known are remembered on the way."""
    from prism_assets.corpus.token_tables import from_table
    from prism_assets.gradients.sketch import SideBySide

    before = progress.done
    exact, projections = _known_directions(work), None
    if exact is not None:
        sketch = work.projection(work.at(work.checkpoints[-1]))
        projections = [SideBySide(sketch, products) for products in exact.projections()]
    passes = work.candidate_rows(from_table(rows), lambda done: progress.update(before + done), projections)
    if exact is not None and projections is not None:
        exact.remember(block, passes)
        passes = [one._replace(rows=one.rows[:, : projections[0].first.dim]) for one in passes]
    table = feature_table(rows["id"].to_pylist(), passes)
    scores = [score for one in passes[-1:] for score in one.mean_log_probs]
    mean = weighted_mean([(float(score), 1) for score in scores])
    return Rows(table, {"refused": refused_rows(table), "mean_log_prob": mean}, compression="none")


def _known_directions(work: GradientPass) -> ExactProducts | None:
    """What exact scores of all rows will need; None where nobody asks for them, or there is no direction yet."""
    stage = work.stage
    directions = shown_directions(stage) if stage.settings.selection.rerank == "all" else []
    if not directions:
        return None
    return work.remember(tuple(one.fingerprint for one in directions), lambda: ExactProducts(work, directions))


def _list_blocks(made: Sequence[Artifact]) -> Rows:
    import pyarrow as pa

    rows = [
        {
            "block": block.fingerprint,
            "block_content_hash": block.content_hash,
            "rows": block.notes["rows"],
            "refused": block.notes["refused"],
        }
        for block in made
    ]
    notes: dict[str, Any] = {
        "rows": sum(block.notes["rows"] for block in made),
        "refused": sum(block.notes["refused"] for block in made),
        "mean_log_prob": weighted_mean([(one.notes["mean_log_prob"], one.notes["rows"]) for one in made]),
    }
    return Rows(pa.Table.from_pylist(rows, schema_of("candidate_features")), notes)


def _outcome(stage: Stage, features: Artifact, its_blocks: Sequence[Artifact], computed: int) -> Outcome:
    notes = features.notes
    columns = ["id", "norm", "gradient_norm", "mean_log_prob", "refused"]
    shown = [row for block in its_blocks[:1] for row in stage.lake.read_table(block, columns).slice(0, 8).to_pylist()]
    metadata = {
        "dagster/row_count": notes["rows"],
        "feature_version": stage.feature_version,
        "blocks": len(its_blocks),
        "blocks_computed": computed,
        "refused": notes["refused"],
        "mean_log_prob": notes["mean_log_prob"],
        "rows": preview(shown),
    }
    check = GRADIENTS_USABLE(not notes["refused"], refused=notes["refused"], rows=notes["rows"])
    return Outcome([features], computed, metadata, [check])
