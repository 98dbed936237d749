"""The map of gradient rows: stored features of selected rows and of a sample of the pool, projected to a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.report.rows import Taken, positions_of
from prism_assets.report.wording import clipped
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

# Points of a map: selected rows, and a random sample of the pool.
_SELECTED, _SAMPLED = 400, 600
_NUMBERS_AT_ONCE = 64_000_000  # of the features that are projected: 256 MB as float32
_LONGEST_TEXT = 80  # characters


class Plane(NamedTuple):
    """Rows projected to their first two principal components."""

    points: np.ndarray  # float64 [n, 2]
    shares: list[float]  # of the variance, that each of the two explains


def gradient_map(stage: Stage, taken: Sequence[Taken]) -> dict[str, Any] | None:
    """The points of a target's map, and how they were chosen; None where no strategy reads gradients, or fewer than
    three rows are there.

    The sample is drawn by a fixed seed, so equal pools have equal maps.
    """
    import numpy as np

    pool = next((one.pool for one in taken if one.pool is not None), None)
    if pool is None or pool.size < 3:
        return None
    positions = {one.strategy: positions_of(stage, one, pool) for one in taken}
    # A strategy that takes everything would mark every point.
    chosen = {name: found for name, found in positions.items() if 0 < len(found) < pool.size}
    assert pool.opened.dim is not None  # it has rows
    room = max(50, _NUMBERS_AT_ONCE // pool.opened.dim)
    each = max(1, min(_SELECTED, room // 2) // max(len(chosen), 1))
    sample = np.random.default_rng(0).choice(pool.size, min(_SAMPLED, room // 2, pool.size), replace=False)
    shown = np.unique(np.concatenate([sample, *(_spread(found, each) for found in chosen.values())]))
    plane = principal_plane(pool.stored_vectors(shown))
    rows = pool.rows_at(shown, ("source", "prompt")).to_pylist()
    member = {name: np.isin(shown, found) for name, found in chosen.items()}
    return {
        "sampled": len(sample),
        "pool": pool.size,
        "shares": [round(share, 4) for share in plane.shares],
        "points": [
            {
                "x": round(float(x), 4),
                "y": round(float(y), 4),
                "source": row["source"],
                "text": clipped(row["prompt"], _LONGEST_TEXT),
                "taken": [name for name, its in member.items() if its[at]],
            }
            for at, ((x, y), row) in enumerate(zip(plane.points, rows, strict=True))
        ],
    }


def principal_plane(vectors: np.ndarray) -> Plane:
    """The rows of `vectors` [n, D] along their first two principal components. Of each component the coordinate of
    largest size is positive, so that equal rows give equal points."""
    import numpy as np

    centred = vectors - vectors.mean(axis=0)
    values, basis = np.linalg.eigh((centred @ centred.T).astype(np.float64))  # ascending
    values = np.maximum(values, 0.0)
    points = basis[:, [-1, -2]] * np.sqrt(values[[-1, -2]])
    largest = points[np.abs(points).argmax(axis=0), [0, 1]]
    total = float(values.sum())
    shares = [float(one) / total if total > 0 else 0.0 for one in values[[-1, -2]]]
    return Plane(points * np.where(largest < 0, -1.0, 1.0), shares)


def _spread(ranked: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly from first to last."""
    import numpy as np

    return ranked[np.unique(np.linspace(0, len(ranked) - 1, min(most, len(ranked))).astype(np.int64))]
