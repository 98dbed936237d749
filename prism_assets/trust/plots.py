"""Plots of what was predicted against what was measured, in the style of `evaluation.plots`: PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context

from prism_assets.evaluation import plots as base


def growing_steps(growing: Mapping[str, Any], *, title: str = "Change of J after steps of growing size") -> bytes:
    """Predicted (dashed) and measured (solid) change of J by the size of the step, in probe steps, both axes log.

    `growing`: `probe_step`, `needed`, and per direction a list of `{"size", "predicted", "measured"}`. A change that is
    not positive has no place on the axis and is left out.
    """
    with rc_context(base._STYLE):
        figure, axes = base._canvas(5.4, 3.3)
        unit, drawn = growing["probe_step"], False
        for name in ("prism", "uniform"):
            for kind, style in (("predicted", "--"), ("measured", "-")):
                points = [(one["size"] / unit, one[kind]) for one in growing.get(name) or [] if one[kind] > 0]
                if points:
                    drawn = True
                    label = name if kind == "measured" else None
                    axes.plot(*zip(*points, strict=True), style, color=base.STRATEGY_COLORS[name], label=label, marker=".")
        if drawn:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.axvline(growing["needed"] / unit, color=base.MUTED, linewidth=1, linestyle=":")
            axes.legend(loc="upper left", title="solid: measured, dashed: predicted")
        else:
            base._nothing(axes)
        base._finish(axes, title, "size of the step, in probe steps (dotted: a training step)", "change of J", grid="y")
        return base._png(figure)


def predicted_and_measured(rows: Sequence[Mapping[str, Any]], *, title: str, xlabel: str) -> bytes:
    """One point for each row: `predicted` against `measured` (change of J)."""
    with rc_context(base._STYLE):
        figure, axes = base._canvas(5.4, 3.3)
        points = [(base._number(row["predicted"]), base._number(row["measured"])) for row in rows]
        points = [point for point in points if None not in point]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=base.STRATEGY_COLORS["prism"], markersize=4.5, alpha=0.75)
            axes.axhline(0, color="#b9c1cb", linewidth=0.8)
        else:
            base._nothing(axes)
        base._finish(axes, title, xlabel, "change of J", grid="y")
        return base._png(figure)
