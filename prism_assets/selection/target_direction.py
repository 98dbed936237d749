"""The asset `target_direction`: directions of a target, and what was measured of them."""

from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets.corpus.target_set import target_set
from prism_assets.features.gradient_pass import GradientPass, gradient_pass
from prism_assets.metadata import column_lineage, picture, preview
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, Recipe, Rows
from prism_assets.selection.curvature import sample_features
from prism_assets.selection.direction_artifacts import (
    COMPARED,
    DirectionInputs,
    load_direction,
    make_directions,
    shown_inputs,
)
from prism_assets.selection.target_scores import scores_of, tokens_counted
from prism_assets.selection.thresholds import FEWEST_EFFECTIVE, FIRST_ORDER_RATIO
from prism_assets.stage import Made, Stage
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.strategies import TargetScores

ENOUGH_TARGETS = Check(
    "enough_effective_targets",
    "The weights rest on at least three target examples' worth (1/Σw²); below that one or two examples decide what is "
    "selected: add targets or raise `preference.temperature`.",
)
FIRST_ORDER = Check(
    "first_order_holds",
    "A small step along the PRISM direction raises J, by between half and twice what is predicted.",
)
HELD_OUT = Check("held_out_improves", "The same step raises the mean log-probability of the held-out examples.")


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "target_direction",
        group="selection",
        kinds={"pytorch", "safetensors"},
        deps=["target_features", "target_anchors", "targets", "warmup_checkpoints"],
        checks=[ENOUGH_TARGETS, FIRST_ORDER, HELD_OUT],
        loads_model=True,
    )
    def target_direction(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Target gradients added up with the weights of each gradient strategy: t per checkpoint, unsketched, and the
        query.

        Measured on the way: what a small step along the PRISM and the uniform direction does to J and to the held-out
        examples, against what first order predicts.
        """
        stage = stage_of(project, context)
        with gradient_pass(stage) as work:
            return each_partition(context, stage, lambda name: _target(project, work, name))

    return target_direction


def _target(project: Project, work: GradientPass, name: str) -> Outcome:
    from prism_assets.selection.strategies import STRATEGIES

    stage = work.stage
    sample_features(work)
    inputs = shown_inputs(stage, name)
    asked = {*stage.settings.strategies, *COMPARED}
    wanted = [one for one in STRATEGIES.values() if one.needs_direction and one.name in asked]
    directions, computed = make_directions(work, inputs, wanted)
    weights, made = _make_weights(work, inputs, directions)
    for strategy, artifact in directions.items():
        stage.show(artifact, name, strategy)
    stage.show(weights, name)
    return _outcome(project, stage, [*directions.values(), weights], computed + made)


# -- weights ------------------------------------------------------------------------------------------------------


def _make_weights(work: GradientPass, inputs: DirectionInputs, directions: dict[str, Artifact]) -> Made:
    """One row per target example with its score, preference and weights (last checkpoint); diagnostics in the notes."""
    stage = work.stage
    table = stage.lake.read_table(inputs.targets)
    scores, usable = scores_of(stage.settings, stage.lake.read_table(inputs.features), table)
    recipe = weights_recipe(stage, inputs, directions, scores.temperature)
    return stage.make(recipe, lambda: _weigh(work, inputs, directions, table, scores, usable))


def weights_recipe(
    stage: Stage, inputs: DirectionInputs, directions: dict[str, Artifact], temperature: float
) -> Recipe:
    """What the weights of a target, and what is measured of its directions, are made from."""
    preference = stage.settings.preference
    return stage.recipe(
        "target_weights",
        {
            **{"temperature": temperature, "probe_step": preference.probe_step},
            **({"score": "sum"} if preference.score == "sum" else {}),
        },
        {**directions, "features": inputs.features, "eval_examples": inputs.eval_examples},
        partition=inputs.name,
    )


def _weigh(
    work: GradientPass,
    inputs: DirectionInputs,
    directions: dict[str, Artifact],
    table: "pa.Table",
    scores: "TargetScores",
    usable: "np.ndarray",
) -> Rows:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.preference import effective_number, preference_weights
    from prism_assets.selection.strategies import STRATEGIES

    weights = {}
    for name in directions:
        weigh = STRATEGIES[name].weigh
        assert weigh is not None
        weights[name] = weigh(scores)
    per_checkpoint = [preference_weights(s, scores.kind, scores.temperature) for s in scores.scores]
    last = per_checkpoint[-1]

    def column(values: "np.ndarray") -> "pa.Array":
        full = np.full(table.num_rows, np.nan)
        full[usable] = values
        return pa.array(full, from_pandas=True)

    rows = pa.table(
        {
            "id": table["id"],
            "group": table["group"],
            "prompt": table["prompt"],
            "completion": table["completion"],
            "score": column(scores.scores[-1]),
            "preference": column(last.preferences),
            "gradient_norm": column(scores.norms[-1]),
            **{name: column(values[-1] / values[-1].sum()) for name, values in weights.items()},
        }
    )
    notes = {
        "kind": scores.kind,
        "number_of_targets": table.num_rows,
        "temperature": scores.temperature,
        "log_z": last.log_z,
        "objective": last.objective,
        "checkpoints": len(per_checkpoint),
        "effective_number_of_targets": {name: effective_number(values[-1]) for name, values in weights.items()},
        "weight_rank_agreement": _rank_agreement([one.weights for one in per_checkpoint]),
        "first_order": _first_order(work, inputs, directions, table.take(usable), scores),
    }
    return Rows(rows, notes)


def _rank_agreement(weights: "list[np.ndarray]") -> float | None:
    """Smallest Spearman correlation between the weights of the last checkpoint and those of another; None for one
    checkpoint, and where a checkpoint gives all targets the same weight."""
    from prism_assets.stats.ranks import spearman

    found = [spearman(weights[-1], other) for other in weights[:-1]]
    known = [one for one in found if one is not None]
    return min(known) if known and len(known) == len(found) else None


def _first_order(
    work: GradientPass,
    inputs: DirectionInputs,
    directions: dict[str, Artifact],
    table: "pa.Table",
    scores: "TargetScores",
) -> dict[str, Any]:
    """Predicted and measured gains of one small step, the same length for each direction, at the last checkpoint.

    The length is the one at which J is predicted to rise by the share `preference.probe_step` along PRISM. `table`
    holds the usable targets.
    """
    import numpy as np

    from prism_assets.gradients.vectors import norm
    from prism_assets.selection.direction import first_order_gain, target_vector
    from prism_assets.selection.preference import preference_weights

    lake, settings = work.stage.lake, work.stage.settings
    chosen = target_set(table)
    held_out = target_set(lake.read_table(inputs.eval_examples))
    held_out_examples = held_out.examples[: held_out.size]
    engine = work.at(work.checkpoints[-1])
    tokens = tokens_counted(settings, table, chosen.pairs)

    def preference(values: "np.ndarray") -> Any:
        return preference_weights(values * tokens, scores.kind, scores.temperature)

    # What is known of the targets at this checkpoint is not computed again: their scores came with their gradients.
    # In half precision a score moves with its batch by more than a small step moves it, so there "before" is measured
    # in the same batches as "after".
    known = preference_weights(scores.scores[-1], scores.kind, scores.temperature)
    now = known
    if engine.half_precision:
        now = preference(chosen.scores(engine.mean_log_probs(chosen.examples)))
    before = (now.objective, float(np.mean(engine.mean_log_probs(held_out_examples))))
    vectors = {name: load_direction(lake, directions[name]).vectors[-1] for name in COMPARED}
    # ∇J itself is Z times the PRISM direction, unless that was corrected for curvature or put together from groups.
    is_gradient = settings.curvature.kind == "none" and directions["prism"].notes["groups"] == 1
    raw = vectors["prism"] if is_gradient else target_vector(engine, chosen, known.weights * tokens)
    z = float(np.exp(known.log_z))
    gradient = {name: tensor * z for name, tensor in raw.items()}
    size = settings.preference.probe_step * now.objective / norm(gradient)
    gains = {
        name: first_order_gain(
            engine,
            vector,
            gradient,
            size,
            lambda values: preference(values).objective,
            chosen,
            held_out_examples,
            before,
        )._asdict()
        for name, vector in vectors.items()
    }
    return {"step": size, "objective": now.objective, **gains}


# -- showing ------------------------------------------------------------------------------------------------------


def _outcome(project: Project, stage: Stage, artifacts: list[Artifact], computed: int) -> Outcome:
    from prism_assets import plots

    weights = artifacts[-1]
    notes = weights.notes
    rows = stage.lake.read_table(weights).to_pylist()
    first_order = notes["first_order"]
    gain = first_order["prism"]
    ratio = gain["measured"] / gain["predicted"] if gain["predicted"] else float("nan")
    effective = notes["effective_number_of_targets"]["prism"]
    top = sorted((row for row in rows if row["prism"] is not None), key=lambda row: -row["prism"])
    held_out = {name: first_order[name]["held_out_mean_log_prob"] for name in COMPARED}
    return Outcome(
        artifacts,
        computed,
        {
            "dagster/row_count": notes["number_of_targets"],
            **column_lineage(
                project,
                **{name: ("target_anchors", name) for name in ("id", "group", "prompt", "completion")},
                score=("target_features", "score"),
                gradient_norm=("target_features", "norm"),
            ),
            "effective_number_of_targets": effective,
            "temperature": notes["temperature"],
            "log_z": notes["log_z"],
            "objective": notes["objective"],
            "first_order": dg.MetadataValue.json(first_order),
            "weights": picture(plots.target_weights(top), "target weights"),
            "gains": picture(plots.first_order_gains(first_order), "first-order gains"),
            "rows": preview([{k: row[k] for k in ("prism", "preference", "prompt", "completion")} for row in top]),
        },
        [
            ENOUGH_TARGETS(effective >= min(FEWEST_EFFECTIVE, len(rows)), effective=effective, targets=len(rows)),
            FIRST_ORDER(FIRST_ORDER_RATIO[0] <= ratio <= FIRST_ORDER_RATIO[1], measured_over_predicted=ratio, **gain),
            HELD_OUT(held_out["prism"] > 0, **held_out),
        ],
    )
