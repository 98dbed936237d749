"""The figures of a target: each a picture, which is what prints and what is seen without scripts, and the charts that
report.js draws in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prism_assets.report.charts import (
    Chart,
    composition_chart,
    gains_charts,
    histogram_chart,
    strategies_charts,
    weights_chart,
)
from prism_assets.report.comparison import METRIC_LABELS
from prism_assets.report.wording import mean_of


class Figure(NamedTuple):
    """A picture with its caption and charts; `key` is its name within the page."""

    key: str
    section: str  # of the page: outcome, direction
    caption: str
    uri: str
    charts: list[Chart]


def figures_of(anchor: str, target: Mapping[str, Any]) -> list[Figure]:
    """The figures that a target's data allow."""
    from prism_assets import plots

    strategies, direction = target["strategies"], target.get("direction") or {}
    found: list[tuple[str, str, bytes, list[Chart]]] = []
    if any(mean_of(entry, metric) is not None for entry in strategies.values() for metric in METRIC_LABELS):
        image = plots.strategies_comparison(strategies, target.get("base"))
        caption = "Mean over seeds, with one standard deviation to each side; dashed: the base model."
        found.append(("outcome", caption, image, strategies_charts(target)))
    compositions = {name: entry["composition"] for name, entry in strategies.items() if entry.get("composition")}
    sources = (target.get("pool") or {}).get("sources") or {}
    if compositions:
        image = plots.composition(sources, compositions)
        caption = "Where the selected rows come from, against the pool."
        found.append(("outcome", caption, image, [composition_chart(sources, compositions)]))
    with_scores = [name for name, entry in strategies.items() if entry.get("score_histogram")]
    if with_scores:
        name = "prism" if "prism" in with_scores else with_scores[0]
        histogram = strategies[name]["score_histogram"]
        caption = f"Influence scores of the canonical candidates under {name}; marked: what the budget takes."
        found.append(("outcome", caption, plots.score_histogram(histogram), [histogram_chart(histogram)]))
    if direction.get("weights"):
        image = plots.target_weights(direction["weights"])
        caption = "Each bar is a target; an even spread is no preference at all."
        found.append(("direction", caption, image, [weights_chart(direction["weights"])]))
    if direction.get("first_order"):
        image = plots.first_order_gains(direction["first_order"])
        caption = "Predicted to first order and measured, along directions of equal length."
        found.append(("direction", caption, image, gains_charts(direction["first_order"])))
    return [
        Figure(f"{anchor}-figure-{number}", section, caption, plots.as_data_uri(image), charts)
        for number, (section, caption, image, charts) in enumerate(found, start=1)
    ]
