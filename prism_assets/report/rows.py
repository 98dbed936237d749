"""The selected rows that a report lists, how much two strategies have in common, and the rows around each cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import LakeError
from prism_assets.identity import join_key
from prism_assets.report.wording import as_number, clipped
from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import load_query
from prism_assets.selection.exact_scores import known_scores
from prism_assets.selection.pool import Pool
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

# Bounds of a page: a browser searches so many rows at once, and a page of one target stays below some megabytes.
MOST_ROWS = 4000  # of all strategies of a target together
LONGEST_TEXT = 500  # characters of a prompt or completion
AROUND = 5  # rows to each side of a cut

_TEXTS = ("rank", "score", "id", "source", "prompt", "completion", "completion_tokens")


class Taken(NamedTuple):
    """What one strategy took from the top of its ranking."""

    strategy: str
    selection: Artifact  # what is fine-tuned on
    rows: Artifact  # the selected rows; of a removal those that were removed
    pool: Pool | None  # the pool that was ranked by gradients; None where it was not, or is not there any more

    @property
    def removes(self) -> bool:
        return self.rows.fingerprint != self.selection.fingerprint


def taken_rows(stage: Stage, target: str, strategy: str) -> Artifact:
    """The rows from the top of a strategy's ranking: the selected ones, or those that were removed."""
    table = "removed" if stage.settings.targets[target].use == "remove" else "selection"
    return stage.shown(table, join_key(target, strategy))


def taken_by_all(stage: Stage, target: str) -> list[Taken]:
    """What the settings' strategies took, each with the pool that its selection was made from."""
    mixture = stage.settings.targets[target].mixture

    @cache
    def pool_of(manifest: str, index: str) -> Pool | None:
        pool, segments = stage.lake.get("live_pool", manifest), stage.lake.get("candidate_index", index)
        if pool is None or segments is None:
            return None
        try:
            return Pool(stage, pool, segments, mixture)
        except LakeError:  # of an earlier index something may be cleared away by now
            return None

    taken = []
    for strategy in stage.settings.strategies:
        selection = stage.shown("selection", join_key(target, strategy))
        inputs = selection.header["inputs"]
        known = "index" in inputs and "pool" in inputs
        pool = pool_of(inputs["pool"]["fingerprint"], inputs["index"]["fingerprint"]) if known else None
        taken.append(Taken(strategy, selection, taken_rows(stage, target, strategy), pool))
    return taken


# -- the list -----------------------------------------------------------------------------------------------------


def listed_rows(stage: Stage, taken: Sequence[Taken]) -> dict[str, Any]:
    """The first rows of every strategy's ranking, each row once, with its rank and score under every strategy that took
    it.

    At most `MOST_ROWS`, shared evenly by the strategies; how many each took is said beside them.
    """
    each = MOST_ROWS // max(len(taken), 1)
    rows: dict[str, dict[str, Any]] = {}
    for one in taken:
        for row in stage.lake.read_first(one.rows, each, _TEXTS).to_pylist():
            rows.setdefault(row["id"], {**_shown(row), "tokens": row["completion_tokens"], "taken": {}})
    totals = {}
    for one in taken:
        table = stage.lake.read_table(one.rows, ["id", "rank", "score"])
        totals[one.strategy] = table.num_rows
        for row in (row for row in table.to_pylist() if row["id"] in rows):
            rows[row["id"]]["taken"][one.strategy] = [row["rank"], as_number(row["score"])]
    return {"longest_text": LONGEST_TEXT, "totals": totals, "rows": list(rows.values())}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: clipped(row[name], LONGEST_TEXT) for name in ("prompt", "completion")}
    return {"id": row["id"], "source": row["source"] or "no source", **texts}


def overlaps(stage: Stage, taken: Sequence[Taken]) -> list[dict[str, Any]]:
    """How many rows each two strategies both took, and how many only one of them; of all rows, listed or not."""
    ids = {one.strategy: set(stage.lake.read_table(one.rows, ["id"])["id"].to_pylist()) for one in taken}
    return [
        {
            "first": first,
            "second": second,
            "both": len(ids[first] & ids[second]),
            "only_first": len(ids[first] - ids[second]),
            "only_second": len(ids[second] - ids[first]),
        }
        for first, second in combinations(ids, 2)
    ]


# -- the cut ------------------------------------------------------------------------------------------------------


def around_the_cut(stage: Stage, one: Taken) -> dict[str, Any]:
    """The last rows that a strategy took and the first that it left, with ranks and scores.

    `left` is empty, and `why_not` says why, where the ranking beyond the cut is not known. Under exact scores the rows
    left have scores of the sketch alone: `left_by_sketch`.
    """
    table = stage.lake.read_table(one.rows, list(_TEXTS))
    last = table.slice(max(table.num_rows - AROUND, 0)).to_pylist()
    inputs, settings = one.selection.header["inputs"], one.selection.header["settings"]
    left, by_sketch, why_not = [], bool(settings.get("rerank")), "no ranked row was left"
    if one.removes:
        kept = stage.lake.read_first(one.selection, AROUND, _TEXTS).to_pylist()
        left = [row for row in kept if row["rank"] is not None]
    elif one.pool is not None and "direction" in inputs:
        exact = _exact_scores(stage, one, one.pool) if settings.get("rerank") == "all" else None
        by_sketch = by_sketch and exact is None
        left = _first_left(stage, one, one.pool, exact)
    if "direction" not in inputs:
        why_not = "what this strategy ranks below its cut is not kept"
    elif one.pool is None:
        why_not = "the index that it was made from is not there any more"
    return {
        "last": [_of_the_cut(row) for row in last],
        "left": [_of_the_cut(row) for row in left],
        "left_by_sketch": bool(left and by_sketch),
        "why_not": None if left else why_not,
    }


def _of_the_cut(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": row["rank"], "score": as_number(row["score"]), **_shown(row)}


def _direction(stage: Stage, one: Taken) -> Artifact | None:
    return stage.lake.get("target_directions", one.selection.header["inputs"]["direction"]["fingerprint"])


def _exact_scores(stage: Stage, one: Taken, pool: Pool) -> np.ndarray | None:
    """The exact scores of all rows; None where they are not known without the model."""
    direction = _direction(stage, one)
    return None if direction is None else known_scores(pool, direction)


def _first_left(stage: Stage, one: Taken, pool: Pool, exact: np.ndarray | None) -> list[dict[str, Any]]:
    """The rows of highest score among those that a direction's selection left; ties by id, as in the ranking. Without
    exact scores by those of the sketch."""
    import numpy as np

    from prism_assets.selection.ordering import order_by_score

    direction = _direction(stage, one)
    if direction is None:
        return []
    scores = pool.influence(load_query(stage.lake, direction)) if exact is None else exact
    left = np.setdiff1d(np.arange(pool.size), positions_of(stage, one, pool))
    if not len(left):
        return []
    count = min(AROUND, len(left))
    left = left[scores[left] >= np.partition(scores[left], -count)[-count]]  # with all that tie with the last
    rows = pool.rows_at(left, ("id", "source", "prompt", "completion")).to_pylist()
    order = order_by_score(scores[left], [row["id"] for row in rows])[:count]
    first = one.selection.notes["rows"] + 1
    return [{**rows[at], "score": scores[left[at]].item(), "rank": first + place} for place, at in enumerate(order)]


def positions_of(stage: Stage, one: Taken, pool: Pool) -> np.ndarray:
    """The positions in a pool of the rows that a strategy took, best first, int64 [k]; those it does not rank are left
    out."""
    table = stage.lake.read_table(one.rows, ["shard", "row"])
    found = pool.positions(table["shard"].to_pylist(), table["row"].to_pylist())
    return found[found >= 0]
