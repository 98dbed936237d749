"""The asset `selection`: the top of each strategy's ranking within the budget."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets.errors import LakeError, SettingsError
from prism_assets.features.target_anchors import shown_anchors
from prism_assets.identity import hidden_state_identity, join_key, split_key, target_of_split, within
from prism_assets.metadata import column_lineage, picture, preview
from prism_assets.project import Check, CheckResult, Project
from prism_assets.reference.base_model import base_model_recipe
from prism_assets.resources.lake import Artifact, Recipe, Rows, digest
from prism_assets.selection.direction_artifacts import COMPARED
from prism_assets.selection.json_lines import JSON_LINES, json_lines_of, restore_json_lines, write_json_lines
from prism_assets.selection.labels import harmful_rows
from prism_assets.selection.pool import COPIED, Pool
from prism_assets.selection.ranking import TopRows, top_of_ranking
from prism_assets.selection.removal import Divided, divide
from prism_assets.selection.representations import Representations
from prism_assets.selection.strategy_pool import target_scores_of
from prism_assets.selection.target_scores import require_made_of
from prism_assets.settings import Budget, Rerank
from prism_assets.stage import Stage
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    from prism_assets.selection.strategies import Strategy

INFLUENCE_POSITIVE = Check(
    "influence_positive",
    "The budget stops before rows of non-positive influence: those are predicted not to help (where rows are removed: "
    "not to harm).",
)
SKETCH_RESOLVES = Check(
    "sketch_resolves", "Most of the spread of the scores is the gradients', not the noise of their sketch."
)
# Gives what is a target's own: (table, strategy of a direction or None) -> artefact.
OfTarget = Callable[[str, str | None], Artifact]


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "selection",
        group="selection",
        kinds={"faiss", "parquet"},
        deps=["target_direction", "candidate_index", "live_pool"],
        checks=[INFLUENCE_POSITIVE, SKETCH_RESOLVES],
        loads_model=True,
    )
    def selection(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """The selected candidates of one target and strategy, as Parquet and as JSON Lines ready for training; where
        rows are removed, what is left of the mixture, and beside it what was removed.

        Ranked by inner product of gradient features with the target direction (or by the strategy's own order), cut
        by the budget over canonical live rows; ties break by example id.
        """
        stage = stage_of(project, context)
        return each_partition(context, stage, lambda key: _select(project, stage, key))

    return selection


def _select(project: Project, stage: Stage, key: str) -> Outcome:
    from prism_assets.selection.strategies import STRATEGIES

    target, name = split_key(key)
    strategy = STRATEGIES[name]
    made = make_selection(stage, strategy, selection_inputs(stage, target, strategy), key)
    stage.show(made.selection, key)
    if made.removed is None and stage.shown_or_none("removed", key) is not None:
        stage.retire("removed", key)
    elif made.removed is not None:
        stage.show(made.removed, key)
    for one in (made.selection, made.removed):
        if one is not None and not made.computed:
            restore_json_lines(stage, one)
    return _outcome(project, stage, made)


class MadeSelection(NamedTuple):
    """The rows to fine-tune on, those that were removed for it, and how many artefacts were made."""

    selection: Artifact
    removed: Artifact | None  # None where the target keeps
    computed: int


def make_selection(stage: Stage, strategy: "Strategy", inputs: Mapping[str, Artifact], key: str) -> MadeSelection:
    """What a strategy selects from its `selection_inputs`, or leaves of a mixture; `key` names it."""
    recipe = selection_recipe(stage, strategy, inputs, key)
    states = Representations(stage)
    target = target_of_split(split_key(key)[0])
    budget, rerank = stage.settings.budget_of(target), stage.settings.selection.rerank

    # Which blocks of hidden states were looked at is known when the ranking is done; it is no part of the identity.
    def looked_at() -> dict[str, list[Artifact]]:
        return {"hidden_states": states.used} if states.used else {}

    if stage.settings.targets[target].use == "keep":

        def selected() -> Rows:
            return _rows(
                top_of_ranking(stage, strategy, _artifacts(recipe), budget, rerank=rerank, representations=states)
            )

        selection, computed = stage.make(recipe, selected, lineage=looked_at)
        return MadeSelection(selection, None, computed)

    @cache
    def divided() -> Divided:
        return divide(
            stage,
            strategy,
            _artifacts(recipe),
            budget,
            rerank=rerank,
            representations=states,
            source=stage.settings.targets[target].mixture,
            harmful=_labels(stage, inputs, target) if strategy.by_label else None,
        )

    # The removed rows first: where what is left is published, they are too.
    of_removed = selection_recipe(stage, strategy, inputs, key, "removed")
    removed, first = stage.make(of_removed, lambda: _rows(divided().removed), lineage=looked_at)
    kept, second = stage.make(recipe, lambda: _rows(divided().kept), lineage=looked_at)
    return MadeSelection(kept, removed, max(first, second))


def _labels(stage: Stage, inputs: Mapping[str, Artifact], target: str) -> dict[str, bool]:
    pool = Pool(stage, inputs["pool"], source=stage.settings.targets[target].mixture)
    return harmful_rows(stage, pool, target)


def _rows(top: TopRows) -> Rows:
    return Rows(top.table, top.notes, {JSON_LINES: lambda path: write_json_lines(path, top.table)})


def _artifacts(recipe: Recipe) -> dict[str, Artifact]:
    return {role: one for role, one in recipe.inputs.items() if isinstance(one, Artifact)}


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
        identity["labels"] = digest(sorted(_labels(stage, inputs, target).items()))
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
    found = stage.lake.find(base_model_recipe(stage))
    if found is None:
        raise LakeError("The lake does not know today's model yet: materialise base_model first, or run `prism run`.")
    return found


def query_index(
    stage: Stage,
    *,
    target: str,
    strategy: str = "prism",
    k: int = 10,
    offset: int = 0,
    version: str | None = None,
    rerank: Rerank = 0.0,
    harmful: bool = False,
) -> list[dict[str, Any]]:
    """The k candidates of highest influence on a target behind the first `offset`, from the index of a feature version
    (default: today's); of a target with `use: remove` those of its mixture that are first to be removed. A strategy
    without a direction gives its own order.

    `rerank` scores so many times k rows again without the sketch (today's version only: it needs the model). `harmful`:
    those of lowest influence, which are predicted to lower J most; of a target with `use: remove` it changes nothing.

    Raises SettingsError for a strategy that prism.yaml does not name or that has no order (oracle), or has no direction
    where `version`, `rerank` or `harmful` need one; LakeError where the version has none, or no index, yet.
    """
    from prism_assets.selection.strategies import STRATEGIES

    asked = (*stage.settings.strategies, *COMPARED)
    known = [one.name for one in STRATEGIES.values() if one.name in asked and not one.by_label]
    if strategy not in known:
        raise SettingsError(f"{strategy!r} ranks nothing here; prism.yaml has {', '.join(known)}.")
    if (version or rerank or harmful) and not STRATEGIES[strategy].needs_direction:
        raise SettingsError(
            f"{strategy} has no direction, so no older version of it can be asked, no exact score and no opposite."
        )
    if rerank and version not in (None, stage.feature_version):
        raise SettingsError("Exact scores need the model of today's feature version: ask an older one without them.")
    inputs = selection_inputs(stage, target, STRATEGIES[strategy], version=version)
    budget = Budget(kind="rows", amount=offset + k)
    settings = stage.settings.targets[target]
    reverse = harmful and settings.use == "keep"
    # Where selections go by exact scores of all rows, a query does too, as far as they are known without the model.
    everywhere = stage.settings.selection.rerank == "all" and version in (None, stage.feature_version)
    top = top_of_ranking(
        stage,
        STRATEGIES[strategy],
        inputs,
        budget,
        rerank="all" if everywhere else rerank,
        whole=bool(everywhere and rerank),
        source=settings.mixture,
        reverse=reverse,
    )
    columns = ["rank", "score", "id", "shard", "row", "source", "prompt", "completion"]
    found = top.table.select(columns).slice(offset).to_pylist()
    return [{**row, "score": -row["score"]} for row in found] if reverse else found


def selected_rows(stage: Stage, target: str, strategy: str) -> int:
    """How many rows of a ranking are taken: selected, or removed. Raises LakeError where nothing is selected yet."""
    notes = stage.shown("selection", join_key(target, strategy)).notes
    return notes.get("removed_rows", notes["rows"])


def _outcome(project: Project, stage: Stage, made: MadeSelection) -> Outcome:
    from prism_assets import plots

    selection = made.selection
    notes = selection.notes
    strategy = selection.header["settings"]["strategy"]
    non_positive = notes["non_positive_influence"]
    columns = ["rank", "score", "source", "prompt", "completion"]
    sources = plots.composition(stage.shown("live_pool").notes["sources"], {strategy: notes["composition"]})
    metadata: dict[str, Any] = {
        "dagster/row_count": notes["rows"],
        "completion_tokens": notes["completion_tokens"],
        "pool_rows": notes["pool_rows"],
        "composition": dg.MetadataValue.json(notes["composition"]),
        "sources": picture(sources, "composition by source"),
        "json_lines": dg.MetadataValue.path(str(json_lines_of(stage, selection))),
        **column_lineage(project, **{name: ("candidates", name) for name in COPIED}),
        "rows": preview(stage.lake.read_table(selection, columns).slice(0, 8).to_pylist()),
    }
    if "score_histogram" in notes:
        metadata["scores"] = picture(plots.score_histogram(notes["score_histogram"]), "influence scores")
    artifacts = [selection]
    if made.removed is not None:
        artifacts.append(made.removed)
        metadata["removed_rows"] = notes["removed_rows"]
        metadata["removed_composition"] = dg.MetadataValue.json(notes["removed_composition"])
        metadata["removed_json_lines"] = dg.MetadataValue.path(str(json_lines_of(stage, made.removed)))
        metadata["removed"] = preview(stage.lake.read_table(made.removed, columns).slice(0, 8).to_pylist())
    said = "this strategy has no influence scores" if non_positive is None else non_positive
    checks = [INFLUENCE_POSITIVE(not non_positive, non_positive=said), _sketch_check(notes.get("sketch_noise"))]
    return Outcome(artifacts, made.computed, metadata, checks)


def _sketch_check(noted: Mapping[str, Any] | None) -> CheckResult:
    from prism_assets.selection.sketch_noise import ENOUGH

    if noted is None:
        return SKETCH_RESOLVES(True, noise="no sketch in this ranking, or it was made before its noise was noted")
    advised = noted["advised"]
    facts = {name: round(noted[name], 4) for name in ("signal", "spread", "noise")}
    if noted["signal"] < ENOUGH:
        wider = f"features.sketch_dim: {advised}, or " if advised else ""
        facts["advised"] = f"{wider}selection.rerank: all (exact scores)"
    return SKETCH_RESOLVES(noted["signal"] >= ENOUGH, **facts)
