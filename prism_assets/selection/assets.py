"""A door: selections, the top of each strategy's ranking within the budget."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version
from prism_assets.features.assets import feature_version
from prism_assets.partitions import target_strategies_of
from prism_assets.reference.assets import base_model_recipe, warmup_scope
from prism_assets.selection.pool import COPIED, LivePool, learning_rates
from prism_assets.selection.representations import Representations, representation_identity
from prism_assets.selection.rerank import exact_scores
from prism_assets.selection.target_direction import (
    COMPARED,
    GROUP,
    build_target_direction,
    direction_scope,
    load_direction,
    require_made_of,
    scores_of,
)
from prism_assets.settings import Budget, Settings, SettingsError
from resources.lake import Artifact, Lake, LakeError, Recipe
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.strategies import Strategy, TargetScores

__all__ = ["build_selection", "build_target_direction", "direction_scope", "join_key", "load_direction", "query_index"]

SELECTION_VERSION = 2


class Ranked(NamedTuple):
    """The top of a ranking."""

    table: "pa.Table"  # rank, score, id, shard, row, source, prompt, completion, messages, completion_tokens
    notes: dict[str, Any]


def build_selection(settings: Settings) -> dg.AssetsDefinition:
    """The asset `selection`, one partition per target and strategy of the settings."""

    @dg.asset(
        partitions_def=target_strategies_of(settings),
        group_name=GROUP,
        kinds={"faiss", "parquet"},
        code_version=str(SELECTION_VERSION),
        deps=["target_direction", "candidate_index", "live_pool"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        check_specs=[
            dg.AssetCheckSpec(
                "influence_positive",
                asset="selection",
                description="The budget stops before rows of non-positive influence: those are predicted not to help.",
            )
        ],
    )
    def selection(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
        vector_store: VectorStore,
    ) -> dg.MaterializeResult:
        """The selected candidates of one target and strategy, as Parquet and as JSON Lines ready for training.

        Ranked by inner product of gradient features with the target direction (or by the strategy's own order), cut
        by the budget over canonical live rows; ties break by example id.
        """
        from prism_assets.selection.strategies import STRATEGIES

        def select(key: str) -> stage.Outcome:
            target, strategy = split_key(key)
            inputs = selection_inputs(settings, lake, language_model, target, STRATEGIES[strategy])
            artifact, computed = publish_selection(
                context, settings, lake, language_model, vector_store, STRATEGIES[strategy], inputs, key
            )
            lake.point(artifact, key, run_id=context.run_id)
            pool = lake.require("live_pool", None, corpus_version(settings, language_model))
            return _selection_outcome(lake, artifact, pool, strategy, computed)

        return stage.each_partition(context, select)

    return selection


def split_key(key: str) -> tuple[str, str]:
    """Target and strategy of a partition key. Dagster joins the dimensions in order of their names."""
    strategy, _, target = key.partition("|")
    return target, strategy


def join_key(target: str, strategy: str) -> str:
    """The partition key of a target and a strategy."""
    return f"{strategy}|{target}"


def publish_selection(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    store: VectorStore,
    strategy: "Strategy",
    inputs: dict[str, Artifact],
    key: str,
) -> tuple[Artifact, int]:
    """What a strategy selects from its `selection_inputs`; `key` names it."""
    recipe = selection_recipe(settings, lake, model, strategy, inputs, key)
    inputs = dict(recipe.inputs)
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    stopwatch = stage.Stopwatch()
    states = Representations(context, settings, lake, model)
    ranked = rank(
        settings, lake, model, store, strategy, inputs, settings.selection.budget, settings.selection.rerank, states
    )
    return (
        lake.publish_table(
            replace(recipe, lineage={"hidden_states": states.used} if states.used else {}),
            ranked.table,
            run_id=context.run_id,
            notes={**ranked.notes, "cost": stopwatch.cost()},
            attachments={".jsonl": lambda path: _write_json_lines(path, ranked.table)},
        ),
        1,
    )


def selection_recipe(
    settings: Settings, lake: Lake, model: LanguageModel, strategy: "Strategy", inputs: dict[str, Artifact], key: str
) -> Recipe:
    """What a selection is made from, and by which settings."""
    identity: dict[str, Any] = {"strategy": strategy.name, "budget": settings.selection.budget.model_dump()}
    if "seed" in strategy.reads:
        identity["seed"] = settings.selection.seed
    if "target_features" in strategy.reads:
        identity["temperature"] = _target_scores(settings, lake, inputs)[0].temperature
        identity["score"] = settings.preference.score
    if strategy.needs_direction and settings.selection.rerank:
        identity["rerank"] = settings.selection.rerank
        # What exact scores are computed with beside the direction; its own inputs name it too.
        inputs = {**inputs, "warmup": lake.require("warmup_checkpoints", None, warmup_scope(settings, model))}
    if "hidden_states" in strategy.reads:
        identity["hidden_states"] = representation_identity(model)
    version = feature_version(settings, lake, model) if strategy.needs_features else corpus_version(settings, model)
    return Recipe("selection", SELECTION_VERSION, identity, inputs, partition=key, version=version)


def selection_inputs(
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    target: str,
    strategy: "Strategy",
    version: str | None = None,
    of_target: Callable[[str, str], Artifact] | None = None,
) -> dict[str, Artifact]:
    """What a strategy's ranking is made from, by name: what its `reads` declare and no more.

    `of_target(table, scope)` gives what is the target's own; without it, what the lake shows for the target now.
    Raises LakeError where something of it is not there yet.
    """
    of_target = of_target or (lambda table, scope: lake.require(table, target, scope))
    corpus = corpus_version(settings, model)
    inputs: dict[str, Artifact] = {}
    if strategy.needs_features:
        version = version or feature_version(settings, lake, model)
        inputs["index"] = lake.require("candidate_index", None, version)
        # The pool that the index was reconciled with, so that a query never mixes two states.
        manifest = lake.get("live_pool", inputs["index"].notes["pool"])
        inputs["pool"] = manifest or lake.require("live_pool", None, corpus)
    else:
        inputs["pool"] = lake.require("live_pool", None, corpus)
    if strategy.needs_direction:
        inputs["direction"] = of_target("target_directions", direction_scope(version, strategy.name))
    if "direction" in strategy.reads:
        inputs["direction"] = of_target("target_directions", direction_scope(version, "prism"))
    if {"text", "target_features", "hidden_states"} & strategy.reads:
        inputs["targets"] = of_target("targets", corpus)
    if "target_features" in strategy.reads:
        inputs["target_features"] = of_target("target_features", version)
        require_made_of(inputs["target_features"], inputs["targets"])
    if {"direction", "target_features"} & strategy.reads:
        inputs["warmup"] = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))
    if "hidden_states" in strategy.reads:
        inputs["model"] = _base_model(lake, model)
    return inputs


def _base_model(lake: Lake, model: LanguageModel) -> Artifact:
    found = lake.find(base_model_recipe(model.identify()))
    if found is None:
        raise LakeError("The lake does not know today's model yet: materialise base_model first, or run `prism run`.")
    return found


def _target_scores(settings: Settings, lake: Lake, inputs: dict[str, Artifact]) -> "tuple[TargetScores, np.ndarray]":
    return scores_of(settings, lake.read_table(inputs["target_features"]), lake.read_table(inputs["targets"]))


def query_index(
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    store: VectorStore,
    *,
    target: str,
    strategy: str = "prism",
    k: int = 10,
    version: str | None = None,
    rerank: float = 0.0,
) -> list[dict[str, Any]]:
    """The k candidates of highest influence on a target, from the index of a feature version (default: today's).

    `rerank` scores so many times k rows again without the sketch (today's version only: it needs the model).

    Raises SettingsError for a strategy that has no direction, LakeError where the version has none, or no index, yet.
    """
    from prism_assets.selection.strategies import STRATEGIES

    known = [s.name for s in STRATEGIES.values() if s.needs_direction and s.name in (*settings.strategies, *COMPARED)]
    if strategy not in known:
        raise SettingsError(f"{strategy!r} is no strategy with a direction here; prism.yaml has {', '.join(known)}.")
    if rerank and version not in (None, feature_version(settings, lake, model)):
        raise SettingsError("Exact scores need the model of today's feature version: ask an older one without them.")
    inputs = selection_inputs(settings, lake, model, target, STRATEGIES[strategy], version)
    budget = Budget(kind="rows", amount=k)
    ranked = rank(settings, lake, model, store, STRATEGIES[strategy], inputs, budget, rerank, whole=False)
    columns = ["rank", "score", "id", "shard", "row", "source", "prompt", "completion"]
    return ranked.table.select(columns).to_pylist()


def rank(
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    store: VectorStore,
    strategy: "Strategy",
    inputs: dict[str, Artifact],
    budget: Budget,
    rerank: float = 0.0,
    representations: Representations | None = None,
    whole: bool = True,
) -> Ranked:
    """The top of a strategy's ranking within a budget. Refused rows are never returned.

    For strategies with one direction: the first `rerank` times the budget are ordered by exact scores; `whole` False
    asks the index for the top alone, where scores of all rows are neither noted nor remembered.
    """
    manifest = inputs["pool"]
    pool = LivePool(
        lake,
        manifest,
        seed=settings.selection.seed,
        wanted=_rows_to_ask(budget, manifest.notes),
        store=store,
        index=inputs.get("index"),
        targets=inputs.get("targets"),
        target_features=inputs.get("target_features"),
        direction_query=lambda: load_direction(lake, inputs["direction"])[0],
        target_scores=lambda: _target_scores(settings, lake, inputs),
        learning_rates=learning_rates(inputs["warmup"]) if "warmup" in inputs else (),
        representations=representations,
    )
    # A share counts every canonical row of the pool, rankable or not: all strategies get the same budget.
    counted = manifest.notes["canonical_rows"]
    if strategy.needs_direction:
        query, _ = load_direction(lake, inputs["direction"])
        exact = None
        if rerank:
            warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))

            def exact(positions: "np.ndarray") -> "np.ndarray":
                return exact_scores(settings, lake, model, warmup, inputs["direction"], pool, positions)

        table, scored = _top_by_score(pool, query, budget, counted, max(rerank, 1.0), exact, whole)
    else:
        table, scored = _top_by_order(pool, strategy, budget, counted)
    return Ranked(table, {**_counts(table), "pool_rows": counted, "refused_rows": pool.refused, **scored})


def _top_by_score(
    pool: LivePool,
    query: "np.ndarray",
    budget: Budget,
    counted: int,
    shortlist: float,
    exact: "Callable[[np.ndarray], np.ndarray] | None",
    whole: bool,
) -> "tuple[pa.Table, dict[str, Any]]":
    """Rows by descending score within the budget, reading only shards that have some; and what to note of the scores.

    `exact` gives the scores by which the first `shortlist` times the budget are ordered. `whole`: the scores of all rows
    are computed, remembered and noted; else the index is asked for the top alone.
    """
    import numpy as np

    from prism_assets.evaluation.metrics import score_histogram
    from prism_assets.selection.ranking import cut, ranking

    scores = pool.scores(query) if whole else None
    k = min(math.ceil(shortlist * pool.wanted), pool.size)
    while True:
        # All that tie with the k-th: where they are cut, ids decide.
        if scores is None:
            best, found = pool.top(query, k)
        else:
            best = np.flatnonzero(scores >= np.partition(scores, pool.size - k)[pool.size - k])
            found = scores[best]
        ordered_by = found if exact is None else exact(best)
        rows = pool.rows_at(best)
        order = ranking(ordered_by, rows["id"].to_pylist())
        tokens = rows["completion_tokens"].to_numpy()[order]
        taken = cut(tokens, kind=budget.kind, amount=budget.amount, pool_rows=counted)
        if budget.kind != "tokens" or taken < len(order) or len(order) >= pool.size:
            break
        k = min(2 * k, pool.size)
    order = order[:taken]
    selected = ordered_by[order]
    noted = {
        "non_positive_influence": int((selected <= 0).sum()),
        **({"score_histogram": score_histogram(scores, selected=taken)} if scores is not None else {}),
        "shortlist": len(best) if exact is not None else None,
    }
    return _selected_table(rows.take(order), selected), noted


def _top_by_order(
    pool: LivePool, strategy: "Strategy", budget: Budget, counted: int
) -> "tuple[pa.Table, dict[str, Any]]":
    """Rows in a strategy's own order within the budget."""
    from prism_assets.selection.ranking import cut

    while True:
        ranking = strategy.rank(pool)
        order = ranking.order
        if strategy.whole_pool:
            taken = len(order)
            break
        tokens = pool.completion_tokens[order]
        taken = cut(tokens, kind=budget.kind, amount=budget.amount, pool_rows=counted)
        if budget.kind != "tokens" or taken < len(order) or len(order) >= pool.size:
            break
        pool.wanted = min(2 * pool.wanted, pool.size)
    scores = None if ranking.scores is None else ranking.scores[:taken]
    return _selected_table(pool.rows_at(order[:taken]), scores), {"non_positive_influence": None}


def _rows_to_ask(budget: Budget, pool_notes: Mapping[str, Any]) -> int:
    """k of the first look: exact for rows and shares, an estimate from the mean length for tokens."""
    if budget.kind == "rows":
        return int(budget.amount)
    if budget.kind == "share":
        return max(1, round(budget.amount * pool_notes["canonical_rows"]))
    mean = pool_notes["completion_tokens"] / pool_notes["canonical_rows"]
    return int(budget.amount / mean * 1.5) + 16


def _selected_table(rows: "pa.Table", scores: "np.ndarray | None") -> "pa.Table":
    """Rows in ranking order with rank and score; `score` is null for a strategy that has none."""
    import numpy as np
    import pyarrow as pa

    score = pa.nulls(rows.num_rows, pa.float32()) if scores is None else pa.array(scores, pa.float32())
    table = rows.append_column("rank", pa.array(np.arange(1, rows.num_rows + 1), pa.int64()))
    table = table.append_column("score", score)
    first = ["rank", "score", "id", "shard", "row", "source"]
    return table.select([*first, *(name for name in table.column_names if name not in first)])


def _counts(table: "pa.Table") -> dict[str, Any]:
    sources: dict[str, int] = {}
    for source in table["source"].to_pylist():
        sources[source] = sources.get(source, 0) + 1
    return {
        "completion_tokens": sum(table["completion_tokens"].to_pylist()),
        "composition": dict(sorted(sources.items(), key=lambda item: (-item[1], item[0]))),
    }


def _write_json_lines(path: Path, table: "pa.Table") -> None:
    columns = ["rank", "score", "id", "shard", "source", "prompt", "completion", "messages"]
    with open(path, "w", encoding="utf-8") as handle:
        for row in table.select(columns).to_pylist():
            row["messages"] = json.loads(row["messages"])
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def json_lines_of(selection: Artifact) -> Path:
    """The JSON Lines file beside a selection's Parquet file."""
    return selection.path.with_suffix(".jsonl")


def _selection_outcome(lake: Lake, artifact: Artifact, pool: Artifact, strategy: str, computed: int) -> stage.Outcome:
    from prism_assets.evaluation import plots

    notes = artifact.notes
    non_positive = notes["non_positive_influence"]
    columns = ["rank", "score", "source", "prompt", "completion"]
    metadata: dict[str, Any] = {
        "dagster/row_count": notes["rows"],
        "completion_tokens": notes["completion_tokens"],
        "pool_rows": notes["pool_rows"],
        "composition": dg.MetadataValue.json(notes["composition"]),
        "sources": dg.MetadataValue.md(
            plots.as_markdown_image(
                plots.composition(pool.notes["sources"], {strategy: notes["composition"]}), "composition by source"
            )
        ),
        "json_lines": dg.MetadataValue.path(str(json_lines_of(artifact))),
        **stage.column_lineage(**{name: ("candidates", name) for name in COPIED}),
        "rows": stage.preview(lake.read_table(artifact, columns).slice(0, 8).to_pylist()),
    }
    if "score_histogram" in notes:
        image = plots.as_markdown_image(plots.score_histogram(notes["score_histogram"]), "influence scores")
        metadata["scores"] = dg.MetadataValue.md(image)
    return stage.Outcome(
        [artifact],
        computed,
        metadata,
        {
            "influence_positive": (
                not non_positive,
                {"non_positive": "this strategy has no influence scores" if non_positive is None else non_positive},
            )
        },
    )
