"""The report: report.json's content as one self-contained HTML page, and the tables and sentences in it.

`comparison_table` and `verdict_sentences` need no more than the standard library; matplotlib and jinja2 are
imported when a page is built.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
METRICS = {
    "target_preference": "target preference",
    "mean_log_prob": "mean log-probability",
    "exact_match": "exact match",
}
# Fewer seeds than this and a difference of means describes the runs at hand; it is no test of anything.
SEEDS_FOR_A_TEST = 10
_SHOWN_WEIGHTS = 8
_SHOWN_EXAMPLES = 10
_SHOWN_REJECTS = 50
_LONGEST_TEXT = 1500
_MISSING = "–"
_TRUST_MARKS = {True: "holds", False: "does not hold", None: "not measured"}


# ---- tables


def comparison_table(data: Mapping[str, Any]) -> list[list[str]]:
    """Strategies side by side, as text: a header row, then per target the base model and each strategy.

    Columns: target, strategy, the metrics and the benchmarks' metrics as "mean ± std" over seeds, and the number
    of selected rows. `data` is the content of report.json; its order of targets and strategies is kept.
    """
    _check_format(data)
    targets = data.get("targets", {})
    benchmarks = list(dict.fromkeys(label for target in targets.values() for label in _benchmark_metrics(target)))
    table = [["target", "strategy", *METRICS.values(), *benchmarks, "rows"]]
    for name, target in targets.items():
        scores = _benchmark_metrics(target)
        for row in _metric_rows(target):
            own = [_benchmark_text(scores.get(label), row.strategy) for label in benchmarks]
            table.append([name, row.strategy, *(cell.text for cell in row.cells), *own, row.rows])
    return table


class _Cell(NamedTuple):
    text: str
    value: float | None
    best: bool


class _MetricRow(NamedTuple):
    strategy: str
    cells: list[_Cell]
    rows: str
    completion_tokens: str
    steps: str
    non_positive: str


def _metric_rows(target: Mapping[str, Any]) -> list[_MetricRow]:
    """The base model's row and one per strategy; the strategies' highest mean of each metric is marked."""
    strategies: Mapping[str, Any] = target.get("strategies", {})
    highest = {
        metric: max(
            (mean for entry in strategies.values() if (mean := _mean(entry, metric)) is not None),
            default=None,
        )
        for metric in METRICS
    }
    base = target.get("base") or {}
    base_cells = [_Cell(_figure(base.get(metric)), _number(base.get(metric)), False) for metric in METRICS]
    rows = [_MetricRow("base", base_cells, _MISSING, _MISSING, _MISSING, _MISSING)]
    for name, entry in strategies.items():
        cells = []
        for metric in METRICS:
            mean = _mean(entry, metric)
            best = mean is not None and mean == highest[metric] and len(strategies) > 1
            cells.append(_Cell(_mean_and_std(entry, metric), mean, best))
        counts = (
            _count(entry.get(key)) for key in ("rows", "completion_tokens", "steps", "non_positive_influence")
        )
        rows.append(_MetricRow(name, cells, *counts))
    return rows


# ---- benchmarks


def _benchmark_metrics(target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of lm-eval's tasks by label; empty where no benchmark was asked for."""
    return (target.get("benchmarks") or {}).get("metrics") or {}


def _benchmark_text(metric: Mapping[str, Any] | None, strategy: str) -> str:
    """The figure of the base model, or mean ± std over seeds of a strategy."""
    if metric is None:
        return _MISSING
    if strategy == "base":
        return _figure(metric["base"])
    return _mean_and_std(metric["strategies"], strategy)


def _benchmarks_view(target: Mapping[str, Any]) -> dict[str, Any]:
    metrics, about = _benchmark_metrics(target), target.get("benchmarks") or {}
    strategies = list(target["strategies"])
    rows = []
    for label, metric in metrics.items():
        better = {True: "higher", False: "lower"}.get(metric["higher_is_better"], _MISSING)
        means = {name: _mean(metric["strategies"], name) for name in strategies}
        known = [mean for mean in means.values() if mean is not None]
        best = (min if better == "lower" else max)(known, default=None) if better != _MISSING and len(known) > 1 else None
        cells = [
            _Cell(_benchmark_text(metric, name), means[name], best is not None and means[name] == best)
            for name in strategies
        ]
        rows.append((label, better, _count(metric["documents"]), _figure(metric["base"]), cells))
    limit = "" if about.get("limit") is None else f", the first {_count(about['limit'])} documents of each task"
    return {"strategies": strategies, "rows": rows, "made_by": f"lm-eval {about.get('lm_eval')}{limit}"}


# ---- sentences


def verdict_sentences(target: Mapping[str, Any]) -> list[str]:
    """What the numbers of one target say, and no more: `target` is an entry of report.json's `targets`.

    Only means and standard deviations over seeds are known, so a difference is called one only where it
    exceeds the larger of the two standard deviations, and never significant.
    """
    strategies: Mapping[str, Any] = target.get("strategies", {})
    sentences = [
        sentence
        for metric in METRICS
        if (sentence := _metric_sentence(metric, strategies, target.get("base") or {}))
    ]
    if "prism" in strategies:
        for other in strategies:
            if other != "prism" and (sentence := _paired_sentence(other, strategies)):
                sentences.append(sentence)
    sentences += _direction_sentences(target.get("direction") or {})
    sentences += _caveats(strategies)
    return sentences


def _metric_sentence(metric: str, strategies: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    means = {name: mean for name, entry in strategies.items() if (mean := _mean(entry, metric)) is not None}
    if not means:
        return None
    best = max(means, key=means.__getitem__)
    label = METRICS[metric].capitalize()
    sentence = f"{label}: {best} has the highest mean, {_mean_and_std(strategies[best], metric)}"
    if len(means) == 1:
        sentence = f"{label}: {best} reaches {_mean_and_std(strategies[best], metric)}"
    reference = _number(base.get(metric))
    if reference is None:
        return sentence + "."
    worse = [name for name, mean in means.items() if mean < reference]
    sentence += f"; the base model is at {_figure(reference)}"
    return sentence + (f", above {_listed(worse)}." if worse else ".")


def _paired_sentence(other: str, strategies: Mapping[str, Any]) -> str | None:
    """prism against another strategy, metric by metric."""
    parts = []
    for metric, label in METRICS.items():
        ours, theirs = _mean(strategies["prism"], metric), _mean(strategies[other], metric)
        if ours is None or theirs is None:
            continue
        difference = ours - theirs
        if difference == 0:
            parts.append(f"{label} the same")
            continue
        direction = "higher" if difference > 0 else "lower"
        spread = _spread(abs(difference), strategies["prism"], strategies[other], metric)
        parts.append(f"{label} {direction} by {_gap(abs(difference))} ({spread})")
    return f"prism against {other}: " + "; ".join(parts) + "." if parts else None


def _spread(difference: float, ours: Mapping[str, Any], theirs: Mapping[str, Any], metric: str) -> str:
    deviations = [_number((entry.get(metric) or {}).get("std")) for entry in (ours, theirs)]
    if None in deviations:
        return "spread over seeds unknown"
    larger = max(deviations)
    if difference <= larger:
        return "within one standard deviation: no clear difference"
    if larger == 0:
        return "no spread over seeds"
    return f"{difference / larger:.1f} times the larger standard deviation"


def _direction_sentences(direction: Mapping[str, Any]) -> list[str]:
    sentences = []
    effective = direction.get("effective_number_of_targets") or {}
    prism, uniform = _number(effective.get("prism")), _number(effective.get("uniform"))
    if prism is not None and uniform:
        sentences.append(
            f"The prism direction rests on {prism:.1f} effective targets of {uniform:g} "
            f"({prism / uniform:.0%})."
        )
    first_order = direction.get("first_order") or {}
    steps = {name: first_order.get(name) or {} for name in ("prism", "uniform")}
    measured = {name: _number(entry.get("measured")) for name, entry in steps.items()}
    if None not in measured.values():
        relation = _compared(measured["prism"], measured["uniform"])
        sentences.append(
            f"A small step along the prism direction changes J by {_signed(measured['prism'])} (predicted "
            f"{_signed(steps['prism'].get('predicted'))}), {relation} the same step along the uniform "
            f"direction, {_signed(measured['uniform'])} "
            f"(predicted {_signed(steps['uniform'].get('predicted'))})."
        )
    held_out = {name: _number(entry.get("held_out_mean_log_prob")) for name, entry in steps.items()}
    if None not in held_out.values():
        relation = _compared(held_out["prism"], held_out["uniform"])
        sentences.append(
            "The same steps change the mean log-probability of held-out examples by "
            f"{_signed(held_out['prism'])} for prism, {relation} uniform's {_signed(held_out['uniform'])}."
        )
    return sentences


def _compared(ours: float, theirs: float) -> str:
    return "more than" if ours > theirs else "less than" if ours < theirs else "the same as"


def _caveats(strategies: Mapping[str, Any]) -> list[str]:
    sentences = []
    for name, entry in strategies.items():
        count = _number(entry.get("non_positive_influence"))
        if count:
            noun = "row has" if count == 1 else "rows have"
            sentences.append(
                f"{name}: {count:,.0f} selected {noun} an influence of zero or less; the budget reaches "
                "past the rows that are predicted to help."
            )
    steps = {name: entry["steps"] for name, entry in strategies.items() if entry.get("steps") is not None}
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in steps.items())
        sentences.append(f"The strategies were trained for different numbers of optimiser steps: {listed}.")
    seeds = {
        int(entry[metric]["seeds"])
        for entry in strategies.values()
        for metric in METRICS
        if _mean(entry, metric) is not None
    }
    if seeds and max(seeds) < SEEDS_FOR_A_TEST:
        many = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(max(seeds))
        noun = "seed" if max(seeds) == 1 else "seeds"
        sentences.append(
            f"With {many} {noun} these comparisons describe the runs at hand; they are no significance test."
        )
    return sentences


# ---- page


def build_report(data: Mapping[str, Any]) -> str:
    """The HTML page for `data`, the content of report.json: no script, no outside resource, all escaped.

    Raises ValueError where the format is unknown or a target lacks its strategies.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    _check_format(data)
    targets = []
    for number, (name, target) in enumerate(data.get("targets", {}).items(), start=1):
        if not isinstance(target.get("strategies"), Mapping):
            raise ValueError(f"report.json, targets.{name}: 'strategies' is missing")
        targets.append(_target_view(f"target-{number}", name, target))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    model = data.get("model") or {}
    return environment.get_template("report.html").render(
        created=str(data.get("created") or ""),
        model_name=str(model.get("name") or "unnamed model"),
        model_fingerprint=str(model.get("fingerprint") or ""),
        metrics=list(METRICS.values()),
        targets=targets,
        settings=_pretty(data.get("settings")),
        lineage=_pretty(data.get("lineage")),
        refused=_refused_view(data),
    )


def _check_format(data: Mapping[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise ValueError(f"report.json has format {data.get('format')!r}; this version reads format {FORMAT}")


def _target_view(anchor: str, name: str, target: Mapping[str, Any]) -> dict[str, Any]:
    pool, direction = target.get("pool") or {}, target.get("direction") or {}
    facts = [
        (
            "Targets",
            _count(target.get("number_of_targets")),
            "pairs" if target.get("kind") == "pairs" else "examples",
        ),
        ("Held out", _count(target.get("number_of_eval")), "examples"),
        ("Pool", _count(pool.get("rows")), "rows"),
        ("Canonical", _count(pool.get("canonical")), "rows, each content once"),
    ]
    return {
        "anchor": anchor,
        "name": name,
        "facts": [fact for fact in facts if fact[1] != _MISSING],
        "rows": _metric_rows(target),
        "benchmarks": _benchmarks_view(target),
        "verdicts": verdict_sentences(target),
        "plots": _plots(target),
        "direction": _direction_view(direction),
        "weights": _weight_groups(direction.get("weights") or []),
        "has_less": any(_number(row.get("less")) is not None for row in direction.get("weights") or []),
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
                ("adapter", "adapter"),
            )
            if entry.get(key)
        ],
    }


def _plots(target: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The plots that the data allow, as caption and data URI, by the section of the page that shows them."""
    from prism_assets.evaluation import plots

    strategies, direction = target["strategies"], target.get("direction") or {}
    found: list[tuple[str, str, bytes]] = []
    if any(_mean(entry, metric) is not None for entry in strategies.values() for metric in METRICS):
        image = plots.strategies_comparison(strategies, target.get("base"))
        caption = "Mean over seeds, with one standard deviation to each side; dashed: the base model."
        found.append(("outcome", caption, image))
    compositions = {
        name: entry["composition"] for name, entry in strategies.items() if entry.get("composition")
    }
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
            {"caption": caption, "uri": _data_uri(plots.as_markdown_image(image))}
            for where, caption, image in found
            if where == section
        ]
        for section in ("outcome", "direction")
    }


def _data_uri(markdown: str) -> str:
    return markdown[markdown.index("(") + 1 : -1]


def _direction_view(direction: Mapping[str, Any]) -> dict[str, Any]:
    effective, first_order = (
        direction.get("effective_number_of_targets") or {},
        direction.get("first_order") or {},
    )
    rows = []
    for name in dict.fromkeys(
        [*effective, *(key for key, value in first_order.items() if isinstance(value, Mapping))]
    ):
        step = first_order.get(name) or {}
        keys = ("predicted", "measured", "held_out_mean_log_prob")
        rows.append((name, _figure(effective.get(name), 1), *(_signed(step.get(key)) for key in keys)))
    facts = [
        ("temperature τ", _general(direction.get("temperature"))),
        ("log Z", _general(direction.get("log_z"))),
        ("warm-up checkpoints", _general(direction.get("checkpoints"))),
        ("length of the step", _general(first_order.get("step"))),
    ]
    return {"rows": rows, "facts": [fact for fact in facts if fact[1] != _MISSING]}


def _weight_groups(weights: list[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, str]]]]:
    """The targets with the highest and the lowest weight; all of them where they are few."""
    ordered = sorted(weights, key=lambda row: -(_number(row.get("prism")) or 0.0))
    if not ordered:
        return []
    if len(ordered) <= 2 * _SHOWN_WEIGHTS:
        return [("All targets, by weight", [_weight_row(row) for row in ordered])]
    return [
        (f"The {_SHOWN_WEIGHTS} highest weights", [_weight_row(row) for row in ordered[:_SHOWN_WEIGHTS]]),
        (f"The {_SHOWN_WEIGHTS} lowest weights", [_weight_row(row) for row in ordered[-_SHOWN_WEIGHTS:]]),
    ]


def _weight_row(row: Mapping[str, Any]) -> dict[str, str]:
    prism, uniform = _number(row.get("prism")), _number(row.get("uniform"))
    return {
        "id": str(row.get("id") or ""),
        "prism": _figure(prism, 4),
        "less": _figure(row.get("less"), 4),
        "ratio": _MISSING if prism is None or not uniform else f"{prism / uniform:.2f}×",
        "preference": _figure(row.get("preference")),
        "score": _figure(row.get("score")),
        "prompt": _clipped(row.get("prompt"), 300),
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
    return _count(count), f"{count / total:.1%}" if total else _MISSING


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
                    "rank": _general(example.get("rank")),
                    "score": _figure(example.get("score"), 4),
                    "source": str(example.get("source") or "no source"),
                    "prompt": _clipped(example.get("prompt"), _LONGEST_TEXT),
                    "completion": _clipped(example.get("completion"), _LONGEST_TEXT),
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
        "prompt": _clipped(explanation.get("prompt"), _LONGEST_TEXT),
        "completion": _clipped(explanation.get("completion"), _LONGEST_TEXT),
        "sum": "Score" if explanation.get("exact_score") is None else "Exact score",
        "rows": [
            (_clipped(what, 160), *("" if number is None else f"{number:+.4f}" for number in numbers))
            for what, *numbers in explanation.get("score_rows") or []
        ],
        "ranks": ", ".join(
            f"{one['strategy']} {_count(one['rank'])} of {_count(one['of'])}" for one in explanation.get("ranks") or []
        ),
        "neighbours": [
            (_figure(one["similarity"]), _clipped(f"{one['prompt']} → {one['completion']}", 160))
            for one in explanation.get("neighbours") or []
        ],
    }


def _refused_view(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counts of what was left out of the pool, None where nothing is known of it."""
    if not any(key in data for key in ("rejects", "contamination", "duplicates")):
        return None
    rejects: list[Mapping[str, Any]] = list(data.get("rejects") or [])
    reasons = Counter(str(row.get("reason")) for row in rejects)
    counts = [
        ("refused rows", _count(len(rejects)) if "rejects" in data else _MISSING),
        ("rows equal to a target or held-out record", _count(data.get("contamination"))),
        ("duplicates", _count(data.get("duplicates"))),
    ]
    rows = [
        (
            str(row.get("shard") or ""),
            str(row.get("file") or ""),
            _general(row.get("line")),
            str(row.get("reason")),
        )
        for row in rejects[:_SHOWN_REJECTS]
    ]
    return {
        "counts": [count for count in counts if count[1] != _MISSING],
        "reasons": reasons.most_common(),
        "rows": rows,
        "more": len(rejects) - len(rows),
    }


# ---- text of numbers


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, (str, bool, Mapping)):
        return None
    return float(value) if math.isfinite(value) else None


def _mean(entry: Mapping[str, Any], metric: str) -> float | None:
    return _number((entry.get(metric) or {}).get("mean"))


def _mean_and_std(entry: Mapping[str, Any], metric: str) -> str:
    mean, std = _mean(entry, metric), _number((entry.get(metric) or {}).get("std"))
    if mean is None:
        return _MISSING
    return _figure(mean) if std is None else f"{_figure(mean)} ± {_figure(std)}"


def _figure(value: Any, decimals: int = 3) -> str:
    number = _number(value)
    return _MISSING if number is None else f"{number:.{decimals}f}".replace("-", "−")


def _gap(difference: float) -> str:
    return f"{difference:.3f}" if difference >= 0.0005 else f"{difference:.1e}"


def _signed(value: Any) -> str:
    number = _number(value)
    if number is None:
        return _MISSING
    text = f"{number:+.4f}" if abs(number) >= 0.01 or number == 0 else f"{number:+.2e}"
    return text.replace("-", "−")


def _general(value: Any) -> str:
    number = _number(value)
    return _MISSING if number is None else f"{number:.6g}".replace("-", "−")


def _count(value: Any) -> str:
    number = _number(value)
    return _MISSING if number is None else f"{number:,.0f}"


def _listed(names: Iterable[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def _clipped(text: Any, longest: int) -> str:
    whole = "" if text is None else str(text)
    if len(whole) <= longest:
        return whole
    return f"{whole[:longest]}… ({len(whole) - longest:,} more characters)"


def _pretty(value: Any) -> str:
    """A tree of settings as indented JSON; empty where there is nothing."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""
