"""The asset `selection`: the top of each strategy's ranking within the budget."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets.identity import split_key, target_of_split
from prism_assets.metadata import column_lineage, picture, preview
from prism_assets.project import Check, CheckResult, Project
from prism_assets.resources.lake import Artifact, Recipe, Rows
from prism_assets.selection.json_lines import JSON_LINES, json_lines_of, restore_json_lines, write_json_lines
from prism_assets.selection.pool import COPIED
from prism_assets.selection.ranking import TopRows, top_of_ranking
from prism_assets.selection.removal import Divided, divide
from prism_assets.selection.representations import Representations
from prism_assets.selection.selection_inputs import labels_of, selection_inputs, selection_recipe
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
            harmful=labels_of(stage, inputs, target) if strategy.by_label else None,
        )

    # The removed rows first: where what is left is published, they are too.
    of_removed = selection_recipe(stage, strategy, inputs, key, "removed")
    removed, first = stage.make(of_removed, lambda: _rows(divided().removed), lineage=looked_at)
    kept, second = stage.make(recipe, lambda: _rows(divided().kept), lineage=looked_at)
    return MadeSelection(kept, removed, max(first, second))


def _rows(top: TopRows) -> Rows:
    return Rows(top.table, top.notes, {JSON_LINES: lambda path: write_json_lines(path, top.table)})


def _artifacts(recipe: Recipe) -> dict[str, Artifact]:
    return {role: one for role, one in recipe.inputs.items() if isinstance(one, Artifact)}


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
