"""Plots of a selection and of what it bought: plain data in, PNG bytes out.

Drawn with matplotlib's Agg canvas and without pyplot, so nothing global changes and no display is needed.
Missing values (None, NaN) are left out of a plot, and a plot with nothing to show says so. Every image stays
below 60 KB, so that it can be embedded in Dagster metadata and in the report.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image

DPI = 110
INK, MUTED, GRID = "#26303b", "#6b7785", "#e6e9ee"
STRATEGY_COLORS = {
    "prism": "#5a3fd6",
    "uniform": "#0f8f83",
    "less": "#e08a1e",
    "random": "#8c97a6",
    "full": "#3d4856",
}
SPARE_COLORS = ("#d1477d", "#3a86d8", "#7aa52c", "#a0693a", "#b35fd0", "#1fa5c4")
SOURCE_COLORS = (
    "#3a86d8", "#e07b39", "#4a9d5b", "#c94f7c", "#8461c9", "#1fa5a0",
    "#a0693a", "#d4a92a", "#6f7fd9", "#7d9a3c", "#b56576",
)  # fmt: skip
OTHER_COLOR = "#c9cfd8"
METRICS = {
    "target_preference": "target preference\n(mean over examples, τ = 1)",
    "mean_log_prob": "mean log-probability\n(nats per token)",
    "exact_match": "exact match\n(share of examples)",
}
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # names come from data: "$" is a dollar sign
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b9c1cb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def as_markdown_image(png: bytes, alt: str = "plot") -> str:
    """`png` as a Markdown image with a data URI, for Dagster's MetadataValue.md."""
    label = "".join(character for character in alt if character not in "[]()\n\r")
    return f"![{label}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"


def score_histogram(histogram: Mapping[str, Any], *, title: str = "Influence scores of the pool") -> bytes:
    """Distribution of influence scores with the budget's cut-off.

    `histogram`: `edges` [bins + 1], `counts` [bins], and where known `cutoff` (lowest selected score) and
    `selected` (rows taken), as `metrics.score_histogram` returns it. Counts are on a log axis where they span
    more than three orders of magnitude.
    """
    with rc_context(_STYLE):
        figure, axes = _canvas(8.6, 2.8)
        edges = np.asarray(histogram.get("edges") or [], dtype=np.float64)
        counts = np.asarray(histogram.get("counts") or [], dtype=np.float64)
        if (
            len(counts)
            and len(edges) == len(counts) + 1
            and np.isfinite(edges).all()
            and np.nansum(counts) > 0
        ):
            counts = np.nan_to_num(counts)
            cutoff = _number(histogram.get("cutoff"))
            if cutoff is not None:
                axes.axvspan(cutoff, max(edges[-1], cutoff), color=STRATEGY_COLORS["prism"], alpha=0.08, lw=0)
            axes.stairs(counts, edges, fill=True, color="#aab4e8")
            axes.stairs(counts, edges, color=STRATEGY_COLORS["prism"], linewidth=0.8)
            if counts.max() > 1000 * max(counts[counts > 0].min(), 1):
                axes.set_yscale("log")
                axes.set_ylim(bottom=0.7)
            else:
                axes.yaxis.set_major_locator(_ticks(5, integer=True))
            if edges[0] < 0 < edges[-1]:
                axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
            if cutoff is not None:
                axes.axvline(cutoff, color=STRATEGY_COLORS["prism"], linewidth=1.4)
                _cutoff_label(axes, cutoff, edges, histogram.get("selected"))
            axes.xaxis.set_major_locator(_ticks(8))
        else:
            _nothing(axes)
        _finish(axes, title, "influence score", "candidates", grid="y")
        return _png(figure)


def loss_curve(losses: Sequence[float], *, title: str = "Training loss") -> bytes:
    """Loss of each optimiser step [steps] (nats per completion token), with a running mean where there are many."""
    with rc_context(_STYLE):
        figure, axes = _canvas(5.4, 2.6)
        values = _numbers(losses)
        if len(values):
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, color="#aab4e8", linewidth=0.9, marker="." if len(values) == 1 else None)
            window = len(values) // 10
            if window > 1:
                mean = np.convolve(values, np.ones(window) / window, mode="valid")
                axes.plot(steps[window - 1 :], mean, color=STRATEGY_COLORS["prism"], linewidth=1.5)
            axes.xaxis.set_major_locator(_ticks(8, integer=True))
        else:
            _nothing(axes)
        _finish(axes, title, "optimiser step", "loss", grid="y")
        return _png(figure)


def target_weights(
    weights: Sequence[Mapping[str, Any]], *, title: str = "Weight of each target in the direction"
) -> bytes:
    """Target weights of PRISM, sorted, against uniform ones.

    `weights`: a mapping per target with `prism` and `uniform` (shares that sum to 1).
    """
    with rc_context(_STYLE):
        figure, axes = _canvas(5.4, 3.3)
        prism = np.sort(_numbers(row.get("prism") for row in weights))[::-1]
        uniform = _numbers(row.get("uniform") for row in weights)
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
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=_percent_decimals(prism.max())))
            axes.yaxis.set_major_locator(_ticks(5))
            axes.xaxis.set_major_locator(_ticks(6, integer=True))
            axes.set_xlim(0.3, len(prism) + 0.7)
            axes.legend(loc="upper right")
        else:
            _nothing(axes)
        _finish(axes, title, "targets, by weight", "share of the weight", grid="y")
        return _png(figure)


def composition(
    pool: Mapping[str, float],
    selections: Mapping[str, Mapping[str, float]],
    *,
    title: str = "Composition by source",
    most_sources: int = 10,
) -> bytes:
    """Rows by source, as shares: one stacked bar for the pool and one per strategy.

    `pool` and each of `selections`: source -> number of rows. Sources beyond the `most_sources` with the
    largest share in any bar are drawn together as "other".
    """
    rows = {"pool": _shares(pool), **{name: _shares(counts) for name, counts in selections.items()}}
    rows = {name: shares for name, shares in rows.items() if shares}
    largest: dict[str, float] = {}
    for shares in rows.values():
        for source, share in shares.items():
            largest[source] = max(share, largest.get(source, 0.0))
    # One over the limit is drawn by its own name: "other (1 source)" would hide a name and save no colour.
    limit = most_sources if len(largest) > most_sources + 1 else most_sources + 1
    shown = sorted(largest, key=lambda source: (-largest[source], source))[:limit]
    with rc_context(_STYLE):
        figure, axes = _canvas(8.6, 1.3 + 0.3 * max(len(rows), 1) + 0.2 * math.ceil((len(shown) + 1) / 3))
        lefts = np.zeros(len(rows))
        series = [(source, [shares.get(source, 0.0) for shares in rows.values()]) for source in shown]
        other = [
            sum(share for source, share in shares.items() if source not in shown) for shares in rows.values()
        ]
        if any(other):
            series.append((f"other ({len(largest) - len(shown)} sources)", other))
        for number, (source, shares) in enumerate(series):
            color = SOURCE_COLORS[number % len(SOURCE_COLORS)] if source in shown else OTHER_COLOR
            axes.barh(
                range(len(rows)), shares, left=lefts, height=0.72, color=color, edgecolor="white",
                linewidth=0.6, label=_short(source, 34),
            )  # fmt: skip
            for row, share in enumerate(shares):
                if share >= 0.06:
                    axes.text(
                        lefts[row] + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=7.5,
                        color="white" if source in shown else INK,
                    )  # fmt: skip
            lefts += shares
        if rows:
            axes.set_yticks(range(len(rows)), [_short(name, 24) for name in rows])
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            figure.legend(loc="outside lower center", ncols=3, handlelength=1.0, handleheight=1.0)
        else:
            _nothing(axes)
        _finish(axes, title, "share of the rows", "")
        return _png(figure)


def strategies_comparison(
    strategies: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    title: str = "Strategies on held-out examples",
) -> bytes:
    """A panel per metric: each strategy's mean over seeds ± one standard deviation; the base model as a line.

    `strategies`: name -> metric -> `{"mean", "std", "seeds"}` or None; `base`: metric -> value or None. A
    metric that no strategy has is left out.
    """
    base = base or {}
    present = [
        metric
        for metric in METRICS
        if any(_number(_entry(values, metric)) is not None for values in strategies.values())
    ]
    with rc_context(_STYLE):
        height = 1.45 + 0.3 * max(len(strategies), 1)
        figure = Figure(figsize=(8.6, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(wspace=0.07)
        panels = figure.subplots(1, max(len(present), 1), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, present, strict=False):
            for row, (name, values) in enumerate(strategies.items()):
                mean, std = _number(_entry(values, metric)), _number(_entry(values, metric, "std"))
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
                    color=_color(name, row),
                )
            reference = _number(base.get(metric))
            if reference is not None:
                axes.axvline(reference, color=MUTED, linewidth=1.2, linestyle="--", zorder=0)
                axes.annotate(
                    "base", (reference, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                    textcoords="offset points", ha="center", va="bottom", fontsize=8, color=MUTED,
                )  # fmt: skip
            axes.xaxis.set_major_locator(_ticks(4))
            axes.margins(x=0.12)
            _finish(axes, "", METRICS[metric], "", grid="x")
        if present:
            panels[0].set_yticks(range(len(strategies)), [_short(name, 24) for name in strategies])
            panels[0].set_ylim(len(strategies) - 0.4, -0.6)
        else:
            _nothing(panels[0])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        return _png(figure)


def paired_differences(
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]], *, title: str = "Paired differences, with 95% intervals"
) -> bytes:
    """A panel per metric: each strategy less each that it is held against, its interval, and the units it rests on.

    `differences`: strategy -> other -> metric -> `{"mean", "interval", "values"}` or None. A metric that no pair has is
    left out.
    """
    pairs = [(name, other, metrics) for name, others in differences.items() for other, metrics in others.items()]
    present = [metric for metric in METRICS if any(metrics.get(metric) for *_, metrics in pairs)]
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 1.45 + 0.26 * max(len(pairs), 1)), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(wspace=0.07)
        panels = figure.subplots(1, max(len(present), 1), sharey=True, squeeze=False)[0]
        positions = {name: position for position, name in enumerate(differences)}  # colours as in the other plots
        for axes, metric in zip(panels, present, strict=False):
            for row, (name, _, metrics) in enumerate(pairs):
                entry = metrics.get(metric)
                if not entry:
                    continue
                color = _color(name, positions[name])
                if entry["interval"] is not None:
                    axes.plot(entry["interval"], (row, row), color=color, linewidth=1.6)
                values = _numbers(entry["values"])
                axes.plot(values, np.full(len(values), row), "|", color=_tint(color, 0.6), markersize=8)
                axes.plot(entry["mean"], row, "o", color=color, markersize=5.5)
            axes.axvline(0, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
            axes.xaxis.set_major_locator(_ticks(4))
            axes.margins(x=0.08)
            _finish(axes, "", f"difference in\n{METRICS[metric].partition(chr(10))[0]}", "", grid="x")
        if present:
            names = [f"{_short(name, 18)} − {_short(other, 18)}" for name, other, _ in pairs]
            panels[0].set_yticks(range(len(pairs)), names)
            panels[0].set_ylim(len(pairs) - 0.4, -0.6)
        else:
            _nothing(panels[0])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        return _png(figure)


def stage_costs(costs: Mapping[str, Mapping[str, float]], *, unit: str, title: str = "Cost by stage") -> bytes:
    """One stacked bar per strategy. `costs`: strategy -> stage -> seconds; `unit` says of what (CPU, GPU)."""
    stages = list(dict.fromkeys(stage for its in costs.values() for stage in its))
    with rc_context(_STYLE):
        figure, axes = _canvas(8.6, 1.5 + 0.3 * max(len(costs), 1))
        lefts = np.zeros(len(costs))
        for number, stage in enumerate(stages):
            seconds = [its.get(stage, 0.0) for its in costs.values()]
            color = SOURCE_COLORS[number % len(SOURCE_COLORS)]
            axes.barh(
                range(len(costs)), seconds, left=lefts, height=0.7, color=color, edgecolor="white", linewidth=0.6, label=stage
            )
            lefts += seconds
        if stages:
            axes.set_yticks(range(len(costs)), [_short(name, 24) for name in costs])
            axes.invert_yaxis()
            figure.legend(loc="outside lower center", ncols=5, handlelength=1.0, handleheight=1.0)
        else:
            _nothing(axes)
        _finish(axes, title, f"{unit} seconds, all trials of a strategy", "", grid="x")
        return _png(figure)


def first_order_gains(
    first_order: Mapping[str, Any], *, title: str = "Gain after a small step: predicted and measured"
) -> bytes:
    """Change of J after a step along each direction, predicted to first order and measured.

    In a panel of its own: what the same step does to the mean log-probability of held-out examples.
    `first_order`: `step` (its size), and direction name -> `{"predicted", "measured",
    "held_out_mean_log_prob"}`.
    """
    directions = {name: values for name, values in first_order.items() if isinstance(values, Mapping)}
    held_out = {name: _number(values.get("held_out_mean_log_prob")) for name, values in directions.items()}
    widths = [1.7, 1] if any(value is not None for value in held_out.values()) else [1]
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.3), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        drawn = False
        for offset, kind, strength in ((-0.2, "predicted", 0.45), (0.2, "measured", 1.0)):
            for row, (name, values) in enumerate(directions.items()):
                value = _number(values.get(kind))
                if value is not None:
                    drawn = True
                    panels[0].bar(row + offset, value, width=0.37, color=_tint(_color(name, row), strength))
            panels[0].bar(0, 0, color=_tint(INK, strength), label=kind)
        if drawn:
            panels[0].legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.14), handlelength=1.2)
            _named_bars(panels[0], list(directions))
        else:
            _nothing(panels[0])
        step = _number(first_order.get("step"))
        _finish(panels[0], "", "" if step is None else f"step of length {step:.3g}", "change of J", grid="y")
        if len(widths) == 2:
            for row, (name, value) in enumerate(held_out.items()):
                if value is not None:
                    panels[1].bar(row, value, width=0.6, color=_color(name, row))
            _named_bars(panels[1], list(directions))
            _finish(panels[1], "", "held-out examples", "change of mean log-probability", grid="y")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        return _png(figure)


def growing_steps(
    growing: Mapping[str, Any], *, title: str = "Change of J after steps of growing size"
) -> bytes:
    """Change of J by the size of the step, predicted (dashed) and measured (solid), both axes logarithmic.

    `growing`: `probe_step` (the unit of the sizes), `needed` (the size that is asked for), and per direction a list
    of `{"size", "predicted", "measured"}`. A change that is not positive has no place on the axis and is left out.
    """
    unit = growing["probe_step"]
    with rc_context(_STYLE):
        figure, axes = _canvas(5.4, 3.3)
        sizes = set()
        for name in ("prism", "uniform"):
            for kind, style in (("predicted", "--"), ("measured", "-")):
                points = [(step["size"] / unit, step[kind]) for step in growing.get(name) or [] if step[kind] > 0]
                if points:
                    sizes |= {size for size, _ in points}
                    label = name if kind == "measured" else None
                    axes.plot(*zip(*points, strict=True), style, color=_color(name, 0), label=label, marker=".")
        if sizes:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.axvline(growing["needed"] / unit, color=MUTED, linewidth=1, linestyle=":", label="a training step")
            axes.legend(loc="upper left")
        else:
            _nothing(axes)
        _finish(axes, title, "size in probe steps (dashed: predicted)", "change of J", grid="y")
        return _png(figure)


def predicted_and_measured(rows: Sequence[Mapping[str, Any]], *, title: str, xlabel: str) -> bytes:
    """A point for each row: what was `predicted` against what was `measured` (change of J)."""
    with rc_context(_STYLE):
        figure, axes = _canvas(5.4, 3.3)
        points = [(_number(row["predicted"]), _number(row["measured"])) for row in rows]
        points = [point for point in points if None not in point]
        if points:
            axes.axhline(0, color="#b9c1cb", linewidth=0.8)
            axes.plot(*zip(*points, strict=True), "o", color=STRATEGY_COLORS["prism"], markersize=4.5, alpha=0.75)
        else:
            _nothing(axes)
        _finish(axes, title, xlabel, "change of J", grid="y")
        return _png(figure)


def _named_bars(axes: Axes, names: list[str]) -> None:
    crowded = len(names) > 4
    axes.set_xticks(
        range(len(names)), [_short(name, 14) for name in names],
        rotation=60 if crowded else 0, ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else None,
    )  # fmt: skip
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.axhline(0, color="#b9c1cb", linewidth=0.8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.yaxis.set_major_locator(_ticks(5))


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str, grid: str | None = None) -> None:
    if title:
        axes.set_title(title, pad=8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(length=0)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    if grid == "x":
        axes.spines["left"].set_visible(False)


def _ticks(most: int, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=integer, min_n_ticks=1)


def _cutoff_label(axes: Axes, cutoff: float, edges: np.ndarray, selected: Any) -> None:
    on_right = cutoff < edges[0] + 0.6 * (edges[-1] - edges[0])
    label = f"cut-off {cutoff:.3g}"
    count = _number(selected)
    axes.annotate(
        label if count is None else f"{label}\n{count:,.0f} selected", (cutoff, 0.97),
        xycoords=("data", "axes fraction"), xytext=(5 if on_right else -5, 0), textcoords="offset points",
        ha="left" if on_right else "right", va="top", fontsize=8.5, color=STRATEGY_COLORS["prism"],
    )  # fmt: skip


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no values to show", ha="center", va="center", transform=axes.transAxes, color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def _png(figure: Figure) -> bytes:
    """`figure` as a PNG with at most 128 colours: it looks like one in true colour and is smaller."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names of sources may be in any script
        warnings.filterwarnings("ignore", message=".*constrained_layout not applied.*")
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(colors=128, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _entry(values: Mapping[str, Any], metric: str, field: str = "mean") -> Any:
    entry = values.get(metric)
    return entry.get(field) if isinstance(entry, Mapping) else None


def _number(value: Any) -> float | None:
    """`value` as a finite float, None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _numbers(values: Any) -> np.ndarray:
    return np.array([number for value in values if (number := _number(value)) is not None])


def _shares(counts: Mapping[str, float] | None) -> dict[str, float]:
    values = {
        str(name): number
        for name, value in (counts or {}).items()
        if (number := _number(value)) and number > 0
    }
    total = sum(values.values())
    return {name: value / total for name, value in values.items()}


def _color(strategy: str, position: int) -> str:
    return STRATEGY_COLORS.get(strategy, SPARE_COLORS[position % len(SPARE_COLORS)])


def _tint(color: str, strength: float) -> tuple[float, ...]:
    """`color` mixed with white."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))


def _percent_decimals(largest: float) -> int:
    return 0 if largest >= 0.05 else 1 if largest >= 0.005 else 2


def _short(name: str, length: int) -> str:
    """`name` on one line and at most `length` characters, its middle left out: a path's ends tell most."""
    line = " ".join(str(name).split())
    if len(line) <= length:
        return line
    head = (length - 1) // 2
    return f"{line[:head]}…{line[-(length - 1 - head) :]}"
