"""The charts of a page as plain data, which report.js hands to Chart.js. Each has the picture of `plots` as its
fallback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prism_assets.report.comparison import METRIC_LABELS
from prism_assets.report.wording import as_number, mean_of

_MOST_SOURCES = 10
Chart = dict[str, Any]


def strategies_charts(target: Mapping[str, Any]) -> list[Chart]:
    """A chart a metric: each strategy's mean and standard deviation over seeds, and the base model."""
    strategies: Mapping[str, Any] = target["strategies"]
    base = target.get("base") or {}
    found = []
    for metric, label in METRIC_LABELS.items():
        known = [name for name, entry in strategies.items() if mean_of(entry, metric) is not None]
        if known:
            entries = [strategies[name][metric] for name in known]
            found.append(
                {
                    "kind": "means",
                    "title": label,
                    "labels": known,
                    "means": [as_number(one.get("mean")) for one in entries],
                    "deviations": [as_number(one.get("std")) for one in entries],
                    "base": as_number(base.get(metric)),
                }
            )
    return found


def composition_chart(pool: Mapping[str, float], selections: Mapping[str, Mapping[str, float]]) -> Chart:
    """Shares of sources in the pool and in each selection; sources beyond the largest are one."""
    rows = {"pool": pool, **selections}
    shares = {
        name: {str(source): count / sum(counts.values()) for source, count in counts.items()}
        for name, counts in rows.items()
        if sum(counts.values())
    }
    largest: dict[str, float] = {}
    for its in shares.values():
        for source, share in its.items():
            largest[source] = max(share, largest.get(source, 0.0))
    named = sorted(largest, key=lambda source: (-largest[source], source))[:_MOST_SOURCES]
    series = [{"name": source, "values": [its.get(source, 0.0) for its in shares.values()]} for source in named]
    if len(largest) > len(named):
        rest = [sum(share for source, share in its.items() if source not in named) for its in shares.values()]
        series.append({"name": f"other ({len(largest) - len(named)} sources)", "values": rest})
    return {"kind": "shares", "title": "Composition by source", "labels": list(shares), "series": series}


def histogram_chart(histogram: Mapping[str, Any]) -> Chart:
    """Scores of the candidates, and from which score on they are taken."""
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    positive = [count for count in counts if count > 0]
    return {
        "kind": "histogram",
        "title": "Influence scores of the pool",
        "edges": edges,
        "counts": counts,
        "cutoff": as_number(histogram.get("cutoff")),
        "logarithmic": bool(positive) and max(positive) > 1000 * min(positive),
    }


def weights_chart(weights: Iterable[Mapping[str, Any]]) -> Chart:
    """Weight of each target example under prism, highest first, and under uniform."""
    known = sorted(
        ((weight, as_number(row.get("uniform"))) for row in weights
         if (weight := as_number(row.get("prism"))) is not None),
        key=lambda pair: -pair[0],
    )  # fmt: skip
    return {
        "kind": "bars",
        "title": "Weight of each target in the direction",
        "x": "targets, by weight",
        "labels": [str(place) for place in range(1, len(known) + 1)],
        "series": [
            {"name": "prism", "values": [weight for weight, _ in known]},
            {"name": "uniform", "values": [level for _, level in known], "line": True},
        ],
    }


def gains_charts(first_order: Mapping[str, Any]) -> list[Chart]:
    """Change of J after a small step along each direction, predicted and measured, and that of held-out records."""
    directions = {name: values for name, values in first_order.items() if isinstance(values, Mapping)}
    groups: Sequence[tuple[str, Mapping[str, str]]] = (
        ("Change of J after a small step", {"predicted": "predicted", "measured": "measured"}),
        ("Change of held-out log-probability", {"measured": "held_out_mean_log_prob"}),
    )
    found = []
    for title, keys in groups:
        series = [
            {"name": name, "values": [as_number(its.get(key)) for its in directions.values()]}
            for name, key in keys.items()
        ]
        if any(value is not None for one in series for value in one["values"]):
            found.append({"kind": "bars", "title": title, "labels": list(directions), "series": series})
    return found
