"""Plots of the pool: scores and sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prism_assets.plots import canvas
from prism_assets.plots.canvas import (
    INK,
    MUTED,
    OTHER_COLOR,
    SOURCE_COLORS,
    STRATEGY_COLORS,
    STYLE,
    finish,
    finite,
    new_figure,
    shares_of,
    show_no_values,
    ticks,
    without_middle,
)

MOST_SOURCES = 10


def score_histogram(histogram: Mapping[str, Any]) -> bytes:
    """Distribution of influence scores with the budget's cut-off.

    `histogram`: `edges` [bins + 1], `counts` [bins], and where known `cutoff` (lowest selected score) and
    `selected` (rows taken), as `selection/histogram.py` returns it. Counts are on a log axis where they span
    more than three orders of magnitude.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(8.6, 2.8)
        edges = np.asarray(histogram.get("edges") or [], dtype=np.float64)
        counts = np.asarray(histogram.get("counts") or [], dtype=np.float64)
        if len(counts) and len(edges) == len(counts) + 1 and np.isfinite(edges).all() and np.nansum(counts) > 0:
            counts = np.nan_to_num(counts)
            cutoff = finite(histogram.get("cutoff"))
            if cutoff is not None:
                axes.axvspan(cutoff, max(edges[-1], cutoff), color=STRATEGY_COLORS["prism"], alpha=0.08, lw=0)
            axes.stairs(counts, edges, fill=True, color="#aab4e8")
            axes.stairs(counts, edges, color=STRATEGY_COLORS["prism"], linewidth=0.8)
            if counts.max() > 1000 * max(counts[counts > 0].min(), 1):
                axes.set_yscale("log")
                axes.set_ylim(bottom=0.7)
            else:
                axes.yaxis.set_major_locator(ticks(5, integer=True))
            if edges[0] < 0 < edges[-1]:
                axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
            if cutoff is not None:
                axes.axvline(cutoff, color=STRATEGY_COLORS["prism"], linewidth=1.4)
                _cutoff_label(axes, cutoff, edges, histogram.get("selected"))
            axes.xaxis.set_major_locator(ticks(8))
        else:
            show_no_values(axes)
        finish(axes, "Influence scores of the pool", "influence score", "candidates", grid="y")
        return canvas.png(figure)


def composition(
    pool: Mapping[str, float],
    selections: Mapping[str, Mapping[str, float]],
) -> bytes:
    """Rows by source, as shares: one stacked bar for the pool and one per strategy.

    `pool` and each of `selections`: source -> number of rows. Sources beyond the `MOST_SOURCES` with the
    largest share in any bar are drawn together as "other".
    """
    rows = {"pool": shares_of(pool), **{name: shares_of(counts) for name, counts in selections.items()}}
    rows = {name: shares for name, shares in rows.items() if shares}
    largest: dict[str, float] = {}
    for shares in rows.values():
        for source, share in shares.items():
            largest[source] = max(share, largest.get(source, 0.0))
    # One over the limit is drawn by its own name: "other (1 source)" would hide a name and save no colour.
    limit = MOST_SOURCES if len(largest) > MOST_SOURCES + 1 else MOST_SOURCES + 1
    shown = sorted(largest, key=lambda source: (-largest[source], source))[:limit]
    with rc_context(STYLE):
        figure, axes = new_figure(8.6, 1.3 + 0.3 * max(len(rows), 1) + 0.2 * math.ceil((len(shown) + 1) / 3))
        lefts = np.zeros(len(rows))
        series = [(source, [shares.get(source, 0.0) for shares in rows.values()]) for source in shown]
        other = [sum(share for source, share in shares.items() if source not in shown) for shares in rows.values()]
        if any(other):
            series.append((f"other ({len(largest) - len(shown)} sources)", other))
        for number, (source, shares) in enumerate(series):
            color = SOURCE_COLORS[number % len(SOURCE_COLORS)] if source in shown else OTHER_COLOR
            axes.barh(
                range(len(rows)), shares, left=lefts, height=0.72, color=color, edgecolor="white",
                linewidth=0.6, label=without_middle(source, 34),
            )  # fmt: skip
            for row, share in enumerate(shares):
                if share >= 0.06:
                    axes.text(
                        lefts[row] + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=7.5,
                        color="white" if source in shown else INK,
                    )  # fmt: skip
            lefts += shares
        if rows:
            axes.set_yticks(range(len(rows)), [without_middle(name, 24) for name in rows])
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            figure.legend(loc="outside lower center", ncols=3, handlelength=1.0, handleheight=1.0)
        else:
            show_no_values(axes)
        finish(axes, "Composition by source", "share of the rows", "")
        return canvas.png(figure)


def _cutoff_label(axes: Axes, cutoff: float, edges: np.ndarray, selected: Any) -> None:
    on_right = cutoff < edges[0] + 0.6 * (edges[-1] - edges[0])
    label = f"cut-off {cutoff:.3g}"
    count = finite(selected)
    axes.annotate(
        label if count is None else f"{label}\n{count:,.0f} selected", (cutoff, 0.97),
        xycoords=("data", "axes fraction"), xytext=(5 if on_right else -5, 0), textcoords="offset points",
        ha="left" if on_right else "right", va="top", fontsize=8.5, color=STRATEGY_COLORS["prism"],
    )  # fmt: skip
