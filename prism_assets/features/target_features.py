"""The asset `target_features`: preference scores and raw gradients of the target examples."""

from typing import TYPE_CHECKING

import dagster as dg

from prism_assets.corpus.target_set import TargetSet, target_set
from prism_assets.errors import StageError
from prism_assets.features.anchor_artifacts import shown_anchors
from prism_assets.features.blocks import per_checkpoint, refused_rows
from prism_assets.features.gradient_pass import GradientPass, gradient_pass
from prism_assets.metadata import preview
from prism_assets.progress import Progress
from prism_assets.project import Check, Project
from prism_assets.reference.checkpoints import WarmupCheckpoint
from prism_assets.resources.lake import Artifact, Recipe, Rows
from prism_assets.stage import Made, Stage
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.gradients.engine import FeatureRows

GRADIENTS_USABLE = Check("target_gradients_usable", "No target example was refused for its gradient.")


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "target_features",
        group="features",
        kinds={"pytorch", "parquet"},
        deps=["target_anchors", "warmup_checkpoints"],
        checks=[GRADIENTS_USABLE],
        loads_model=True,
    )
    def target_features(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Preference scores and gradients of the target examples at each warm-up checkpoint, raw (not normalised).

        For a pair the score is the margin of the two completions and the gradient is the margin's.
        """
        stage = stage_of(project, context)
        with gradient_pass(stage) as work:
            return each_partition(context, stage, lambda name: _target(work, name))

    return target_features


def _target(work: GradientPass, name: str) -> Outcome:
    stage = work.stage
    features, computed = make_target_features(work, shown_anchors(stage, name), name)
    stage.show(features, name)
    rows = stage.lake.read_table(features, ["id", "score", "norm", "refused"]).slice(0, 8)
    refused = features.notes["refused"]
    metadata = {
        "dagster/row_count": features.notes["rows"],
        "feature_version": stage.feature_version,
        "rows": preview(rows.to_pylist()),
    }
    return Outcome([features], computed, metadata, [GRADIENTS_USABLE(not refused, refused=refused)])


def make_target_features(work: GradientPass, targets: Artifact, name: str) -> Made:
    """The gradients of these targets. Raises StageError where none of them is usable."""
    stage = work.stage
    recipe = target_features_recipe(stage, targets, name)
    made = stage.make(recipe, lambda: _gradients(work, stage.lake.read_table(targets)))
    if made.artifact.notes["refused"] == made.artifact.notes["rows"]:
        first = stage.lake.read_table(made.artifact, ["refused"])["refused"][0].as_py()
        raise StageError(f"No target example of {name} has a usable gradient; the first: {first}")
    return made


def target_features_recipe(stage: Stage, targets: Artifact, name: str) -> Recipe:
    """What the gradients of these targets are made from."""
    inputs = {"targets": targets, "warmup": stage.warmup}
    return stage.recipe("target_features", stage.feature_identity, inputs, partition=name)


def _gradients(work: GradientPass, targets: "pa.Table") -> Rows:
    """Rows [m]: id, score [C], norm [C], sketch float32 [C·K] of the raw gradient, base_score, refused."""
    import numpy as np
    import pyarrow as pa

    chosen = target_set(targets)
    passes = []
    with work.stage.progress("target gradients", len(work.checkpoints) * chosen.size) as progress:
        for checkpoint in work.checkpoints:
            passes.append(_target_pass(work, checkpoint, chosen, progress))
    base = chosen.scores(work.at(None).mean_log_probs(chosen.examples))
    refused = [next((one.refused[j] for one in passes if one.refused[j]), None) for j in range(chosen.size)]
    sketches = np.concatenate([one.rows for one in passes], axis=1)
    table = pa.table(
        {
            "id": targets["id"],
            "score": per_checkpoint(passes, "mean_log_probs"),
            "norm": per_checkpoint(passes, "norms"),
            "base_score": pa.array(base, pa.float64()),
            "sketch": pa.FixedSizeListArray.from_arrays(
                pa.array(sketches.reshape(-1), pa.float32()), sketches.shape[1]
            ),
            "refused": pa.array(refused, pa.string()),
        }
    )
    return Rows(table, {"refused": refused_rows(table)})


def _target_pass(
    work: GradientPass, checkpoint: WarmupCheckpoint, targets: TargetSet, progress: Progress
) -> "FeatureRows":
    """Raw target gradients at one checkpoint. Pairs go one by one: the norm of a difference needs both, unsketched."""
    import numpy as np

    from prism_assets.gradients.engine import NORM_FLOOR, FeatureRows
    from prism_assets.gradients.vectors import norm

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
