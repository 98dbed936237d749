"""What all plots share: canvas, colours, ticks, and the PNG image at the end."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

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
METRIC_AXES = {
    "target_preference": "target preference\n(mean over examples, τ = 1)",
    "mean_log_prob": "mean log-probability\n(nats per token)",
    "exact_match": "exact match\n(share of examples)",
    "pair_accuracy": "pair accuracy\n(share of pairs)",
    "margin": "margin\n(nats per token)",
    "unwanted_avoided": "unwanted answer avoided\n(share of pairs)",
    "choice_accuracy": "choice accuracy\n(share of records)",
}
STYLE: dict[RcKeyType, Any] = {
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
    return f"![{label}]({as_data_uri(png)})"


def as_data_uri(png: bytes) -> str:
    """`png` as a data URI, for a page that holds its pictures."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of width × height inches with one pair of axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, grid: Literal["both", "x", "y"] | None = None) -> None:
    """Title, axis labels and grid lines of finished axes."""
    if title:
        axes.set_title(title, pad=8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(length=0)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    if grid == "x":
        axes.spines["left"].set_visible(False)


def ticks(most: int, integer: bool = False) -> MaxNLocator:
    """At most so many ticks at round numbers; `integer`: at whole numbers only."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=integer, min_n_ticks=1)


def show_no_values(axes: Axes) -> None:
    """Say that there are no values to show, in place of ticks."""
    axes.text(0.5, 0.5, "no values to show", ha="center", va="center", transform=axes.transAxes, color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def png(figure: Figure) -> bytes:
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


def entry_of(values: Mapping[str, Any], metric: str, field: str = "mean") -> Any:
    """A field of a metric's entry, None where the entry is no mapping."""
    entry = values.get(metric)
    return entry.get(field) if isinstance(entry, Mapping) else None


def finite(value: Any) -> float | None:
    """`value` as a finite float, None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def finite_values(values: Any) -> np.ndarray:
    """The finite numbers among values, float64 [n]."""
    return np.array([number for value in values if (number := finite(value)) is not None])


def shares_of(counts: Mapping[str, float] | None) -> dict[str, float]:
    """Name -> share of the total; counts that are not positive are left out."""
    values = {str(name): number for name, value in (counts or {}).items() if (number := finite(value)) and number > 0}
    total = sum(values.values())
    return {name: value / total for name, value in values.items()}


def color_of(strategy: str, position: int) -> str:
    """The colour of a strategy: its own, or a spare one by its position."""
    return STRATEGY_COLORS.get(strategy, SPARE_COLORS[position % len(SPARE_COLORS)])


def tint(color: str, strength: float) -> tuple[float, ...]:
    """`color` mixed with white."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))


def percent_decimals(largest: float) -> int:
    """Decimals of percentages on an axis whose largest value (a share) is this."""
    return 0 if largest >= 0.05 else 1 if largest >= 0.005 else 2


def without_middle(name: str, length: int) -> str:
    """`name` on one line and at most `length` characters, its middle left out: a path is recognised by its ends."""
    line = " ".join(str(name).split())
    if len(line) <= length:
        return line
    head = (length - 1) // 2
    return f"{line[:head]}…{line[-(length - 1 - head) :]}"
