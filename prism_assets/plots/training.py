"""Plots of training and of directions: losses, weights, steps against predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from prism_assets.plots import canvas
from prism_assets.plots.canvas import (
    DPI,
    INK,
    MUTED,
    STRATEGY_COLORS,
    STYLE,
    color_of,
    finish,
    finite,
    finite_values,
    new_figure,
    percent_decimals,
    show_no_values,
    ticks,
    tint,
    without_middle,
)


def loss_curve(losses: Sequence[float]) -> bytes:
    """Loss of each optimiser step [steps] (nats per completion token), with a running mean where there are many."""
    with rc_context(STYLE):
        figure, axes = new_figure(5.4, 2.6)
        values = finite_values(losses)
        if len(values):
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, color="#aab4e8", linewidth=0.9, marker="." if len(values) == 1 else None)
            window = len(values) // 10
            if window > 1:
                mean = np.convolve(values, np.ones(window) / window, mode="valid")
                axes.plot(steps[window - 1 :], mean, color=STRATEGY_COLORS["prism"], linewidth=1.5)
            axes.xaxis.set_major_locator(ticks(8, integer=True))
        else:
            show_no_values(axes)
        finish(axes, "Training loss", "optimiser step", "loss", grid="y")
        return canvas.png(figure)


def target_weights(weights: Sequence[Mapping[str, Any]]) -> bytes:
    """Target weights of PRISM, sorted, against uniform ones.

    `weights`: a mapping per target with `prism` and `uniform` (shares that sum to 1).
    """
    with rc_context(STYLE):
        figure, axes = new_figure(5.4, 3.3)
        prism = np.sort(finite_values(row.get("prism") for row in weights))[::-1]
        uniform = finite_values(row.get("uniform") for row in weights)
        if len(prism):
            ranks = np.arange(1, len(prism) + 1)
            if len(prism) <= 60:
                axes.bar(ranks, prism, width=0.8, color=STRATEGY_COLORS["prism"], label="prism")
            else:
                axes.stairs(
                    prism,
                    np.arange(len(prism) + 1) + 0.5,
                    fill=True,
                    color=STRATEGY_COLORS["prism"],
                    label="prism",
                )
            level = float(uniform.mean()) if len(uniform) else 1.0 / len(prism)
            axes.axhline(level, color=STRATEGY_COLORS["uniform"], linewidth=1.6, label="uniform")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=percent_decimals(prism.max())))
            axes.yaxis.set_major_locator(ticks(5))
            axes.xaxis.set_major_locator(ticks(6, integer=True))
            axes.set_xlim(0.3, len(prism) + 0.7)
            axes.legend(loc="upper right")
        else:
            show_no_values(axes)
        finish(axes, "Weight of each target in the direction", "targets, by weight", "share of the weight", grid="y")
        return canvas.png(figure)


def first_order_gains(first_order: Mapping[str, Any]) -> bytes:
    """Change of J after a step along each direction, predicted to first order and measured.

    In a panel of its own: what the same step does to the mean log-probability of held-out examples.
    `first_order`: `step` (its size), and direction name -> `{"predicted", "measured",
    "held_out_mean_log_prob"}`.
    """
    directions = {name: values for name, values in first_order.items() if isinstance(values, Mapping)}
    held_out = {name: finite(values.get("held_out_mean_log_prob")) for name, values in directions.items()}
    widths = [1.7, 1] if any(value is not None for value in held_out.values()) else [1]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.3), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        drawn = False
        for offset, kind, strength in ((-0.2, "predicted", 0.45), (0.2, "measured", 1.0)):
            for row, (name, values) in enumerate(directions.items()):
                value = finite(values.get(kind))
                if value is not None:
                    drawn = True
                    panels[0].bar(row + offset, value, width=0.37, color=tint(color_of(name, row), strength))
            panels[0].bar(0, 0, color=tint(INK, strength), label=kind)
        if drawn:
            panels[0].legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.14), handlelength=1.2)
            _named_bars(panels[0], list(directions))
        else:
            show_no_values(panels[0])
        step = finite(first_order.get("step"))
        finish(panels[0], "", "" if step is None else f"step of length {step:.3g}", "change of J", grid="y")
        if len(widths) == 2:
            for row, (name, value) in enumerate(held_out.items()):
                if value is not None:
                    panels[1].bar(row, value, width=0.6, color=color_of(name, row))
            _named_bars(panels[1], list(directions))
            finish(panels[1], "", "held-out examples", "change of mean log-probability", grid="y")
        figure.suptitle(
            "Gain after a small step: predicted and measured", x=0.01, ha="left", fontsize=10.5, fontweight="bold"
        )
        return canvas.png(figure)


def growing_steps(growing: Mapping[str, Any]) -> bytes:
    """Changes of J and of the held-out score by the size of the step, predicted (dashed) and measured (solid), all axes
    logarithmic.

    `growing`: `probe_step` (the unit of the sizes), `needed` (the size that is asked for), `pairs` (whether the
    held-out score is a margin), and per direction a list of `{"size", "predicted", "measured", "held_out_predicted",
    "held_out_measured"}`. A change that is not positive has no place on the axis and is left out.
    """
    score = "mean margin" if growing.get("pairs") else "mean log-probability"
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.3), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, 2)
        _growth(panels[0], growing, "", "Change of J after steps of growing size", "change of J")
        _growth(panels[1], growing, "held_out_", "Held-out records", f"change of the {score}")
        return canvas.png(figure)


def _growth(axes: Any, growing: Mapping[str, Any], prefix: str, title: str, ylabel: str) -> None:
    unit = growing["probe_step"]
    sizes = set()
    for position, name in enumerate(name for name, steps in growing.items() if isinstance(steps, list)):
        for kind, style in (("predicted", "--"), ("measured", "-")):
            known = [(step["size"] / unit, step.get(prefix + kind, 0.0)) for step in growing[name]]
            points = [(size, change) for size, change in known if change > 0]
            if points:
                sizes |= {size for size, _ in points}
                label = name if kind == "measured" else None
                axes.plot(*zip(*points, strict=True), style, color=color_of(name, position), label=label, marker=".")
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.axvline(growing["needed"] / unit, color=MUTED, linewidth=1, linestyle=":", label="a training step")
        axes.legend(loc="upper left")
    else:
        show_no_values(axes)
    finish(axes, title, "size in probe steps (dashed: predicted)", ylabel, grid="y")


def predicted_and_measured(rows: Sequence[Mapping[str, Any]], *, title: str, xlabel: str) -> bytes:
    """A point for each row: what was `predicted` against what was `measured` (change of J)."""
    with rc_context(STYLE):
        figure, axes = new_figure(5.4, 3.3)
        points = [(finite(row["predicted"]), finite(row["measured"])) for row in rows]
        points = [point for point in points if None not in point]
        if points:
            axes.axhline(0, color="#b9c1cb", linewidth=0.8)
            axes.plot(*zip(*points, strict=True), "o", color=STRATEGY_COLORS["prism"], markersize=4.5, alpha=0.75)
        else:
            show_no_values(axes)
        finish(axes, title, xlabel, "change of J", grid="y")
        return canvas.png(figure)


def _named_bars(axes: Axes, names: list[str]) -> None:
    crowded = len(names) > 4
    axes.set_xticks(
        range(len(names)), [without_middle(name, 14) for name in names],
        rotation=60 if crowded else 0, ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else None,
    )  # fmt: skip
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.axhline(0, color="#b9c1cb", linewidth=0.8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.yaxis.set_major_locator(ticks(5))
