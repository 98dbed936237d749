"""The one place where a ranking is made: a strategy's order over the pool, cut by the budget."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import load_query
from prism_assets.selection.exact_scores import exact_scores, known_scores, whole_scores
from prism_assets.selection.strategy_pool import StrategyPool
from prism_assets.settings import Budget, Rerank
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.representations import Representations
    from prism_assets.selection.strategies import Strategy
    from prism_assets.selection.strategies.base import PoolView


class TopRows(NamedTuple):
    """The top of a ranking."""

    table: "pa.Table"  # rank, score, id, shard, row, source, prompt, completion, messages, completion_tokens
    notes: dict[str, Any]


def top_of_ranking(
    stage: Stage,
    strategy: "Strategy",
    inputs: Mapping[str, Artifact],
    budget: Budget,
    *,
    rerank: "Rerank" = 0.0,
    representations: "Representations | None" = None,
    whole: bool = True,
    source: str | None = None,
    reverse: bool = False,
) -> TopRows:
    """The top of a strategy's ranking within a budget, over the rows of a source where one is named. Refused rows are
    never returned. `reverse` ranks by the opposite of a direction.

    For strategies with one direction: the first `rerank` times the budget are ordered by exact scores, or `all` rows;
    `whole` False asks the index for the top alone, where scores of all rows are neither noted nor remembered, and takes
    exact scores of all rows where they are known.
    """
    manifest = inputs["pool"]
    pool = StrategyPool(stage, inputs, 0, representations, source)
    # A share counts every canonical row of the pool, rankable or not: all strategies get the same budget.
    counted = pool.canonical
    pool.wanted = _rows_to_ask(budget, counted, manifest.notes)
    if strategy.needs_direction:
        query = load_query(stage.lake, inputs["direction"])
        query = -query if reverse else query
        sign = -1 if reverse else 1
        scores, shortlist, exact = None, 1.0, None
        if rerank == "all":
            scores = (whole_scores if whole else known_scores)(pool, inputs["direction"])
            scores = scores if scores is None else sign * scores
        elif rerank:
            shortlist = max(rerank, 1.0)
            exact = lambda positions: sign * exact_scores(pool, inputs["direction"], positions)  # noqa: E731
        table, scored = _top_by_score(pool, query, budget, counted, shortlist, exact, whole, scores)
    else:
        table, scored = _top_by_order(pool, strategy, budget, counted)
    return TopRows(table, {**row_counts(table), "pool_rows": counted, "refused_rows": pool.refused, **scored})


def _top_by_score(
    pool: StrategyPool,
    query: "np.ndarray",
    budget: Budget,
    counted: int,
    shortlist: float,
    exact: "Callable[[np.ndarray], np.ndarray] | None",
    whole: bool,
    known: "np.ndarray | None",
) -> "tuple[pa.Table, dict[str, Any]]":
    """Rows by descending score within the budget, reading only shards that have some; and what to note of the scores.

    `exact` gives the scores by which the first `shortlist` times the budget are ordered. `whole`: the scores of all
    rows are computed, remembered and noted; else the index is asked for the top alone. `known`: the exact scores of all
    rows, which are ordered by nothing else.
    """
    import numpy as np

    from prism_assets.selection.histogram import score_histogram
    from prism_assets.selection.ordering import cut, order_by_score
    from prism_assets.selection.sketch_noise import sketch_noise

    # The index knows unit rows alone.
    sketched = known is None and (whole or pool.stage.settings.selection.row_scale != "unit")
    scores = pool.influence(query) if sketched else known
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
        order = order_by_score(ordered_by, rows["id"].to_pylist())
        tokens = rows["completion_tokens"].to_numpy()[order]
        taken = cut(tokens, kind=budget.kind, amount=budget.amount, pool_rows=counted)
        if budget.kind != "tokens" or taken < len(order) or len(order) >= pool.size:
            break
        k = min(2 * k, pool.size)
    order = order[:taken]
    selected = ordered_by[order]
    dim = pool.stage.settings.features.sketch_dim
    noted = {
        **(
            {"sketch_noise": sketch_noise(scores, query, dim).as_notes()}
            if sketched and scores is not None and dim != "exact" and pool.stage.settings.selection.row_scale == "unit"
            else {}
        ),
        "non_positive_influence": int((selected <= 0).sum()),
        **({"score_histogram": score_histogram(scores, selected=taken)} if scores is not None else {}),
        "shortlist": pool.size if known is not None else len(best) if exact is not None else None,
    }
    return ranked_table(rows.take(order), selected), noted


def _top_by_order(
    pool: StrategyPool, strategy: "Strategy", budget: Budget, counted: int
) -> "tuple[pa.Table, dict[str, Any]]":
    """Rows in a strategy's own order within the budget."""
    from prism_assets.selection.ordering import cut

    assert strategy.rank is not None
    seen = cast("PoolView", pool)  # to the type checker a cached property is no attribute
    while True:
        ranking = strategy.rank(seen)
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
    return ranked_table(pool.rows_at(order[:taken]), scores), {"non_positive_influence": None}


def _rows_to_ask(budget: Budget, counted: int, pool_notes: Mapping[str, Any]) -> int:
    """k of the first look: exact for rows and shares, an estimate from the mean length for tokens."""
    if budget.kind == "rows":
        return int(budget.amount)
    if budget.kind == "share":
        return max(1, round(budget.amount * counted))
    mean = pool_notes["completion_tokens"] / pool_notes["canonical_rows"]
    return int(budget.amount / mean * 1.5) + 16


def ranked_table(rows: "pa.Table", scores: "np.ndarray | None") -> "pa.Table":
    """Rows in ranking order with rank and score; `score` is null for a strategy that has none, and where it is NaN."""
    import numpy as np
    import pyarrow as pa

    score = pa.nulls(rows.num_rows, pa.float32())
    if scores is not None:
        score = pa.array(scores, pa.float32(), from_pandas=True)
    table = rows.append_column("rank", pa.array(np.arange(1, rows.num_rows + 1), pa.int64()))
    table = table.append_column("score", score)
    first = ["rank", "score", "id", "shard", "row", "source"]
    return table.select([*first, *(name for name in table.column_names if name not in first)])


def row_counts(table: "pa.Table") -> dict[str, Any]:
    """Completion tokens of a selection's rows, and how many rows each source has."""
    sources: dict[str, int] = {}
    for source in table["source"].to_pylist():
        sources[source] = sources.get(source, 0) + 1
    return {
        "completion_tokens": sum(table["completion_tokens"].to_pylist()),
        "composition": dict(sorted(sources.items(), key=lambda item: (-item[1], item[0]))),
    }
