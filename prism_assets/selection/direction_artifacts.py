"""Directions as artefacts: target gradients weighted and added up, with the query that the index is queried with."""

import math
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.target_set import target_set
from prism_assets.errors import StageError
from prism_assets.features.anchor_artifacts import shown_anchors
from prism_assets.features.exact_products import vectors_among
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.gradients.vectors import norm
from prism_assets.resources.lake import Artifact, Lake, Recipe, Tensors, digest
from prism_assets.selection.curvature import correct, reads_sample
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
    features, targets = stage.shown("target_features", name), shown_anchors(stage, name)
    require_made_of(features, targets)
    curvature = stage.shown("warmup_sample_features") if reads_sample(stage) else None
    return DirectionInputs(name, features, targets, stage.shown("eval_examples", name), curvature)


class MadeDirections(NamedTuple):
    """The direction of each strategy by name, and how many were made."""

    by_strategy: dict[str, Artifact]
    computed: int


def make_directions(work: GradientPass, inputs: DirectionInputs, strategies: "Iterable[Strategy]") -> MadeDirections:
    """The direction of each strategy: t per checkpoint (unsketched, fp32), its sketch and norm, and the query.

    They are made by one pass over the target examples a checkpoint; its cost is noted in the first of them. Last bits
    depend on which are made together, so where one is missing all are computed: what a killed run left makes no
    difference.
    """
    needed = {strategy.name: _recipe(work.stage, inputs, strategy) for strategy in strategies}
    contents = cache(lambda: _directions(work, inputs, {name: weighted for name, (_, weighted) in needed.items()}))
    directions, computed = {}, 0
    for name, (recipe, _) in needed.items():
        made = work.stage.make(recipe, lambda n=name: contents()[n])
        directions[name] = made.artifact
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
    weights = tensors["weights"].numpy() if "weights" in tensors else None
    return Direction(tensors["query"].numpy(), vectors_among(tensors), tensors["norms"].numpy(), weights)


def load_query(lake: Lake, artifact: Artifact) -> "np.ndarray":
    """The query float32 [C·K] of a direction, read without torch."""
    return lake.read_arrays(artifact)["query"]


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
    corrected = stage.settings.curvature
    groups = _groups(chosen, stage.settings.preference.groups == "separate")
    recipe = stage.recipe(
        "target_directions",
        {
            "weights": digest(weights.tolist()),
            **({"curvature": corrected.model_dump()} if corrected.kind != "none" else {}),
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


def _directions(work: GradientPass, inputs: DirectionInputs, needed: "dict[str, _Weighted]") -> dict[str, Tensors]:
    """By strategy, t per checkpoint: Σ_j w_j g_j, or with groups G the sum of their unit directions Σ_G t_G/‖t_G‖.

    `weights` [C, m'] among the tensors are the coefficients of the raw gradients, a group's length included.
    """
    import torch

    from prism_assets.selection.direction import query_vector

    tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in needed}
    made = {name: _Made([], [], [], one.weights.copy()) for name, one in needed.items()}
    for position, checkpoint in enumerate(work.checkpoints):
        vectors = _at(work, position, inputs, needed, made)
        projection = work.projection(work.at(checkpoint))
        for name, vector in vectors.items():
            made[name].norms.append(norm(vector))
            made[name].sketches.append(projection.sketch_vector(vector).cpu().numpy())
            tensors[name] |= {f"t/{position}/{parameter}": value.float().cpu() for parameter, value in vector.items()}
    rates = [checkpoint.mean_learning_rate for checkpoint in work.checkpoints]
    found = {}
    for name, its in tensors.items():
        one = made[name]
        its["query"] = torch.from_numpy(query_vector(one.sketches, one.norms, rates))
        its["norms"] = torch.tensor(one.norms, dtype=torch.float64)
        its["weights"] = torch.from_numpy(one.weights)
        notes: dict[str, Any] = {"strategy": name, "groups": len(needed[name].groups)}
        if work.stage.settings.curvature.kind != "none":
            notes["dampings"] = [None if lam is None or math.isinf(lam) else lam for lam in one.dampings]
        found[name] = Tensors(its, notes)
    return found


class _Made(NamedTuple):
    """What is collected of a direction, checkpoint by checkpoint."""

    sketches: "list[np.ndarray]"
    norms: list[float]
    dampings: list[float | None]  # of each checkpoint and group
    weights: "np.ndarray"  # float64 [C, m'] of the raw gradients


def _at(
    work: GradientPass,
    position: int,
    inputs: DirectionInputs,
    needed: "dict[str, _Weighted]",
    made: dict[str, _Made],
) -> dict[str, dict[str, Any]]:
    """The vectors of all strategies at one checkpoint, by one pass over the target examples."""
    from prism_assets.selection.direction import target_vectors

    vectors: dict[str, dict[str, Any]] = {name: {} for name in needed}
    first = next(iter(needed.values()))  # targets and groups are those of all
    several = len(first.groups) > 1
    for group in first.groups:
        # Refused target examples are left out, not weighted with zero: zero times NaN is NaN.
        chosen = target_set(first.targets.take(group))
        engine = work.at(work.checkpoints[position])
        raw = target_vectors(engine, chosen, [one.weights[position, group] for one in needed.values()])
        for name, part in zip(needed, correct(work, position, raw, inputs.curvature), strict=True):
            length = norm(part.vector) if several else 1.0
            if several:
                _require_direction(length, first.targets["group"][group[0]].as_py(), position)
            made[name].dampings.append(part.damping)
            made[name].weights[position, group] /= length
            sums = vectors[name]
            vectors[name] = {key: value / length + sums.get(key, 0) for key, value in part.vector.items()}
    return vectors


def _require_direction(length: float, group: str | None, checkpoint: int) -> None:
    if not math.isfinite(length) or length <= 0:
        raise StageError(
            f"The target examples of group {group or '(none)'} have no direction at checkpoint {checkpoint}: the norm "
            f"of their weighted sum is {length}. Leave them out, or set preference.groups to pooled."
        )
