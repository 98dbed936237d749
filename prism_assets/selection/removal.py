"""Removal: the top of a ranking is taken out of a mixture, and the rest is what is fine-tuned on.

The target's pairs name the unwanted answer first (`features/target_anchors.py`), so that the rows of highest influence
are those predicted to raise its preference most: the repair of PRISM (arXiv 2605.21422).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import load_query
from prism_assets.selection.exact_scores import whole_scores
from prism_assets.selection.pool import Pool
from prism_assets.selection.ranking import TopRows, ranked_table, row_counts, top_of_ranking
from prism_assets.settings import Budget, Rerank
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.representations import Representations
    from prism_assets.selection.strategies import Strategy


class Divided(NamedTuple):
    """A mixture in two parts that have no row in common and hold every canonical row of it."""

    kept: TopRows
    removed: TopRows


def divide(
    stage: Stage,
    strategy: "Strategy",
    inputs: Mapping[str, Artifact],
    budget: Budget,
    *,
    rerank: Rerank,
    representations: "Representations",
    source: str | None,
    harmful: Mapping[str, bool] | None = None,
) -> Divided:
    """Take the top of a strategy's ranking out of a mixture (the rows of a source, or all).

    The tables are as a selection's with a column `reason`. A strategy that takes the whole pool removes nothing: it is
    the mixture as it is; one that goes by a label removes the rows that `harmful` names (id -> label), whatever the
    budget. Rows whose gradient was refused are not ranked, and kept.
    """
    import pyarrow as pa

    everything = Pool(stage, inputs["pool"], source=source)
    if strategy.by_label or strategy.whole_pool:
        named = harmful if strategy.by_label and harmful is not None else {}
        rows = everything.rows_at(_all(everything)).filter([named.get(one, False) for one in everything.ids])
        removed = TopRows(ranked_table(rows, None), {"non_positive_influence": None, "refused_rows": 0})
    else:
        removed = top_of_ranking(
            stage, strategy, inputs, budget, rerank=rerank, representations=representations, source=source
        )
    taken = removed.table.num_rows
    words = f"of {everything.canonical:,} rows by {strategy.name}"
    gone = _with_reason(
        removed.table,
        ["its label calls it harmful"] * taken
        if strategy.by_label
        else [f"rank {rank:,} {words}" for rank in removed.table["rank"].to_pylist()],
    )
    kept, ranks, scores = _rest(stage, strategy, inputs, everything, removed.table, source, rerank)
    reasons = [
        "nothing is removed" if strategy.whole_pool
        else "its label does not call it harmful" if strategy.by_label
        else f"not among the first {taken:,} {words}" if rank is None and strategy.rank is not None
        else "its gradient was refused, so it was not ranked" if rank is None
        else f"rank {rank:,} {words}"
        for rank in ranks
    ]  # fmt: skip
    table = ranked_table(kept, scores)
    table = table.set_column(0, "rank", pa.array(ranks, pa.int64()))
    notes = {
        **removed.notes,
        **row_counts(table),
        "removed_rows": taken,
        "removed_composition": row_counts(gone)["composition"],
        "pool_rows": everything.canonical,
    }
    gone_notes = {**row_counts(gone), "pool_rows": everything.canonical}
    return Divided(TopRows(_with_reason(table, reasons), notes), TopRows(gone, gone_notes))


def _all(pool: Pool) -> "np.ndarray":
    import numpy as np

    return np.arange(pool.size)


def _rest(
    stage: Stage,
    strategy: "Strategy",
    inputs: Mapping[str, Artifact],
    everything: Pool,
    removed: "pa.Table",
    source: str | None,
    rerank: Rerank,
) -> "tuple[pa.Table, list[int | None], np.ndarray | None]":
    """The rows that stay, with their ranks after the removed ones and their scores where the strategy has a direction:
    those that are ranked in order of rank, then the others."""
    import numpy as np

    from prism_assets.selection.ordering import order_by_score

    gone = set(removed["id"].to_pylist())
    left = np.array([position for position, name in enumerate(everything.ids) if name not in gone], dtype=np.int64)
    if not strategy.needs_direction:
        return everything.rows_at(left), [None] * len(left), None
    ranked = Pool(stage, inputs["pool"], inputs["index"], source)
    direction = inputs["direction"]
    exact = rerank == "all"
    found = whole_scores(ranked, direction) if exact else ranked.influence(load_query(stage.lake, direction))
    known = dict(zip(ranked.ids, found.tolist(), strict=True))
    names = [everything.ids[position] for position in left]
    scores = np.array([known.get(name, -np.inf) for name in names])
    order = order_by_score(scores, names)
    scores = scores[order]
    ranks = [len(gone) + place if np.isfinite(score) else None for place, score in enumerate(scores, start=1)]
    return everything.rows_at(left[order]), ranks, np.where(np.isfinite(scores), scores, np.nan)


def _with_reason(table: "pa.Table", reasons: list[str]) -> "pa.Table":
    import pyarrow as pa

    return table.append_column("reason", pa.array(reasons, pa.string()))
