"""What a ranking is made from: the artefacts that a strategy reads, and the recipe of a selection of them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prism_assets.errors import LakeError
from prism_assets.features.anchor_artifacts import shown_anchors
from prism_assets.identity import hidden_state_identity, split_key, target_of_split, within
from prism_assets.resources.lake import Artifact, Recipe, digest
from prism_assets.selection.labels import harmful_rows
from prism_assets.selection.pool import Pool
from prism_assets.selection.strategy_pool import target_scores_of
from prism_assets.selection.target_scores import require_made_of
from prism_assets.stage import Stage

if TYPE_CHECKING:
    from prism_assets.selection.strategies import Strategy

# Gives what is a target's own: (table, strategy of a direction or None) -> artefact.
OfTarget = Callable[[str, str | None], Artifact]


def selection_recipe(
    stage: Stage, strategy: "Strategy", inputs: Mapping[str, Artifact], key: str, table: str = "selection"
) -> Recipe:
    """What a selection, or the rows `removed` for it, is made from, and by which settings."""
    options = stage.settings.selection
    target = target_of_split(split_key(key)[0])
    identity: dict[str, Any] = {
        "strategy": strategy.name,
        "budget": stage.settings.budget_of(target).model_dump(),
        **_removal_identity(stage, target),
    }
    if strategy.by_label:
        identity["labels"] = digest(sorted(labels_of(stage, inputs, target).items()))
    if "seed" in strategy.reads:
        identity["seed"] = options.seed
    if "target_features" in strategy.reads:
        scores = target_scores_of(stage, inputs)[0]
        identity["temperature"] = scores.temperature
        if scores.kind == "pairs":
            identity["objective"] = "softplus"  # whose slope the weights are; they were those of sigmoid
        identity["score"] = stage.settings.preference.score
    if (strategy.needs_direction or "direction" in strategy.reads) and options.row_scale != "unit":
        identity["row_scale"] = options.row_scale
    if strategy.needs_direction and options.rerank:
        identity["rerank"] = options.rerank
        # What exact scores are computed with beside the direction; its own inputs name it too.
        inputs = {**inputs, "warmup": stage.warmup}
    if "hidden_states" in strategy.reads:
        identity["hidden_states"] = hidden_state_identity(stage.model_identity, stage.dtype)
    version = stage.feature_version if strategy.needs_features else stage.corpus_version
    return stage.recipe(table, identity, inputs, partition=key, version=version)


def _removal_identity(stage: Stage, target: str) -> dict[str, Any]:
    settings = stage.settings.targets[target]
    return {} if settings.use == "keep" else {"use": "remove", "mixture": settings.mixture}


def selection_inputs(
    stage: Stage,
    target: str,
    strategy: "Strategy",
    *,
    version: str | None = None,
    of_target: OfTarget | None = None,
) -> dict[str, Artifact]:
    """What a strategy's ranking is made from, by name: what its `reads` declare and no more.

    `of_target(table, strategy)` gives what is the target's own; without it, what the lake shows for the target, in a
    feature version (default: today's). Raises LakeError where something of it is not there yet.
    """
    of_target = of_target or _shown_of(stage, target, version)
    inputs: dict[str, Artifact] = {}
    if "hidden_states" in strategy.reads:
        inputs["model"] = _base_model(stage)
    if strategy.needs_features:
        inputs["index"] = stage.lake.require("candidate_index", None, version or stage.feature_version)
        # The pool that the index was reconciled with, so that a query never mixes two states.
        inputs["pool"] = stage.lake.get("live_pool", inputs["index"].notes["pool"]) or stage.shown("live_pool")
    else:
        inputs["pool"] = stage.shown("live_pool")
    if strategy.needs_direction:
        inputs["direction"] = of_target("target_directions", strategy.name)
    if "direction" in strategy.reads:
        inputs["direction"] = of_target("target_directions", "prism")
    if {"text", "target_features", "hidden_states"} & strategy.reads:
        inputs["targets"] = of_target("target_anchors", None)
    if "target_features" in strategy.reads:
        inputs["target_features"] = of_target("target_features", None)
        require_made_of(inputs["target_features"], inputs["targets"])
    if {"direction", "target_features"} & strategy.reads:
        inputs["warmup"] = stage.warmup
    return inputs


def _shown_of(stage: Stage, target: str, version: str | None) -> OfTarget:
    """What the lake shows of a target, in a feature version (default: today's)."""

    def shown(table: str, strategy: str | None) -> Artifact:
        if table == "target_anchors":
            return shown_anchors(stage, target) if version is None else stage.shown(table, target)
        if version is None:
            return stage.shown(table, target, strategy)
        return stage.lake.require(table, target, within(version, strategy))

    return shown


def _base_model(stage: Stage) -> Artifact:
    from prism_assets.reference.base_model import base_model_recipe

    found = stage.lake.find(base_model_recipe(stage))
    if found is None:
        raise LakeError("The lake does not know today's model yet: materialise base_model first, or run `prism run`.")
    return found


def labels_of(stage: Stage, inputs: Mapping[str, Artifact], target: str) -> dict[str, bool]:
    """Which rows of a removal's mixture the label column calls harmful."""
    pool = Pool(stage, inputs["pool"], source=stage.settings.targets[target].mixture)
    return harmful_rows(stage, pool, target)
