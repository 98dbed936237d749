"""The page: report.json's content as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_assets.corpus.intake import COLUMNS, SHOW_REJECTS, Intake
from prism_assets.report.comparison import (
    METRIC_LABELS,
    Cell,
    benchmark_metrics,
    benchmark_text,
    check_format,
    metric_rows,
    shown_metrics,
)
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
    pretty,
    signed,
    visible_value,
)

_SHOWN_WEIGHTS = 8
_SHOWN_EXAMPLES = 10
_SHOWN_REJECTS = 50
_LONGEST_TEXT = 1500
_TRUST_MARKS = {True: "holds", False: "does not hold", None: "not measured"}


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


# ---- page


def build_report(data: Mapping[str, Any]) -> str:
    """The HTML page for `data`, the content of report.json: no script, no outside resource, all escaped.

    Raises ValueError where the format is unknown or a target lacks its strategies.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    check_format(data)
    targets = []
    for number, (name, target) in enumerate(data.get("targets", {}).items(), start=1):
        if not isinstance(target.get("strategies"), Mapping):
            raise ValueError(f"report.json, targets.{name}: 'strategies' is missing")
        targets.append(_target_view(f"target-{number}", name, target, shown_metrics(data["targets"].values())))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    model = data.get("model") or {}
    return environment.get_template("report.html").render(
        created=str(data.get("created") or ""),
        model_name=str(model.get("name") or "unnamed model"),
        model_fingerprint=str(model.get("fingerprint") or ""),
        metrics=[METRIC_LABELS[one] for one in shown_metrics(data.get("targets", {}).values())],
        targets=targets,
        settings=pretty(data.get("settings")),
        lineage=pretty(data.get("lineage")),
        intake=_intake_view(data),
    )


def _target_view(anchor: str, name: str, target: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
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
    return {
        "anchor": anchor,
        "name": name,
        "facts": [fact for fact in facts if fact[1] != MISSING],
        "rows": metric_rows(target, metrics),
        "benchmarks": _benchmarks_view(target),
        "verdicts": verdict_sentences(target),
        "plots": _plots(target),
        "direction": _direction_view(direction),
        "weights": _weight_groups(direction.get("weights") or []),
        "has_less": any(as_number(row.get("less")) is not None for row in direction.get("weights") or []),
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


def _plots(target: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The plots that the data allow, as caption and data URI, by the section of the page that shows them."""
    from prism_assets import plots

    strategies, direction = target["strategies"], target.get("direction") or {}
    found: list[tuple[str, str, bytes]] = []
    if any(mean_of(entry, metric) is not None for entry in strategies.values() for metric in METRIC_LABELS):
        image = plots.strategies_comparison(strategies, target.get("base"))
        caption = "Mean over seeds, with one standard deviation to each side; dashed: the base model."
        found.append(("outcome", caption, image))
    compositions = {name: entry["composition"] for name, entry in strategies.items() if entry.get("composition")}
    sources = (target.get("pool") or {}).get("sources") or {}
    if compositions:
        image = plots.composition(sources, compositions)
        found.append(("outcome", "Where the selected rows come from, against the pool.", image))
    with_scores = [name for name, entry in strategies.items() if entry.get("score_histogram")]
    if with_scores:
        name = "prism" if "prism" in with_scores else with_scores[0]
        image = plots.score_histogram(strategies[name]["score_histogram"])
        caption = f"Influence scores of the canonical candidates under {name}; shaded: what the budget takes."
        found.append(("outcome", caption, image))
    if direction.get("weights"):
        image = plots.target_weights(direction["weights"])
        found.append(("direction", "Each bar is a target; an even spread is no preference at all.", image))
    if direction.get("first_order"):
        image = plots.first_order_gains(direction["first_order"])
        caption = "Predicted to first order and measured, along directions of equal length."
        found.append(("direction", caption, image))
    return {
        section: [
            {"caption": caption, "uri": plots.as_data_uri(image)} for where, caption, image in found if where == section
        ]
        for section in ("outcome", "direction")
    }


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


def _weight_groups(weights: list[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, str]]]]:
    """The targets with the highest and the lowest weight; all of them where they are few."""
    ordered = sorted(weights, key=lambda row: -(as_number(row.get("prism")) or 0.0))
    if not ordered:
        return []
    if len(ordered) <= 2 * _SHOWN_WEIGHTS:
        return [("All target examples, by weight", [_weight_row(row) for row in ordered])]
    return [
        (f"The {_SHOWN_WEIGHTS} highest weights", [_weight_row(row) for row in ordered[:_SHOWN_WEIGHTS]]),
        (f"The {_SHOWN_WEIGHTS} lowest weights", [_weight_row(row) for row in ordered[-_SHOWN_WEIGHTS:]]),
    ]


def _weight_row(row: Mapping[str, Any]) -> dict[str, str]:
    prism, uniform = as_number(row.get("prism")), as_number(row.get("uniform"))
    return {
        "id": str(row.get("id") or ""),
        "prism": figure_text(prism, 4),
        "less": figure_text(row.get("less"), 4),
        "ratio": MISSING if prism is None or not uniform else f"{prism / uniform:.2f}×",
        "preference": figure_text(row.get("preference")),
        "score": figure_text(row.get("score")),
        "prompt": clipped(row.get("prompt"), 300),
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


def _intake_view(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What became of the records given, None where nothing is known of it."""
    if not data.get("intake"):
        return None
    intake = Intake.from_data(data["intake"])
    rejects: list[Mapping[str, Any]] = list(data.get("rejects") or [])
    return {
        "columns": COLUMNS[1:],
        "parts": [(part.name, list(map(count_text, part.row()[1:]))) for part in intake.parts],
        "reasons": [(name, why, count_text(count)) for name, why, count in intake.reasons],
        "files": intake.files,
        "unused": intake.unused_fields,
        "rows": [
            tuple(str(row.get(name) or "") for name in ("shard", "line", "field", "reason"))
            for row in rejects[:_SHOWN_REJECTS]
        ],
        "command": SHOW_REJECTS,
    }
