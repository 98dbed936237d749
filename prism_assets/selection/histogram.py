"""The histogram of all scores of a ranking, as it is noted beside a selection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism_assets.stats.vectors import finite_vector


def score_histogram(
    scores: Sequence[float] | np.ndarray, *, selected: int, bins: int = 60
) -> dict[str, list[float] | list[int] | float | int | None]:
    """Histogram of the influence scores [n] of the pool, with the budget's cut-off.

    `selected` is the number of rows taken from the top; `cutoff` the lowest score taken, None where none is.
    Returns `edges` [bins + 1], `counts` [bins], `cutoff`, `selected`.
    """
    values = finite_vector("scores", scores)
    if not 0 <= selected <= len(values):
        raise ValueError(f"selected is {selected}, but there are {len(values)} scores")
    counts, edges = np.histogram(values, bins=bins)
    cutoff = float(np.partition(values, -selected)[-selected]) if selected else None
    return {"edges": edges.tolist(), "counts": counts.tolist(), "cutoff": cutoff, "selected": int(selected)}
