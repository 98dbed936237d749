"""What a page shows of selected rows: the list that scripts search, the overlaps, the cuts and the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_assets.report.figures import Figure
from prism_assets.report.wording import count_text, figure_text, general


def rows_view(name: str, target: Mapping[str, Any]) -> dict[str, Any] | None:
    """The strategies and sources to choose from, and of which strategies not every row is listed; None where no row
    is."""
    listed = target.get("listed")
    if not listed or not listed["rows"]:
        return None
    rows = listed["rows"]
    here = {strategy: sum(strategy in row["taken"] for row in rows) for strategy in listed["totals"]}
    ending = ".removed.jsonl" if target.get("use") == "remove" else ".jsonl"
    return {
        "strategies": list(listed["totals"]),
        "sources": sorted({row["source"] for row in rows}),
        "number": count_text(len(rows)),
        "longest_text": count_text(listed["longest_text"]),
        "scored": any(taken[1] is not None for row in rows for taken in row["taken"].values()),
        "removes": target.get("use") == "remove",
        "more": [
            (strategy, count_text(here[strategy]), count_text(total), f"{name}/{strategy}{ending}")
            for strategy, total in listed["totals"].items()
            if here[strategy] < total
        ],
    }


def overlap_rows(target: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Two strategies and the numbers of rows that both took, that only the first and that only the second took."""
    return [
        (one["first"], one["second"], *(count_text(one[key]) for key in ("both", "only_first", "only_second")))
        for one in target.get("overlaps") or []
    ]


def cut_views(target: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows around each strategy's cut, as text: (taken or left, rank, score, source, prompt, completion)."""
    views = []
    for strategy, cut in (target.get("cuts") or {}).items():
        rows = [("taken", row) for row in cut["last"]] + [("left", row) for row in cut["left"]]
        if rows:
            views.append(
                {
                    "strategy": strategy,
                    "why_not": cut["why_not"],
                    "by_sketch": cut["left_by_sketch"],
                    "rows": [
                        (
                            side,
                            general(row["rank"]),
                            figure_text(row["score"], 4),
                            *(row[key] for key in ("source", "prompt", "completion")),
                        )
                        for side, row in rows
                    ],
                }
            )
    return views


def map_view(target: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is said of the map; None where there is none."""
    found = target.get("map")
    if not found:
        return None
    first, second = found["shares"]
    return {
        "points": count_text(len(found["points"])),
        "sampled": count_text(found["sampled"]),
        "pool": count_text(found["pool"]),
        "shares": (f"{first:.1%}", f"{second:.1%}"),
        "strategies": list(dict.fromkeys(name for point in found["points"] for name in point["taken"])),
    }


def page_data(target: Mapping[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """What report.js reads: the rows with short keys, as there are thousands, the points of the map and the charts."""
    listed, found = target.get("listed") or {"rows": []}, target.get("map") or {"points": []}
    return {
        "rows": [
            {"id": row["id"], "s": row["source"], "n": row["tokens"], "p": row["prompt"], "c": row["completion"],
             "t": row["taken"]}
            for row in listed["rows"]
        ],
        "map": [[one["x"], one["y"], one["source"], one["text"], one["taken"]] for one in found["points"]],
        "charts": {one.key: one.charts for one in figures},
    }  # fmt: skip
