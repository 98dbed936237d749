"""Strategies side by side, as a table of text. Needs no more than the standard library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prism_assets.report.wording import (
    MISSING,
    as_number,
    count_text,
    figure_text,
    mean_and_std,
    mean_of,
)

FORMAT = 1
METRIC_LABELS = {
    "target_preference": "target preference",
    "mean_log_prob": "mean log-probability",
    "exact_match": "exact match",
    "pair_accuracy": "pair accuracy",
    "margin": "margin",
    "unwanted_avoided": "unwanted answer avoided",
    "choice_accuracy": "choice accuracy",
    # Of the ranking, not of what was fine-tuned: how it finds the rows that a label calls harmful.
    "auroc": "AUROC of the label",
    "average_precision": "average precision of the label",
}
ALWAYS_SHOWN = ("target_preference", "mean_log_prob", "exact_match")


# ---- tables


def comparison_table(data: Mapping[str, Any]) -> list[list[str]]:
    """Strategies side by side, as text: a header row, then per target the base model and each strategy.

    Columns: target, strategy, the metrics and the benchmarks' metrics as "mean ± std" over seeds, and the number
    of selected rows. `data` is the content of report.json; its order of targets and strategies is kept.
    """
    check_format(data)
    targets = data.get("targets", {})
    benchmarks = list(dict.fromkeys(label for target in targets.values() for label in benchmark_metrics(target)))
    metrics = shown_metrics(targets.values())
    table = [["target", "strategy", *(METRIC_LABELS[one] for one in metrics), *benchmarks, "rows"]]
    for name, target in targets.items():
        scores = benchmark_metrics(target)
        for row in metric_rows(target, metrics):
            own = [benchmark_text(scores.get(label), row.strategy) for label in benchmarks]
            table.append([name, row.strategy, *(cell.text for cell in row.cells), *own, row.rows])
    return table


class Cell(NamedTuple):
    """A figure as text and as a number, and whether it is the best of its column."""

    text: str
    value: float | None
    best: bool


class MetricRow(NamedTuple):
    """A row of the table of strategies; all but `cells` is text."""

    strategy: str
    cells: list[Cell]
    rows: str
    completion_tokens: str
    steps: str
    non_positive: str


def shown_metrics(targets: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of a table over these targets: those that every target has, and the others where one has them."""
    entries = [entry for target in targets for entry in (target.get("strategies") or {}).values()]
    return [
        metric
        for metric in METRIC_LABELS
        if metric in ALWAYS_SHOWN or any(mean_of(entry, metric) is not None for entry in entries)
    ]


def metric_rows(target: Mapping[str, Any], metrics: Sequence[str]) -> list[MetricRow]:
    """The base model's row and one per strategy; the strategies' highest mean of each metric is marked."""
    strategies: Mapping[str, Any] = target.get("strategies", {})
    highest = {
        metric: max(
            (mean for entry in strategies.values() if (mean := mean_of(entry, metric)) is not None),
            default=None,
        )
        for metric in metrics
    }
    base = target.get("base") or {}
    base_cells = [Cell(figure_text(base.get(metric)), as_number(base.get(metric)), False) for metric in metrics]
    rows = [MetricRow("base", base_cells, MISSING, MISSING, MISSING, MISSING)]
    for name, entry in strategies.items():
        cells = []
        for metric in metrics:
            mean = mean_of(entry, metric)
            best = mean is not None and mean == highest[metric] and len(strategies) > 1
            cells.append(Cell(mean_and_std(entry, metric), mean, best))
        counts = (
            count_text(entry.get(key)) for key in ("rows", "completion_tokens", "steps", "non_positive_influence")
        )
        rows.append(MetricRow(name, cells, *counts))
    return rows


# ---- benchmarks


def benchmark_metrics(target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of lm-eval's tasks by label; empty where no benchmark was asked for."""
    return (target.get("benchmarks") or {}).get("metrics") or {}


def benchmark_text(metric: Mapping[str, Any] | None, strategy: str) -> str:
    """The figure of the base model, or mean ± std over seeds of a strategy."""
    if metric is None:
        return MISSING
    if strategy == "base":
        return figure_text(metric["base"])
    return mean_and_std(metric["strategies"], strategy)


def check_format(data: Mapping[str, Any]) -> None:
    """Raise ValueError where report.json has another format than this version reads."""
    if data.get("format") != FORMAT:
        raise ValueError(f"report.json has format {data.get('format')!r}; this version reads format {FORMAT}")
