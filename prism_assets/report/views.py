"""What the sections of a target show, as text and plain data, from its entry in report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_assets.report.comparison import Cell, benchmark_metrics, benchmark_text, metric_rows
from prism_assets.report.figures import figures_of
from prism_assets.report.headline import headline
from prism_assets.report.rows_view import cut_views, map_view, overlap_rows, page_data, rows_view
from prism_assets.report.verdict import verdict_sentences
from prism_assets.report.wording import (
    MISSING,
    as_number,
    clipped,
    count_text,
    figure_text,
    general,
    mean_of,
    mixture_text,
    signed,
)

_SHOWN_WEIGHTS = 200
_SHOWN_EXAMPLES = 10
_LONGEST_TEXT = 1500
_TRUST_MARKS = {True: "holds", False: "does not hold", None: "not measured"}


def target_view(anchor: str, name: str, target: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    pool, direction = target.get("pool") or {}, target.get("direction") or {}
    records = target.get("records") or {}
    facts = [
        (
            "Target examples",
            count_text(target.get("number_of_targets")),
            ", ".join(filter(None, ["pairs" if target.get("kind") == "pairs" else "plain", _lost(records, "targets")])),
        ),
        ("Held-out records", count_text(target.get("number_of_eval")), _lost(records, "eval_examples")),
        ("Pool", count_text(pool.get("rows")), "rows"),
        ("Canonical", count_text(pool.get("canonical")), "rows, each content once"),
    ]
    if target.get("use") == "remove":
        facts += [("Mixture", count_text(target.get("mixture_rows")), f"rows, {mixture_text(target)}")]
        facts += [
            (f"Removed by {strategy}", count_text(entry.get("removed_rows")), _sources_text(entry))
            for strategy, entry in target["strategies"].items()
        ]
    figures = figures_of(anchor, target)
    return {
        "anchor": anchor,
        "name": name,
        "headline": headline(name, target),
        "selected": rows_view(name, target),
        "overlaps": overlap_rows(target),
        "cuts": cut_views(target),
        "map": map_view(target),
        "data": page_data(target, figures),
        "facts": [fact for fact in facts if fact[1] != MISSING],
        "rows": metric_rows(target, metrics),
        "benchmarks": _benchmarks_view(target),
        "verdicts": verdict_sentences(target),
        "plots": figures,
        "direction": _direction_view(direction),
        "weights": _weights_view(target),
        "composition": _composition_view(target),
        "examples": _example_groups(target["strategies"]),
        "explanations": [_explanation_view(one) for one in target.get("explanations") or []],
        "trust": [(_TRUST_MARKS[one["passed"]], one["question"], one["sentence"]) for one in target.get("trust") or []],
        "files": [
            (strategy, label, str(entry[key]))
            for strategy, entry in target["strategies"].items()
            for key, label in (
                ("selected", "Parquet"),
                ("selected_jsonl", "JSON Lines"),
                ("removed", "removed rows, Parquet"),
                ("removed_jsonl", "removed rows, JSON Lines"),
                ("adapter", "adapter"),
            )
            if entry.get(key)
        ],
    }


def _sources_text(entry: Mapping[str, Any]) -> str:
    """`12 web, 3 code`: how many of the removed rows are of each source."""
    return ", ".join(f"{count} {source}" for source, count in (entry.get("removed_composition") or {}).items())


def _direction_view(direction: Mapping[str, Any]) -> dict[str, Any]:
    effective, first_order = (
        direction.get("effective_number_of_targets") or {},
        direction.get("first_order") or {},
    )
    rows = []
    for name in dict.fromkeys([*effective, *(key for key, value in first_order.items() if isinstance(value, Mapping))]):
        step = first_order.get(name) or {}
        keys = ("predicted", "measured", "held_out_mean_log_prob")
        rows.append((name, figure_text(effective.get(name), 1), *(signed(step.get(key)) for key in keys)))
    facts = [
        ("temperature τ", general(direction.get("temperature"))),
        ("log Z", general(direction.get("log_z"))),
        ("warm-up checkpoints", general(direction.get("checkpoints"))),
        ("length of the step", general(first_order.get("step"))),
    ]
    return {"rows": rows, "facts": [fact for fact in facts if fact[1] != MISSING]}


def _weights_view(target: Mapping[str, Any]) -> dict[str, Any]:
    """The target examples by weight, highest first, with what they are compared with; at most `_SHOWN_WEIGHTS`."""
    weights = (target.get("direction") or {}).get("weights") or []
    ordered = sorted(weights, key=lambda row: -(as_number(row.get("prism")) or 0.0))
    kinds = ", ".join(f"{count_text(count)} {kind}" for kind, count in (target.get("anchors") or {}).items())
    return {
        "rows": [_weight_row(row) for row in ordered[:_SHOWN_WEIGHTS]],
        "number": count_text(len(ordered)),
        "shown": _SHOWN_WEIGHTS if len(ordered) > _SHOWN_WEIGHTS else None,
        "less": any(as_number(row.get("less")) is not None for row in weights),
        "groups": any(row.get("group") for row in weights),
        "pairs": any(row.get("rejected") is not None for row in weights),
        "removes": target.get("use") == "remove",
        "anchors": kinds,
        "left_out": [(reason, count_text(count)) for reason, count in (target.get("anchors_left_out") or {}).items()],
    }


def _weight_row(row: Mapping[str, Any]) -> dict[str, str]:
    prism, uniform = as_number(row.get("prism")), as_number(row.get("uniform"))
    return {
        "id": str(row.get("id") or ""),
        "group": str(row.get("group") or MISSING),
        "prism": figure_text(prism, 4),
        "less": figure_text(row.get("less"), 4),
        "ratio": MISSING if prism is None or not uniform else f"{prism / uniform:.2f}×",
        "preference": figure_text(row.get("preference")),
        "score": figure_text(row.get("score")),
        "prompt": clipped(row.get("prompt"), 300),
        "completion": clipped(row.get("completion"), 300),
        "rejected": clipped(row.get("rejected"), 300),
    }


def _composition_view(target: Mapping[str, Any]) -> dict[str, Any]:
    """Rows by source: the pool and each strategy, with each strategy's share against the pool's."""
    sources = (target.get("pool") or {}).get("sources") or {}
    selections = {
        name: entry["composition"] for name, entry in target["strategies"].items() if entry.get("composition")
    }
    if not selections:
        return {"strategies": [], "rows": []}
    totals = {name: sum(counts.values()) for name, counts in selections.items()}
    names = set(sources).union(*selections.values())
    first = next(iter(selections.values()))
    rows = []
    for source in sorted(names, key=lambda name: (-first.get(name, 0), -sources.get(name, 0), str(name))):
        cells = [_share(counts.get(source, 0), totals[name]) for name, counts in selections.items()]
        rows.append((str(source), _share(sources.get(source, 0), sum(sources.values())), cells))
    return {"strategies": list(selections), "rows": rows}


def _share(count: float, total: float) -> tuple[str, str]:
    return count_text(count), f"{count / total:.1%}" if total else MISSING


def _example_groups(strategies: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """The top selected examples of each strategy, prism's first."""
    order = sorted(
        (name for name, entry in strategies.items() if entry.get("examples")),
        key=lambda name: name != "prism",
    )
    return [
        (
            name,
            [
                {
                    "rank": general(example.get("rank")),
                    "score": figure_text(example.get("score"), 4),
                    "source": str(example.get("source") or "no source"),
                    "prompt": clipped(example.get("prompt"), _LONGEST_TEXT),
                    "completion": clipped(example.get("completion"), _LONGEST_TEXT),
                }
                for example in strategies[name]["examples"][:_SHOWN_EXAMPLES]
            ],
        )
        for name in order
    ]


def _explanation_view(explanation: Mapping[str, Any]) -> dict[str, Any]:
    """One candidate's score by targets, its ranks and its nearest neighbours, as text."""
    return {
        "reason": str(explanation["reason"]),
        "id": str(explanation["id"]),
        "error": explanation.get("error"),
        "source": str(explanation.get("source") or "no source"),
        "prompt": clipped(explanation.get("prompt"), _LONGEST_TEXT),
        "completion": clipped(explanation.get("completion"), _LONGEST_TEXT),
        "sum": "Score" if explanation.get("exact_score") is None else "Exact score",
        "rows": [
            (clipped(what, 160), *("" if number is None else f"{number:+.4f}" for number in numbers))
            for what, *numbers in explanation.get("score_rows") or []
        ],
        "ranks": ", ".join(
            f"{one['strategy']} {count_text(one['rank'])} of {count_text(one['of'])}"
            for one in explanation.get("ranks") or []
        ),
        "neighbours": [
            (figure_text(one["similarity"]), clipped(f"{one['prompt']} → {one['completion']}", 160))
            for one in explanation.get("neighbours") or []
        ],
    }


def _lost(records: Mapping[str, Any], table: str) -> str:
    """How many records of a target's file are used, where that is not all of them."""
    counts = records.get(table) or {}
    if counts.get("given") == counts.get("used"):
        return ""
    return f"{count_text(counts['given'])} given, {count_text(counts['used'])} used"


def _benchmarks_view(target: Mapping[str, Any]) -> dict[str, Any]:
    metrics, about = benchmark_metrics(target), target.get("benchmarks") or {}
    strategies = list(target["strategies"])
    rows = []
    for label, metric in metrics.items():
        better = {True: "higher", False: "lower"}.get(metric["higher_is_better"], MISSING)
        means = {name: mean_of(metric["strategies"], name) for name in strategies}
        known = [mean for mean in means.values() if mean is not None]
        best = (
            (min if better == "lower" else max)(known, default=None) if better != MISSING and len(known) > 1 else None
        )
        cells = [
            Cell(benchmark_text(metric, name), means[name], best is not None and means[name] == best)
            for name in strategies
        ]
        rows.append((label, better, count_text(metric["documents"]), figure_text(metric["base"]), cells))
    limit = "" if about.get("limit") is None else f", the first {count_text(about['limit'])} documents of each task"
    return {"strategies": strategies, "rows": rows, "made_by": f"lm-eval {about.get('lm_eval')}{limit}"}
