"""Directions as artefacts: target gradients weighted and added up, with the query that the index is queried with."""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.target_set import target_set
from prism_assets.errors import SettingsError
from prism_assets.features.blocks import feature_table, vectors_of
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.resources.lake import Artifact, Lake, Recipe, Rows, Tensors, digest
from prism_assets.selection.target_scores import require_made_of, scores_of, tokens_counted
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

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
    features, targets = stage.shown("target_features", name), stage.shown("targets", name)
    require_made_of(features, targets)
    corrected = stage.settings.preference.fisher_damping is not None
    curvature = stage.shown("warmup_sample_features") if corrected else None
    return DirectionInputs(name, features, targets, stage.shown("eval_examples", name), curvature)


class MadeDirections(NamedTuple):
    """The direction of each strategy by name, and how many were made."""

    by_strategy: dict[str, Artifact]
    computed: int


def make_directions(work: GradientPass, inputs: DirectionInputs, strategies: "Iterable[Strategy]") -> MadeDirections:
    """The direction of each strategy: t per checkpoint (unsketched, fp32), its sketch and norm, and the query.

    Those that are not there yet are made by one pass over the target examples a checkpoint; its cost is noted in the
    first of them.
    """
    lake = work.stage.lake
    needed = {strategy.name: _recipe(work.stage, inputs, strategy) for strategy in strategies}
    missing = {name: one for name, one in needed.items() if lake.find(one.recipe) is None}
    contents = cache(lambda: _directions(work, inputs, missing))
    directions, computed = {}, 0
    for name, one in needed.items():
        made = work.stage.make(one.recipe, lambda n=name: contents()[n])
        directions[name] = made.artifact
        computed += made.computed
    return MadeDirections(directions, computed)


def expected_direction(stage: Stage, name: str, strategy: "Strategy") -> Recipe:
    """What the direction of a target would be made from today, by today's settings. Nothing is computed.

    Raises LakeError where something of it is not there yet, SettingsError where the settings do not fit the targets.
    """
    return _recipe(stage, shown_inputs(stage, name), strategy).recipe


def load_direction(lake: Lake, artifact: Artifact) -> "tuple[np.ndarray, list[dict[str, Any]]]":
    """The query [C·K] and t per checkpoint (parameter name -> tensor) of a direction."""
    tensors = lake.read_tensors(artifact)
    vectors: list[dict[str, Any]] = [{} for _ in range(len(tensors["norms"]))]
    for name, tensor in tensors.items():
        if name.startswith("t/"):
            _, position, parameter = name.split("/", 2)
            vectors[int(position)][parameter] = tensor
    return tensors["query"].numpy(), vectors


class _Needed(NamedTuple):
    """A direction that is asked for."""

    recipe: Recipe
    weights: "np.ndarray"  # float64 [C, m'] of the gradients of the usable target examples
    usable: "np.ndarray"  # [m'] where these are


def _recipe(stage: Stage, inputs: DirectionInputs, strategy: "Strategy") -> _Needed:
    """What a direction is made from, and how."""
    table = stage.lake.read_table(inputs.targets)
    scores, usable = scores_of(stage.settings, stage.lake.read_table(inputs.features), table)
    # Coefficients of the gradients of mean log-probabilities, which is what a gradient pass gives.
    assert strategy.weigh is not None
    weights = strategy.weigh(scores) * tokens_counted(stage.settings, table.take(usable), scores.kind == "pairs")
    damping = stage.settings.preference.fisher_damping
    recipe = stage.recipe(
        "target_directions",
        {"weights": digest(weights.tolist()), **({"fisher_damping": damping} if damping else {})},
        {
            **{"targets": inputs.targets, "features": inputs.features, "warmup": stage.warmup},
            **({"curvature": inputs.curvature} if inputs.curvature else {}),
        },
        partition=inputs.name,
    )
    return _Needed(recipe, weights, usable)


def _directions(work: GradientPass, inputs: DirectionInputs, needed: "dict[str, _Needed]") -> dict[str, Tensors]:
    import torch

    from prism_assets.gradients.vectors import norm
    from prism_assets.selection.direction import query_vector, target_vectors

    # Refused target examples are left out, not weighted with zero: zero times NaN is NaN.
    (usable,) = {tuple(one.usable.tolist()) for one in needed.values()}
    chosen = target_set(work.stage.lake.read_table(inputs.targets).take(list(usable)))
    tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in needed}
    sketches: dict[str, list[np.ndarray]] = {name: [] for name in needed}
    norms: dict[str, list[float]] = {name: [] for name in needed}
    for position, checkpoint in enumerate(work.checkpoints):
        engine = work.at(checkpoint)
        vectors = target_vectors(engine, chosen, [one.weights[position] for one in needed.values()])
        if inputs.curvature is not None:
            vectors = _corrected(work, position, vectors, inputs.curvature)
        for name, vector in zip(needed, vectors, strict=True):
            norms[name].append(norm(vector))
            sketches[name].append(work.projection(engine).sketch_vector(vector).cpu().numpy())
            tensors[name] |= {f"t/{position}/{parameter}": value.float().cpu() for parameter, value in vector.items()}
    rates = [checkpoint.mean_learning_rate for checkpoint in work.checkpoints]
    for name, found in tensors.items():
        found["query"] = torch.from_numpy(query_vector(sketches[name], norms[name], rates))
        found["norms"] = torch.tensor(norms[name], dtype=torch.float64)
    return {name: Tensors(found, {"strategy": name}) for name, found in tensors.items()}


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


def _corrected(
    work: GradientPass, position: int, vectors: "list[dict[str, Any]]", curvature: Artifact
) -> "list[dict[str, Any]]":
    """(F + λI)⁻¹ t of each t up to a factor, unsketched: t minus a weighted sum of the sample's rows, by one pass over
    them.

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
    kept_rows = vectors_of(kept).reshape(len(usable), len(work.checkpoints), -1)[:, position].astype(np.float64)
    norms = np.array([one[position] for one in kept["norm"].to_pylist()])
    damping = stage.settings.preference.fisher_damping
    assert damping is not None
    projection, coefficients = work.projection(engine), []
    for vector in vectors:
        sketched = projection.sketch_vector(vector).cpu().numpy().astype(np.float64)
        coefficients.append(curvature_coefficients(kept_rows, kept_rows @ sketched, damping) / norms)
    examples = from_table(stage.lake.read_table(stage.shown("warmup_sample")).take(usable))
    explained = engine.weighted_gradients(examples, np.stack(coefficients))  # Σ_i a_i g_i / ‖D g_i‖
    preconditioner = work.preconditioner(checkpoint)
    return [
        {name: tensor - preconditioner.diagonal(name) * row[name] for name, tensor in vector.items()}
        for vector, row in zip(vectors, explained, strict=True)
    ]
