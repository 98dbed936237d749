"""Plots of results: strategies side by side, paired differences, costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from prism_assets.plots import canvas
from prism_assets.plots.canvas import (
    DPI,
    METRIC_AXES,
    MUTED,
    SOURCE_COLORS,
    STYLE,
    color_of,
    entry_of,
    finish,
    finite,
    finite_values,
    new_figure,
    show_no_values,
    ticks,
    tint,
    without_middle,
)


def strategies_comparison(
    strategies: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
) -> bytes:
    """A panel per metric: each strategy's mean over seeds ± one standard deviation; the base model as a line.

    `strategies`: name -> metric -> `{"mean", "std", "seeds"}` or None; `base`: metric -> value or None. A
    metric that no strategy has is left out.
    """
    base = base or {}
    present = [
        metric
        for metric in METRIC_AXES
        if any(finite(entry_of(values, metric)) is not None for values in strategies.values())
    ]
    with rc_context(STYLE):
        height = 1.45 + 0.3 * max(len(strategies), 1)
        figure = Figure(figsize=(8.6, height), dpi=DPI, layout=ConstrainedLayoutEngine(wspace=0.07))
        panels = figure.subplots(1, max(len(present), 1), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, present, strict=False):
            for row, (name, values) in enumerate(strategies.items()):
                mean, std = finite(entry_of(values, metric)), finite(entry_of(values, metric, "std"))
                if mean is None:
                    continue
                axes.errorbar(
                    mean,
                    row,
                    xerr=std,
                    fmt="o",
                    markersize=6.5,
                    capsize=3,
                    linewidth=1.6,
                    color=color_of(name, row),
                )
            reference = finite(base.get(metric))
            if reference is not None:
                axes.axvline(reference, color=MUTED, linewidth=1.2, linestyle="--", zorder=0)
                axes.annotate(
                    "base", (reference, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                    textcoords="offset points", ha="center", va="bottom", fontsize=8, color=MUTED,
                )  # fmt: skip
            axes.xaxis.set_major_locator(ticks(4))
            axes.margins(x=0.12)
            finish(axes, "", METRIC_AXES[metric], "", grid="x")
        if present:
            panels[0].set_yticks(range(len(strategies)), [without_middle(name, 24) for name in strategies])
            panels[0].set_ylim(len(strategies) - 0.4, -0.6)
        else:
            show_no_values(panels[0])
        figure.suptitle("Strategies on held-out examples", x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        return canvas.png(figure)


def paired_differences(differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """A panel per metric: each strategy minus each that it is compared with, its interval, and the units it rests on.

    `differences`: strategy -> other -> metric -> `{"mean", "interval", "values"}` or None. A metric that no pair has is
    left out.
    """
    pairs = [(name, other, metrics) for name, others in differences.items() for other, metrics in others.items()]
    present = [metric for metric in METRIC_AXES if any(metrics.get(metric) for *_, metrics in pairs)]
    with rc_context(STYLE):
        figure = Figure(
            figsize=(8.6, 1.45 + 0.26 * max(len(pairs), 1)), dpi=DPI, layout=ConstrainedLayoutEngine(wspace=0.07)
        )
        panels = figure.subplots(1, max(len(present), 1), sharey=True, squeeze=False)[0]
        positions = {name: position for position, name in enumerate(differences)}  # colours as in the other plots
        for axes, metric in zip(panels, present, strict=False):
            for row, (name, _, metrics) in enumerate(pairs):
                entry = metrics.get(metric)
                if not entry:
                    continue
                color = color_of(name, positions[name])
                if entry["interval"] is not None:
                    axes.plot(entry["interval"], (row, row), color=color, linewidth=1.6)
                values = finite_values(entry["values"])
                axes.plot(values, np.full(len(values), row), "|", color=tint(color, 0.6), markersize=8)
                axes.plot(entry["mean"], row, "o", color=color, markersize=5.5)
            axes.axvline(0, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
            axes.xaxis.set_major_locator(ticks(4))
            axes.margins(x=0.08)
            finish(axes, "", f"difference in\n{METRIC_AXES[metric].partition(chr(10))[0]}", "", grid="x")
        if present:
            names = [f"{without_middle(name, 18)} − {without_middle(other, 18)}" for name, other, _ in pairs]
            panels[0].set_yticks(range(len(pairs)), names)
            panels[0].set_ylim(len(pairs) - 0.4, -0.6)
        else:
            show_no_values(panels[0])
        figure.suptitle("Paired differences, with 95% intervals", x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        return canvas.png(figure)


def stage_costs(costs: Mapping[str, Mapping[str, float]], *, unit: str) -> bytes:
    """One stacked bar per strategy. `costs`: strategy -> stage -> seconds; `unit` says of what (CPU, GPU)."""
    stages = list(dict.fromkeys(stage for its in costs.values() for stage in its))
    with rc_context(STYLE):
        figure, axes = new_figure(8.6, 1.5 + 0.3 * max(len(costs), 1))
        lefts = np.zeros(len(costs))
        for number, stage in enumerate(stages):
            seconds = [its.get(stage, 0.0) for its in costs.values()]
            color = SOURCE_COLORS[number % len(SOURCE_COLORS)]
            axes.barh(
                range(len(costs)),
                seconds,
                left=lefts,
                height=0.7,
                color=color,
                edgecolor="white",
                linewidth=0.6,
                label=stage,
            )
            lefts += seconds
        if stages:
            axes.set_yticks(range(len(costs)), [without_middle(name, 24) for name in costs])
            axes.invert_yaxis()
            figure.legend(loc="outside lower center", ncols=5, handlelength=1.0, handleheight=1.0)
        else:
            show_no_values(axes)
        finish(axes, "Cost by stage", f"{unit} seconds, all trials of a strategy", "", grid="x")
        return canvas.png(figure)
