"""A door: target directions. Target gradients are weighed and added up; what is published says what was measured of it."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version
from prism_assets.features.assets import (
    GradientPass,
    feature_identity,
    feature_table,
    feature_version,
    gradient_pass,
    target_set,
    vectors_of,
)
from prism_assets.partitions import targets_of
from prism_assets.reference.assets import warmup_scope
from prism_assets.settings import Settings, SettingsError
from resources.lake import Artifact, Lake, LakeError, Recipe, digest
from resources.language_model import LanguageModel

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.strategies import Strategy, TargetScores

DIRECTION_VERSION = 1

GROUP = "selection"

# What is always measured beside what the settings ask for: the two directions that the report compares.
COMPARED = ("prism", "uniform")


def direction_scope(version: str, strategy: str) -> str:
    """Heads of directions: one per feature version and strategy."""
    return f"{version}/{strategy}"


def build_target_direction(settings: Settings) -> dg.AssetsDefinition:
    """The asset `target_direction`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"pytorch", "safetensors"},
        code_version=str(DIRECTION_VERSION),
        deps=["target_features", "targets", "warmup_checkpoints"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        check_specs=[
            dg.AssetCheckSpec(
                "enough_effective_targets",
                asset="target_direction",
                description="The weights rest on at least three targets' worth (1/Σw²); below that one or two examples "
                "decide what is selected: add targets or raise `preference.temperature`.",
            ),
            dg.AssetCheckSpec(
                "first_order_holds",
                asset="target_direction",
                description="A small step along the PRISM direction raises J, by between half and twice what is predicted.",
            ),
            dg.AssetCheckSpec(
                "held_out_improves",
                asset="target_direction",
                description="The same step raises the mean log-probability of the held-out examples.",
            ),
        ],
    )
    def target_direction(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
    ) -> dg.MaterializeResult:
        """Target gradients added up with the weights of each gradient strategy: t per checkpoint, unsketched, and the query.

        Measured on the way: what a small step along the PRISM and the uniform direction does to J and to the held-out
        examples, against what first order predicts.
        """
        warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, language_model))

        with gradient_pass(settings, language_model, warmup) as work:
            return stage.each_partition(
                context, lambda name: _target_outcome(context, settings, lake, work, warmup, name)
            )

    return target_direction


class DirectionInputs(NamedTuple):
    """What the directions of one target are made from."""

    name: str
    version: str
    features: Artifact
    targets: Artifact
    eval_examples: Artifact
    warmup: Artifact
    curvature: Artifact | None  # features of the warm-up sample, where directions are corrected by them


def _shown_inputs(
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    name: str,
    version: str,
    warmup: Artifact,
    curvature: Artifact | None,
) -> DirectionInputs:
    """What the lake shows of a target now. Raises LakeError where something is missing or does not fit the rest."""
    corpus = corpus_version(settings, model)
    features, targets = lake.require("target_features", name, version), lake.require("targets", name, corpus)
    require_made_of(features, targets)
    held_out = lake.require("eval_examples", name, corpus)
    return DirectionInputs(name, version, features, targets, held_out, warmup, curvature)


def _target_outcome(
    context: dg.AssetExecutionContext, settings: Settings, lake: Lake, work: GradientPass, warmup: Artifact, name: str
) -> stage.Outcome:
    from prism_assets.selection.strategies import STRATEGIES

    version = feature_version(settings, lake, work.model)
    curvature = sample_features(context, settings, lake, work, warmup, version)
    inputs = _shown_inputs(settings, lake, work.model, name, version, warmup, curvature)
    wanted = [s for s in STRATEGIES.values() if s.needs_direction and (s.name in settings.strategies or s.name in COMPARED)]
    directions, computed = publish_directions(context, settings, lake, work, inputs, wanted)
    weights, made = _publish_weights(context, settings, lake, work, inputs, directions)
    computed += made
    for strategy, artifact in directions.items():
        lake.point(artifact, name, direction_scope(version, strategy), context.run_id)
    lake.point(weights, name, version, context.run_id)
    return _direction_outcome(settings, lake, [*directions.values(), weights], weights, computed)


def publish_directions(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: DirectionInputs,
    strategies: Iterable["Strategy"],
) -> tuple[dict[str, Artifact], int]:
    """The direction of each of the strategies, by name, and how many were made."""
    directions, computed = {}, 0
    for strategy in strategies:
        directions[strategy.name], made = _publish_direction(context, settings, lake, work, inputs, strategy)
        computed += made
    return directions, computed


def _temperature(settings: Settings, features: "pa.Table", pairs: bool) -> float:
    import numpy as np

    from prism_assets.selection.preference import default_temperature

    if settings.preference.temperature is not None:
        return settings.preference.temperature
    return default_temperature("pairs" if pairs else "plain", np.array(features["base_score"].to_pylist()))


def require_made_of(features: Artifact, targets: Artifact) -> None:
    """Raise LakeError where these target features are not those of these targets: the files have changed in between."""
    if features.header["inputs"]["targets"]["content_hash"] != targets.content_hash:
        raise LakeError(
            f"target_features of {targets.partition} are those of earlier target files: materialise target_features first, "
            "or run `prism run`."
        )


def scores_of(settings: Settings, features: "pa.Table", targets: "pa.Table") -> "tuple[TargetScores, np.ndarray]":
    """What a weighting may look at, over the usable targets, and the positions [m'] of these.

    With `preference.score: sum`, scores and norms are those of the summed log-probabilities.
    Raises SettingsError where that is asked for pairs.
    """
    import numpy as np

    from prism_assets.selection.strategies import TargetScores

    pairs = target_set(targets).pairs
    usable = np.array([reason is None for reason in features["refused"].to_pylist()])
    positions = np.flatnonzero(usable)
    rows = features.take(positions)
    tokens = tokens_counted(settings, targets.take(positions), pairs)
    return (
        TargetScores(
            np.array(rows["score"].to_pylist()).T * tokens,
            np.array(rows["norm"].to_pylist()).T * tokens,
            "pairs" if pairs else "plain",
            _temperature(settings, rows, pairs),
        ),
        positions,
    )


def as_made(settings: Settings, weights: Artifact) -> Settings:
    """The settings with the temperature and the kind of score that published target weights were made with."""
    made = {"temperature": weights.notes["temperature"], "score": weights.header["settings"].get("score", "mean")}
    return settings.model_copy(update={"preference": settings.preference.model_copy(update=made)})


def tokens_counted(settings: Settings, targets: "pa.Table", pairs: bool) -> "np.ndarray":
    """What turns a mean log-probability into the preference score, float64 [m]: 1, or the supervised tokens."""
    import numpy as np

    if settings.preference.score == "mean":
        return np.ones(targets.num_rows)
    if pairs:
        raise SettingsError(
            "preference.score: sum is for plain targets; pairs of different lengths have no common number of tokens: "
            "use mean."
        )
    return np.array([sum(mask) for mask in targets["loss_mask"].to_pylist()], dtype=np.float64)


def _direction_recipe(
    settings: Settings, lake: Lake, inputs: DirectionInputs, strategy: "Strategy"
) -> "tuple[Recipe, np.ndarray, np.ndarray]":
    """What a direction is made from, its weights float64 [C, m'], and the positions [m'] of the usable targets."""
    table = lake.read_table(inputs.targets)
    scores, usable = scores_of(settings, lake.read_table(inputs.features), table)
    # Coefficients of the gradients of mean log-probabilities, which is what a gradient pass gives.
    weights = strategy.weigh(scores) * tokens_counted(settings, table.take(usable), scores.kind == "pairs")
    damping = settings.preference.fisher_damping
    recipe = Recipe(
        "target_directions",
        DIRECTION_VERSION,
        {"weights": digest(weights.tolist()), **({"fisher_damping": damping} if damping else {})},
        {
            **{"targets": inputs.targets, "features": inputs.features, "warmup": inputs.warmup},
            **({"curvature": inputs.curvature} if inputs.curvature else {}),
        },
        partition=inputs.name,
        version=inputs.version,
    )
    return recipe, weights, usable


def expected_direction(settings: Settings, lake: Lake, model: LanguageModel, name: str, strategy: "Strategy") -> Recipe:
    """What the direction of a target would be made from today, by today's settings. Nothing is computed.

    Raises LakeError where something of it is not there yet, SettingsError where the settings do not fit the targets.
    """
    version = feature_version(settings, lake, model)
    warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))
    curvature = None
    if settings.preference.fisher_damping is not None:
        curvature = lake.require("warmup_sample_features", None, version)
    inputs = _shown_inputs(settings, lake, model, name, version, warmup, curvature)
    return _direction_recipe(settings, lake, inputs, strategy)[0]


def _publish_direction(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: DirectionInputs,
    strategy: "Strategy",
) -> tuple[Artifact, int]:
    """t per checkpoint (unsketched, fp32), its sketch and norm, and the query, as one safetensors file."""
    import torch

    from prism_assets.selection.direction import norm, query_vector, target_vector

    recipe, weights, usable = _direction_recipe(settings, lake, inputs, strategy)
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    stopwatch = stage.Stopwatch()
    # Refused targets are left out, not weighted with zero: zero times NaN is NaN.
    chosen = target_set(lake.read_table(inputs.targets).take(usable))
    tensors: dict[str, torch.Tensor] = {}
    sketches, norms = [], []
    for position, checkpoint in enumerate(work.checkpoints):
        engine = work.at(checkpoint)
        vector = target_vector(engine, chosen, weights[position])
        if inputs.curvature is not None:
            vector = _corrected(settings, lake, work, position, vector, inputs.curvature)
        norms.append(norm(vector))
        sketches.append(work.projection(engine).sketch_vector(vector).cpu().numpy())
        tensors |= {f"t/{position}/{name}": tensor.float() for name, tensor in vector.items()}
    rates = [checkpoint.mean_learning_rate for checkpoint in work.checkpoints]
    tensors["query"] = torch.from_numpy(query_vector(sketches, norms, rates))
    tensors["norms"] = torch.tensor(norms, dtype=torch.float64)
    notes = {"strategy": strategy.name, "cost": stopwatch.cost()}
    return lake.publish_tensors(recipe, tensors, run_id=context.run_id, notes=notes), 1


def sample_features(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    warmup: Artifact,
    version: str,
) -> Artifact | None:
    """Features of the warm-up sample's rows at each checkpoint: the second moment that corrects directions. They belong
    to the feature version, so an arrival changes nothing. None where no correction is asked for."""
    from prism_assets.corpus.tokenization import from_table

    if settings.preference.fisher_damping is None:
        return None
    sample = lake.require("warmup_sample", None, warmup_scope(settings, work.model))
    recipe = Recipe(
        "warmup_sample_features", DIRECTION_VERSION, feature_identity(settings, work.model, warmup),
        {"sample": sample, "warmup": warmup}, version=version,
    )  # fmt: skip
    found = lake.find(recipe)
    if found is None:
        rows = lake.read_table(sample)
        examples = from_table(rows)
        passes = []
        for checkpoint in work.checkpoints:
            engine = work.at(checkpoint)
            passes.append(
                engine.feature_rows(
                    examples, sketch=work.projection(engine), preconditioner=work.preconditioner(checkpoint)
                )
            )
        table = feature_table(rows["id"].to_pylist(), passes)
        found = lake.publish_table(recipe, table, run_id=context.run_id, compression="none")
    return lake.point(found, None, version, context.run_id)


def _corrected(
    settings: Settings, lake: Lake, work: GradientPass, position: int, vector: "dict[str, Any]", curvature: Artifact
) -> "dict[str, Any]":
    """(F + λI)⁻¹ t up to a factor, unsketched: t less a weighted sum of the sample's rows, by one weighted backward pass.

    The coefficients are found in the sketch, the rows that they multiply are exact.
    """
    import numpy as np

    from prism_assets.corpus.tokenization import from_table
    from prism_assets.selection.direction import curvature_coefficients

    checkpoint = work.checkpoints[position]
    engine = work.at(checkpoint)
    table = lake.read_table(curvature)
    usable = np.flatnonzero([reason is None for reason in table["refused"].to_pylist()])
    if not len(usable):
        raise SettingsError(
            f"preference.fisher_damping: the warm-up sample has {table.num_rows} rows and none with a usable gradient (the first "
            f"is refused because {table['refused'][0].as_py()}), so there is no curvature to correct by. Leave the key out, or "
            "raise warmup.share."
        )
    kept = table.take(usable)
    vectors = vectors_of(kept).reshape(len(usable), len(work.checkpoints), -1)[:, position].astype(np.float64)
    norms = np.array([one[position] for one in kept["norm"].to_pylist()])
    sketched = work.projection(engine).sketch_vector(vector).cpu().numpy().astype(np.float64)
    coefficients = curvature_coefficients(vectors, vectors @ sketched, settings.preference.fisher_damping)
    sample = lake.require("warmup_sample", None, warmup_scope(settings, work.model))
    examples = from_table(lake.read_table(sample).take(usable))
    explained = engine.weighted_gradient(examples, coefficients / norms).gradient  # Σ_i a_i g_i / ‖D g_i‖
    preconditioner = work.preconditioner(checkpoint)
    return {name: tensor - preconditioner.diagonal(name) * explained[name] for name, tensor in vector.items()}


def load_direction(lake: Lake, artifact: Artifact) -> "tuple[np.ndarray, list[dict[str, Any]]]":
    """The query [C·K] and t per checkpoint (parameter name -> tensor) of a direction."""
    tensors = lake.read_tensors(artifact)
    vectors: list[dict[str, Any]] = [{} for _ in range(len(tensors["norms"]))]
    for name, tensor in tensors.items():
        if name.startswith("t/"):
            _, position, parameter = name.split("/", 2)
            vectors[int(position)][parameter] = tensor
    return tensors["query"].numpy(), vectors


def _publish_weights(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: DirectionInputs,
    directions: Mapping[str, Artifact],
) -> tuple[Artifact, int]:
    """One row per target with its score, preference and weights (last checkpoint); diagnostics in the notes."""
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.preference import effective_number, preference_weights
    from prism_assets.selection.strategies import STRATEGIES

    table = lake.read_table(inputs.targets)
    chosen = target_set(table)
    features = lake.read_table(inputs.features)
    scores, usable = scores_of(settings, features, table)
    recipe = Recipe(
        "target_weights",
        DIRECTION_VERSION,
        {
            **{"temperature": scores.temperature, "probe_step": settings.preference.probe_step},
            **({"score": "sum"} if settings.preference.score == "sum" else {}),
        },
        {**directions, "features": inputs.features, "eval_examples": inputs.eval_examples},
        partition=inputs.name,
        version=inputs.version,
    )
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    weights = {name: STRATEGIES[name].weigh(scores) for name in directions}
    per_checkpoint = [preference_weights(s, scores.kind, scores.temperature) for s in scores.scores]
    last = per_checkpoint[-1]

    def column(values: "np.ndarray") -> "pa.Array":
        full = np.full(chosen.size, np.nan)
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
        "number_of_targets": chosen.size,
        "temperature": scores.temperature,
        "log_z": last.log_z,
        "objective": last.objective,
        "checkpoints": len(per_checkpoint),
        "effective_number_of_targets": {name: effective_number(values[-1]) for name, values in weights.items()},
        "weight_rank_agreement": _rank_agreement([one.weights for one in per_checkpoint]),
        "first_order": _first_order(settings, lake, work, inputs, directions, scores, usable),
    }
    return lake.publish_table(recipe, rows, run_id=context.run_id, notes=notes), 1


def _rank_agreement(weights: "list[np.ndarray]") -> float | None:
    """Smallest Spearman correlation between the weights of the last checkpoint and those of another; None for one
    checkpoint, and where a checkpoint weighs all targets alike."""
    from prism_assets.rank_statistics import spearman

    found = [spearman(weights[-1], other) for other in weights[:-1]]
    return min(found) if found and None not in found else None


def _first_order(
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: DirectionInputs,
    directions: Mapping[str, Artifact],
    scores: "TargetScores",
    usable: "np.ndarray",
) -> dict[str, Any]:
    """Predicted and measured gains of one small step, the same length for each direction, at the last checkpoint.

    The length is the one at which J is predicted to rise by the share `preference.probe_step` along PRISM.
    """
    import numpy as np

    from prism_assets.selection.direction import TargetSet, first_order_gain, norm, target_vector
    from prism_assets.selection.preference import preference_weights

    table = lake.read_table(inputs.targets).take(usable)
    chosen = target_set(table)
    held_out: TargetSet = target_set(lake.read_table(inputs.eval_examples))
    held_out_examples = held_out.examples[: held_out.size]
    engine = work.at(work.checkpoints[-1])

    tokens = tokens_counted(settings, table, chosen.pairs)

    def preference(values: "np.ndarray") -> Any:
        return preference_weights(values * tokens, scores.kind, scores.temperature)

    now = preference(chosen.scores(engine.mean_log_probs(chosen.examples)))
    before = (now.objective, float(np.mean(engine.mean_log_probs(held_out_examples))))
    vectors = {name: load_direction(lake, directions[name])[1][-1] for name in COMPARED}
    # ∇J itself: a direction may have been corrected for curvature.
    z = float(np.exp(now.log_z))
    raw = target_vector(engine, chosen, now.weights * tokens)
    gradient = {name: tensor * z for name, tensor in raw.items()}
    size = settings.preference.probe_step * now.objective / norm(gradient)
    gains = {
        name: first_order_gain(
            engine, vector, gradient, size, lambda values: preference(values).objective, chosen, held_out_examples, before
        )._asdict()
        for name, vector in vectors.items()
    }
    return {"step": size, "objective": now.objective, **gains}


def _direction_outcome(
    settings: Settings, lake: Lake, artifacts: list[Artifact], weights: Artifact, computed: int
) -> stage.Outcome:
    from prism_assets.evaluation import plots

    notes = weights.notes
    rows = lake.read_table(weights).to_pylist()
    gain = notes["first_order"]["prism"]
    ratio = gain["measured"] / gain["predicted"] if gain["predicted"] else float("nan")
    effective = notes["effective_number_of_targets"]["prism"]
    top = sorted((row for row in rows if row["prism"] is not None), key=lambda row: -row["prism"])
    return stage.Outcome(
        artifacts,
        computed,
        metadata={
            "dagster/row_count": notes["number_of_targets"],
            **stage.column_lineage(
                **{name: ("targets", name) for name in ("id", "group", "prompt", "completion")},
                score=("target_features", "score"),
                gradient_norm=("target_features", "norm"),
            ),
            "effective_number_of_targets": effective,
            "temperature": notes["temperature"],
            "log_z": notes["log_z"],
            "objective": notes["objective"],
            "first_order": dg.MetadataValue.json(notes["first_order"]),
            "weights": dg.MetadataValue.md(
                plots.as_markdown_image(plots.target_weights(top), "target weights")
            ),
            "gains": dg.MetadataValue.md(
                plots.as_markdown_image(plots.first_order_gains(notes["first_order"]), "first-order gains")
            ),
            "rows": stage.preview([{k: row[k] for k in ("prism", "preference", "prompt", "completion")} for row in top]),
        },
        checks={
            "enough_effective_targets": (effective >= min(3, len(rows)), {"effective": effective, "targets": len(rows)}),
            "first_order_holds": (0.5 <= ratio <= 2, {"measured_over_predicted": ratio, **gain}),
            "held_out_improves": (
                gain["held_out_mean_log_prob"] > 0,
                {
                    "prism": gain["held_out_mean_log_prob"],
                    "uniform": notes["first_order"]["uniform"]["held_out_mean_log_prob"],
                },
            ),
        },
    )
