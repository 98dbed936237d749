"""Plots of a selection and of its results: plain data in, PNG bytes out."""

from prism_assets.plots.canvas import as_data_uri, as_markdown_image
from prism_assets.plots.pool import composition, score_histogram
from prism_assets.plots.results import (
    paired_differences,
    stage_costs,
    strategies_comparison,
)
from prism_assets.plots.training import (
    first_order_gains,
    growing_steps,
    loss_curve,
    predicted_and_measured,
    target_weights,
)

__all__ = [
    "as_data_uri",
    "as_markdown_image",
    "composition",
    "first_order_gains",
    "growing_steps",
    "loss_curve",
    "paired_differences",
    "predicted_and_measured",
    "score_histogram",
    "stage_costs",
    "strategies_comparison",
    "target_weights",
]
