"""The target's side of a score: the direction, the targets it is made of, and the weights that they had."""

from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import CannotExplain, LakeError
from prism_assets.identity import within
from prism_assets.reference.checkpoints import learning_rates
from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import load_direction
from prism_assets.selection.target_scores import usable_targets
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class TargetSide(NamedTuple):
    """What a strategy's scores for a target are made of, in one feature version."""

    direction: Artifact
    query: "np.ndarray"  # [C·K]
    vectors: list[dict[str, Any]]  # t_k of each checkpoint
    norms: "np.ndarray"  # [C], ‖t_k‖
    targets: "pa.Table"  # the usable targets with their sketches [m rows]
    weights: "np.ndarray"  # [C, m] of their raw gradients
    rates: list[float]  # [C] learning rates


def target_side(stage: Stage, target: str, strategy: str, version: str) -> TargetSide:
    """Read it. Raises CannotExplain for a strategy without scores, LakeError where something is missing or does not
    fit."""
    from prism_assets.selection.strategies import STRATEGIES

    if strategy not in STRATEGIES or not STRATEGIES[strategy].needs_direction:
        known = ", ".join(name for name, one in STRATEGIES.items() if one.needs_direction)
        raise CannotExplain(f"{strategy} gives no scores to explain; these do: {known}.")
    direction = direction_of(stage, target, strategy, version)
    if direction is None:
        raise LakeError(
            f"The lake has no {strategy} direction of {target} in version {version}: name {strategy} "
            "under `strategies` in prism.yaml and run `prism run`."
        )
    stored = load_direction(stage.lake, direction)
    if stored.weights is None:
        raise LakeError(
            f"The {strategy} direction of {target} was made by an earlier version of this code, which did not store "
            "what it is made of: run `prism run`."
        )
    targets = stage.lake.read_table(_input(stage, direction, "targets"), ["prompt", "completion"])
    table = stage.lake.read_table(_input(stage, direction, "features"))
    for name in targets.column_names:
        table = table.append_column(name, targets[name])
    return TargetSide(
        direction,
        stored.query,
        stored.vectors,
        stored.norms,
        table.take(usable_targets(table)),
        stored.weights,
        learning_rates(stage.lake.local(_input(stage, direction, "warmup"))),
    )


def direction_of(stage: Stage, target: str, strategy: str, version: str) -> Artifact | None:
    """The direction of a strategy in a feature version; None where there is none."""
    return stage.lake.head("target_directions", target, within(version, strategy))


def _input(stage: Stage, direction: Artifact, role: str) -> Artifact:
    reference = direction.header["inputs"][role]
    found = stage.lake.get(reference["table"], reference["fingerprint"])
    if found is None:
        raise LakeError(
            f"{reference['table']} {reference['fingerprint']}, which the direction of {direction.partition} was made "
            "from, is not in the lake any more: run `prism run`."
        )
    return found
