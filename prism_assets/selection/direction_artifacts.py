"""Directions as artefacts: target gradients weighted and added up, with the query that the index is queried with."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.target_set import target_set
from prism_assets.errors import SettingsError, StageError
from prism_assets.features.blocks import feature_table, vectors_of
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.resources.lake import Artifact, Lake, Recipe, Rows, Tensors, digest
from prism_assets.selection.target_scores import require_made_of, scores_of, tokens_counted
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.strategies import Strategy

# What is always measured beside what the settings ask for: the two directions that the report compares.
COMPARED = ("prism", "uniform")


class DirectionInputs(NamedTuple):
    """What the directions of one target are made from."""

    name: str
    features: Artifact
    targets: Artifact
    eval_examples: Artifact
    curvature: Artifact | None  # features of the warm-up sample, where directions are corrected by them


def shown_inputs(stage: Stage, name: str) -> DirectionInputs:
    """What the lake shows of a target now. Raises LakeError where something is missing or does not fit the rest."""
    features, targets = stage.shown("target_features", name), stage.shown("target_anchors", name)
    require_made_of(features, targets)
    corrected = stage.settings.preference.fisher_damping is not None
    curvature = stage.shown("warmup_sample_features") if corrected else None
    return DirectionInputs(name, features, targets, stage.shown("eval_examples", name), curvature)


class MadeDirections(NamedTuple):
    """The direction of each strategy by name, and how many were made."""

    by_strategy: dict[str, Artifact]
    computed: int


def make_directions(work: GradientPass, inputs: DirectionInputs, strategies: "Iterable[Strategy]") -> MadeDirections:
    """The direction of each strategy: t per checkpoint (unsketched, fp32), its sketch and norm, and the query."""
    directions, computed = {}, 0
    for strategy in strategies:
        recipe, weighted = _recipe(work.stage, inputs, strategy)
        made = work.stage.make(recipe, lambda s=strategy, w=weighted: _direction(work, inputs, s, w))
        directions[strategy.name] = made.artifact
        computed += made.computed
    return MadeDirections(directions, computed)


def expected_direction(stage: Stage, name: str, strategy: "Strategy") -> Recipe:
    """What the direction of a target would be made from today, by today's settings. Nothing is computed.

    Raises LakeError where something of it is not there yet, SettingsError where the settings do not fit the targets.
    """
    return _recipe(stage, shown_inputs(stage, name), strategy)[0]


class Direction(NamedTuple):
    """What is stored of a direction, for C checkpoints."""

    query: "np.ndarray"  # float32 [C·K]
    vectors: list[dict[str, Any]]  # t_k of each checkpoint, parameter name -> tensor
    norms: "np.ndarray"  # float64 [C], ‖t_k‖
    # float64 [C, m'], what the raw gradients of the usable target examples were multiplied with; None of a direction
    # that was made before they were stored.
    weights: "np.ndarray | None"


def load_direction(lake: Lake, artifact: Artifact) -> Direction:
    """Read a direction."""
    tensors = lake.read_tensors(artifact)
    vectors: list[dict[str, Any]] = [{} for _ in range(len(tensors["norms"]))]
    for name, tensor in tensors.items():
        if name.startswith("t/"):
            _, position, parameter = name.split("/", 2)
            vectors[int(position)][parameter] = tensor
    weights = tensors["weights"].numpy() if "weights" in tensors else None
    return Direction(tensors["query"].numpy(), vectors, tensors["norms"].numpy(), weights)


class _Weighted(NamedTuple):
    """The usable target examples and what their raw gradients are multiplied with."""

    targets: "pa.Table"  # m' rows
    weights: "np.ndarray"  # float64 [C, m']
    # The positions of each group, whose direction is brought to unit length before they are added; one where they are
    # pooled.
    groups: "list[np.ndarray]"


def _recipe(stage: Stage, inputs: DirectionInputs, strategy: "Strategy") -> tuple[Recipe, _Weighted]:
    """What a direction is made from."""
    table = stage.lake.read_table(inputs.targets)
    scores, usable = scores_of(stage.settings, stage.lake.read_table(inputs.features), table)
    chosen = table.take(usable)
    # Coefficients of the gradients of mean log-probabilities, which is what a gradient pass gives.
    assert strategy.weigh is not None
    weights = strategy.weigh(scores) * tokens_counted(stage.settings, chosen, scores.kind == "pairs")
    preference = stage.settings.preference
    groups = _groups(chosen, preference.groups == "separate")
    recipe = stage.recipe(
        "target_directions",
        {
            "weights": digest(weights.tolist()),
            **({"fisher_damping": preference.fisher_damping} if preference.fisher_damping else {}),
            **({"groups": "separate"} if len(groups) > 1 else {}),
        },
        {
            **{"targets": inputs.targets, "features": inputs.features, "warmup": stage.warmup},
            **({"curvature": inputs.curvature} if inputs.curvature else {}),
        },
        partition=inputs.name,
    )
    return recipe, _Weighted(chosen, weights, groups)


def _groups(targets: "pa.Table", separate: bool) -> "list[np.ndarray]":
    """Positions of the examples of each group, in order of their names; those without one are a group too."""
    import numpy as np

    names = np.array([one or "" for one in targets["group"].to_pylist()])
    return [np.flatnonzero(names == name) for name in np.unique(names)] if separate else [np.arange(len(names))]


def _direction(work: GradientPass, inputs: DirectionInputs, strategy: "Strategy", weighted: _Weighted) -> Tensors:
    """t per checkpoint: Σ_j w_j g_j, or with groups G the sum of their unit directions Σ_G t_G/‖t_G‖.

    `weights` [C, m'] among the tensors are the coefficients of the raw gradients, a group's length included.
    """
    import torch

    from prism_assets.gradients.vectors import norm
    from prism_assets.selection.direction import query_vector

    tensors: dict[str, torch.Tensor] = {}
    sketches, norms = [], []
    coefficients = weighted.weights.copy()
    for position, checkpoint in enumerate(work.checkpoints):
        vector: dict[str, Any] = {}
        for group in weighted.groups:
            part = _weighted_sum(work, position, weighted, group)
            if inputs.curvature is not None:
                part = _corrected(work, position, part, inputs.curvature)
            length = 1.0
            if len(weighted.groups) > 1:
                length = norm(part)
                _require_direction(length, weighted.targets["group"][group[0]].as_py(), position)
            coefficients[position, group] /= length
            vector = {name: tensor / length + vector.get(name, 0) for name, tensor in part.items()}
        norms.append(norm(vector))
        sketches.append(work.projection(work.at(checkpoint)).sketch_vector(vector).cpu().numpy())
        tensors |= {f"t/{position}/{name}": tensor.float() for name, tensor in vector.items()}
    rates = [checkpoint.mean_learning_rate for checkpoint in work.checkpoints]
    tensors["query"] = torch.from_numpy(query_vector(sketches, norms, rates))
    tensors["norms"] = torch.tensor(norms, dtype=torch.float64)
    tensors["weights"] = torch.from_numpy(coefficients)
    return Tensors(tensors, {"strategy": strategy.name, "groups": len(weighted.groups)})


def _weighted_sum(work: GradientPass, position: int, weighted: _Weighted, rows: "np.ndarray") -> "dict[str, Any]":
    """Σ_j w_j g_j over some of the target examples, at one checkpoint."""
    from prism_assets.selection.direction import target_vector

    # Refused target examples are left out, not weighted with zero: zero times NaN is NaN.
    chosen = target_set(weighted.targets.take(rows))
    return target_vector(work.at(work.checkpoints[position]), chosen, weighted.weights[position, rows])


def _require_direction(length: float, group: str | None, checkpoint: int) -> None:
    import math

    if not math.isfinite(length) or length <= 0:
        raise StageError(
            f"The target examples of group {group or '(none)'} have no direction at checkpoint {checkpoint}: the norm "
            f"of their weighted sum is {length}. Leave them out, or set preference.groups to pooled."
        )


# -- curvature ----------------------------------------------------------------------------------------------------


def sample_features(work: GradientPass) -> Artifact | None:
    """Features of the warm-up sample's rows at each checkpoint: the second moment that corrects directions. They belong
    to the feature version, so an arrival changes nothing. None where no correction is asked for."""
    stage = work.stage
    if stage.settings.preference.fisher_damping is None:
        return None
    sample = stage.shown("warmup_sample")
    recipe = stage.recipe("warmup_sample_features", stage.feature_identity, {"sample": sample, "warmup": stage.warmup})
    return stage.show(stage.make(recipe, lambda: _sample_rows(work, sample)).artifact)


def _sample_rows(work: GradientPass, sample: Artifact) -> Rows:
    from prism_assets.corpus.token_tables import from_table

    rows = work.stage.lake.read_table(sample)
    examples = from_table(rows)
    with work.stage.progress("gradients of the warm-up sample", len(examples) * len(work.checkpoints)) as progress:
        passes = work.candidate_rows(examples, progress.update)
    return Rows(feature_table(rows["id"].to_pylist(), passes), compression="none")


def _corrected(work: GradientPass, position: int, vector: "dict[str, Any]", curvature: Artifact) -> "dict[str, Any]":
    """(F + λI)⁻¹ t up to a factor, unsketched: t minus a weighted sum of the sample's rows, by one weighted backward
    pass.

    The coefficients are found in the sketch, the rows that they multiply are exact.
    """
    import numpy as np

    from prism_assets.corpus.token_tables import from_table
    from prism_assets.selection.direction import curvature_coefficients

    stage = work.stage
    checkpoint = work.checkpoints[position]
    engine = work.at(checkpoint)
    table = stage.lake.read_table(curvature)
    usable = np.flatnonzero([reason is None for reason in table["refused"].to_pylist()])
    if not len(usable):
        raise SettingsError(
            f"preference.fisher_damping: the warm-up sample has {table.num_rows} rows and none with a usable gradient "
            f"(the first is refused because {table['refused'][0].as_py()}), so there is no curvature to correct by. "
            "Leave the key out, or raise warmup.share."
        )
    kept = table.take(usable)
    vectors = vectors_of(kept).reshape(len(usable), len(work.checkpoints), -1)[:, position].astype(np.float64)
    norms = np.array([one[position] for one in kept["norm"].to_pylist()])
    sketched = work.projection(engine).sketch_vector(vector).cpu().numpy().astype(np.float64)
    damping = stage.settings.preference.fisher_damping
    assert damping is not None
    coefficients = curvature_coefficients(vectors, vectors @ sketched, damping)
    examples = from_table(stage.lake.read_table(stage.shown("warmup_sample")).take(usable))
    explained = engine.weighted_gradient(examples, coefficients / norms).gradient  # Σ_i a_i g_i / ‖D g_i‖
    preconditioner = work.preconditioner(checkpoint)
    return {name: tensor - preconditioner.diagonal(name) * explained[name] for name, tensor in vector.items()}
