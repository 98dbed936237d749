"""Selection: the preference-weighted target direction, and the top of each strategy's ranking within the budget."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version, shard_name
from prism_assets.features.assets import (
    GradientPass,
    IndexedShard,
    feature_version,
    gradient_pass,
    indexed_shards,
    read_blocks,
    segment_part,
    target_set,
)
from prism_assets.partitions import target_strategies_of, targets_of
from prism_assets.reference.assets import warmup_scope
from prism_assets.settings import Budget, Settings, SettingsError
from resources.lake import Artifact, Lake, Recipe, digest
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.strategies import Strategy, TargetScores

DIRECTION_VERSION = 1
SELECTION_VERSION = 1

GROUP = "selection"

# What is always measured beside what the settings ask for: the two directions that the report compares.
_COMPARED = ("prism", "uniform")


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


class _Inputs(NamedTuple):
    """What the directions of one target are made from."""

    name: str
    version: str
    features: Artifact
    targets: Artifact
    eval_examples: Artifact
    warmup: Artifact


def _target_outcome(
    context: dg.AssetExecutionContext, settings: Settings, lake: Lake, work: GradientPass, warmup: Artifact, name: str
) -> stage.Outcome:
    from prism_assets.selection.strategies import STRATEGIES

    version = feature_version(settings, lake, work.model)
    corpus = corpus_version(settings, work.model)
    inputs = _Inputs(
        name,
        version,
        lake.require("target_features", name, version),
        lake.require("targets", name, corpus),
        lake.require("eval_examples", name, corpus),
        warmup,
    )
    wanted = [s for s in STRATEGIES.values() if s.needs_direction and (s.name in settings.strategies or s.name in _COMPARED)]
    computed = 0
    directions = {}
    for strategy in wanted:
        directions[strategy.name], made = _publish_direction(context, settings, lake, work, inputs, strategy)
        computed += made
    weights, made = _publish_weights(context, settings, lake, work, inputs, directions)
    computed += made
    for strategy, artifact in directions.items():
        lake.point(artifact, name, direction_scope(version, strategy), context.run_id)
    lake.point(weights, name, version, context.run_id)
    return _direction_outcome(settings, lake, [*directions.values(), weights], weights, computed)


def _temperature(settings: Settings, features: "pa.Table", pairs: bool) -> float:
    import numpy as np

    from prism_assets.selection.preference import default_temperature

    if settings.preference.temperature is not None:
        return settings.preference.temperature
    return default_temperature("pairs" if pairs else "plain", np.array(features["base_score"].to_pylist()))


def _scores_of(settings: Settings, features: "pa.Table", pairs: bool) -> "tuple[TargetScores, np.ndarray]":
    """What a weighting may look at, over the usable targets, and the positions [m'] of these."""
    import numpy as np

    from prism_assets.selection.strategies import TargetScores

    usable = np.array([reason is None for reason in features["refused"].to_pylist()])
    positions = np.flatnonzero(usable)
    rows = features.take(positions)
    return (
        TargetScores(
            np.array(rows["score"].to_pylist()).T,
            np.array(rows["norm"].to_pylist()).T,
            "pairs" if pairs else "plain",
            _temperature(settings, rows, pairs),
        ),
        positions,
    )


def _publish_direction(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: _Inputs,
    strategy: "Strategy",
) -> tuple[Artifact, int]:
    """t per checkpoint (unsketched, fp32), its sketch and norm, and the query, as one safetensors file."""
    import torch

    from prism_assets.selection.direction import norm, query_vector, target_vector

    table = lake.read_table(inputs.targets)
    scores, usable = _scores_of(settings, lake.read_table(inputs.features), target_set(table).pairs)
    weights = strategy.weigh(scores)
    recipe = Recipe(
        "target_directions",
        DIRECTION_VERSION,
        {"weights": digest(weights.tolist())},
        {"targets": inputs.targets, "features": inputs.features, "warmup": inputs.warmup},
        partition=inputs.name,
        version=inputs.version,
    )
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    # Refused targets are left out, not weighted with zero: zero times NaN is NaN.
    chosen = target_set(table.take(usable))
    tensors: dict[str, torch.Tensor] = {}
    sketches, norms = [], []
    for position, checkpoint in enumerate(work.checkpoints):
        engine = work.at(checkpoint)
        vector = target_vector(engine, chosen, weights[position])
        norms.append(norm(vector))
        sketches.append(work.projection(engine).sketch_vector(vector).cpu().numpy())
        tensors |= {f"t/{position}/{name}": tensor.float() for name, tensor in vector.items()}
    rates = [checkpoint.mean_learning_rate for checkpoint in work.checkpoints]
    tensors["query"] = torch.from_numpy(query_vector(sketches, norms, rates))
    tensors["norms"] = torch.tensor(norms, dtype=torch.float64)
    return lake.publish_tensors(recipe, tensors, run_id=context.run_id, notes={"strategy": strategy.name}), 1


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
    inputs: _Inputs,
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
    scores, usable = _scores_of(settings, features, chosen.pairs)
    recipe = Recipe(
        "target_weights",
        DIRECTION_VERSION,
        {"temperature": scores.temperature, "probe_step": settings.preference.probe_step},
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
    """Smallest Spearman correlation between the weights of the last checkpoint and those of another; None for one."""
    import numpy as np

    if len(weights) < 2 or len(weights[0]) < 2:
        return None
    ranks = [np.argsort(np.argsort(one)) for one in weights]
    return float(min(np.corrcoef(ranks[-1], other)[0, 1] for other in ranks[:-1]))


def _first_order(
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: _Inputs,
    directions: Mapping[str, Artifact],
    scores: "TargetScores",
    usable: "np.ndarray",
) -> dict[str, Any]:
    """Predicted and measured gains of one small step, the same length for each direction, at the last checkpoint.

    The length is the one at which J is predicted to rise by the share `preference.probe_step` along PRISM.
    """
    import numpy as np

    from prism_assets.selection.direction import TargetSet, first_order_gain, norm
    from prism_assets.selection.preference import preference_weights

    table = lake.read_table(inputs.targets).take(usable)
    chosen = target_set(table)
    held_out: TargetSet = target_set(lake.read_table(inputs.eval_examples))
    held_out_examples = held_out.examples[: held_out.size]
    engine = work.at(work.checkpoints[-1])

    def preference(values: "np.ndarray") -> Any:
        return preference_weights(values, scores.kind, scores.temperature)

    now = preference(chosen.scores(engine.mean_log_probs(chosen.examples)))
    before = (now.objective, float(np.mean(engine.mean_log_probs(held_out_examples))))
    vectors = {name: load_direction(lake, directions[name])[1][-1] for name in _COMPARED}
    z = float(np.exp(now.log_z))
    gradient = {name: tensor * z for name, tensor in vectors["prism"].items()}
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


# -- selection ---------------------------------------------------------------------------------------------------


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

        def select(key: str) -> stage.Outcome:
            target, strategy = split_key(key)
            artifact, computed = _publish_selection(
                context.run_id, settings, lake, language_model, vector_store, target, strategy
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


def _publish_selection(
    run_id: str,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    store: VectorStore,
    target: str,
    name: str,
) -> tuple[Artifact, int]:
    from prism_assets.selection.strategies import STRATEGIES

    strategy = STRATEGIES[name]
    corpus = corpus_version(settings, model)
    pool = lake.require("live_pool", None, corpus)
    identity: dict[str, Any] = {"strategy": name, "budget": settings.selection.budget.model_dump()}
    inputs: dict[str, Any] = {"pool": pool}
    version = corpus
    if strategy.needs_direction:
        version = feature_version(settings, lake, model)
        inputs["index"] = lake.require("candidate_index", None, version)
        inputs["direction"] = lake.require("target_directions", target, direction_scope(version, name))
        # The pool that the index was reconciled with, so that a query never mixes two states.
        inputs["pool"] = lake.get("live_pool", inputs["index"].notes["pool"]) or pool
    else:
        identity["seed"] = settings.selection.seed
    recipe = Recipe(
        "selection", SELECTION_VERSION, identity, inputs, partition=join_key(target, name), version=version
    )
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    if strategy.needs_direction:
        query, _ = load_direction(lake, inputs["direction"])
        ranked = rank_by_direction(lake, store, inputs["index"], inputs["pool"], query, settings.selection.budget)
    else:
        ranked = rank_by_order(lake, inputs["pool"], strategy, settings)
    return (
        lake.publish_table(
            recipe,
            ranked.table,
            run_id=run_id,
            notes=ranked.notes,
            attachments={".jsonl": lambda path: _write_json_lines(path, ranked.table)},
        ),
        1,
    )


def _allowed_rows(lake: Lake, pool: Artifact) -> "dict[str, np.ndarray]":
    """Per shard the mask [n] of canonical rows."""
    import numpy as np

    masks = {}
    for row in lake.read_table(pool).to_pylist():
        masks[row["shard"]] = mask = np.ones(row["rows"], dtype=bool)
        mask[row["excluded_rows"]] = False
    return masks


def _candidates_of(lake: Lake, pool: Artifact) -> dict[str, str]:
    """The fingerprint of each shard's candidates in a pool."""
    columns = lake.read_table(pool, ["shard", "candidates_fingerprint"]).to_pydict()
    return dict(zip(columns["shard"], columns["candidates_fingerprint"], strict=True))


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
) -> list[dict[str, Any]]:
    """The k candidates of highest influence on a target, from the index of a feature version (default: today's).

    Raises SettingsError for a strategy that has no direction, LakeError where the version has none, or no index, yet.
    """
    from prism_assets.selection.strategies import STRATEGIES

    known = [s.name for s in STRATEGIES.values() if s.needs_direction and s.name in (*settings.strategies, *_COMPARED)]
    if strategy not in known:
        raise SettingsError(f"{strategy!r} is no strategy with a direction here; prism.yaml has {', '.join(known)}.")
    version = version or feature_version(settings, lake, model)
    index = lake.require("candidate_index", None, version)
    direction = lake.require("target_directions", target, direction_scope(version, strategy))
    pool = lake.get("live_pool", index.notes["pool"])
    query, _ = load_direction(lake, direction)
    ranked = rank_by_direction(lake, store, index, pool, query, Budget(kind="rows", amount=k))
    columns = ["rank", "score", "id", "shard", "row", "source", "prompt", "completion"]
    return ranked.table.select(columns).to_pylist()


def rank_by_direction(
    lake: Lake, store: VectorStore, index: Artifact, pool: Artifact, query: "np.ndarray", budget: Budget
) -> Ranked:
    """The top of the index for a query within a budget. Refused rows are never returned."""
    import numpy as np

    from prism_assets.evaluation.metrics import score_histogram
    from prism_assets.selection.strategies import cut, ranking

    canonical = _allowed_rows(lake, pool)
    segments = [one for one in indexed_shards(lake, index) if one.shard in canonical]
    usable = [_usable_rows(lake, one) for one in segments]
    allowed = [canonical[one.shard] & mask for one, mask in zip(segments, usable, strict=True)]
    pool_rows = int(sum(mask.sum() for mask in allowed))
    if not pool_rows:
        raise dg.Failure("No candidate of the live pool has usable features.")
    # Over all allowed rows, in order of segment and row: score, segment, row.
    scores = np.concatenate(
        [one[mask] for one, mask in zip(_segment_scores(lake, store, segments, query), allowed, strict=True)]
    )
    segment_of = np.repeat(np.arange(len(segments)), [mask.sum() for mask in allowed])
    row_of = np.concatenate([np.flatnonzero(mask) for mask in allowed])
    # A share counts every canonical row of the pool, rankable or not: all strategies get the same budget.
    counted = pool.notes["canonical_rows"]
    k = min(_rows_to_ask(budget, pool.notes), pool_rows)
    while True:
        # All that tie with the k-th: where they are cut, ids decide.
        best = np.flatnonzero(scores >= np.partition(scores, pool_rows - k)[pool_rows - k])
        places = [(segments[s].shard, int(r)) for s, r in zip(segment_of[best], row_of[best], strict=True)]
        rows = _rows_at(lake, pool, places)
        order = ranking(scores[best], rows["id"].to_pylist())
        tokens = rows["completion_tokens"].to_numpy()[order]
        taken = cut(tokens, kind=budget.kind, amount=budget.amount, pool_rows=counted)
        if budget.kind != "tokens" or taken < len(order) or len(order) >= pool_rows:
            break
        k = min(2 * k, pool_rows)
    order = order[:taken]
    selected = scores[best][order]
    table = _selected_table(rows.take(order), selected)
    return Ranked(
        table,
        {
            **_counts(table),
            "pool_rows": counted,
            "refused_rows": sum(
                int((canonical[one.shard] & ~mask).sum()) for one, mask in zip(segments, usable, strict=True)
            ),
            "non_positive_influence": int((selected <= 0).sum()),
            "score_histogram": score_histogram(scores, selected=taken),
        },
    )


def _usable_rows(lake: Lake, segment: IndexedShard) -> "np.ndarray":
    """The mask [n] of the rows of an index segment whose gradient was not refused."""
    import numpy as np

    features = lake.get("candidate_features", segment.features)
    if features is None:
        raise dg.Failure(
            f"Shard {segment.shard} lost its features: materialise candidate_features[{segment.shard}] and "
            "candidate_index again."
        )
    if not features.notes["refused"]:
        return np.ones(segment.rows, dtype=bool)
    return np.array([reason is None for reason in read_blocks(lake, features, ["refused"])["refused"].to_pylist()])


def _segment_scores(
    lake: Lake, store: VectorStore, segments: Sequence[IndexedShard], query: "np.ndarray"
) -> "list[np.ndarray]":
    """Scores float32 [n] of every row of each segment. A score that was computed once is remembered: it depends on the
    row and the query alone, so a shard that arrives costs the scan of its own segment and no other."""
    import numpy as np

    asked = f"scores/{hashlib.sha256(query.astype(np.float32).tobytes()).hexdigest()[:32]}"
    names = [f"{asked}/{one.features}" for one in segments]
    remembered = [lake.recall(name) for name in names]
    scores = [
        np.frombuffer(data, np.float32) if data is not None and len(data) == 4 * one.rows else None
        for one, data in zip(segments, remembered, strict=True)
    ]
    new = [position for position, one in enumerate(scores) if one is None]
    parts = [segment_part(lake, segments[position]) for position in new]
    for position, computed in zip(new, store.open(parts).scores(query) if parts else [], strict=True):
        scores[position] = computed
        lake.remember(names[position], computed.tobytes())
    return scores


def _rows_to_ask(budget: Budget, pool_notes: Mapping[str, Any]) -> int:
    """k of the first look: exact for rows and shares, an estimate from the mean length for tokens."""
    if budget.kind == "rows":
        return int(budget.amount)
    if budget.kind == "share":
        return max(1, round(budget.amount * pool_notes["canonical_rows"]))
    mean = pool_notes["completion_tokens"] / pool_notes["canonical_rows"]
    return int(budget.amount / mean * 1.5) + 16


def rank_by_order(lake: Lake, pool: Artifact, strategy: "Strategy", settings: Settings) -> Ranked:
    """The top of a pool strategy's order over the canonical live rows."""
    import numpy as np

    from prism_assets.selection.strategies import cut, ranking

    budget = settings.selection.budget
    fingerprints = _candidates_of(lake, pool)
    places, ids, tokens = [], [], []
    for shard, mask in _allowed_rows(lake, pool).items():
        rows = lake.read_table(lake.get("candidates", fingerprints[shard]), ["id", "completion_tokens"])
        kept = np.flatnonzero(mask)
        places += [(shard, position) for position in kept.tolist()]
        ids += rows["id"].take(kept).to_pylist()
        tokens.append(rows["completion_tokens"].to_numpy()[kept])
    keys = strategy.order(ids, settings.selection.seed)
    order = ranking(keys, ids)
    taken = len(order) if strategy.whole_pool else cut(
        np.concatenate(tokens)[order], kind=budget.kind, amount=budget.amount, pool_rows=len(ids)
    )  # fmt: skip
    rows = _rows_at(lake, pool, [places[position] for position in order[:taken]])
    table = _selected_table(rows, None)
    return Ranked(table, {**_counts(table), "pool_rows": len(ids), "refused_rows": 0, "non_positive_influence": None})


def _rows_at(lake: Lake, pool: Artifact, places: list[tuple[str, int]]) -> "pa.Table":
    """The candidates at (shard, row) in this order, with their shard and row."""
    import numpy as np
    import pyarrow as pa

    fingerprints = _candidates_of(lake, pool)
    by_shard: dict[str, list[int]] = {}
    for position, (shard, _) in enumerate(places):
        by_shard.setdefault(shard, []).append(position)
    parts, positions = [], []
    for shard, its_positions in by_shard.items():
        rows = lake.read_table(lake.get("candidates", fingerprints[shard]), _COPIED)
        parts.append(rows.take([places[position][1] for position in its_positions]))
        positions += its_positions
    table = pa.concat_tables(parts).take(np.argsort(positions))
    shards = [shard for shard, _ in places]
    sources = [source or shard_name(shard) for source, shard in zip(table["source"].to_pylist(), shards, strict=True)]
    table = table.set_column(table.column_names.index("source"), "source", pa.array(sources, pa.string()))
    table = table.append_column("shard", pa.array(shards, pa.string()))
    return table.append_column("row", pa.array([row for _, row in places], pa.int64()))


# Columns of a selection that are those of its candidates.
_COPIED = ("id", "record_id", "source", "prompt", "completion", "messages", "completion_tokens", "input_ids", "loss_mask")


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
        **stage.column_lineage(**{name: ("candidates", name) for name in _COPIED}),
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
