"""How much of the spread of scores is the gradients', and how much the sketch's noise."""

import math
from typing import Any, NamedTuple

import numpy as np

from prism_assets.compat import MOST_INDEX_DIMENSIONS

ENOUGH = 0.5  # below it a ranking follows the noise more than the gradients
WANTED = 0.9  # of the advice: the rank correlation with exact scores is about √.9 then


class SketchNoise(NamedTuple):
    """Scores of unit rows beside the error that the sketch makes in one."""

    spread: float  # standard deviation of the scores over the rows
    noise: float  # standard deviation of the sketch's error in a score
    signal: float  # 1 - noise² / spread², at least 0: the share of the variance that is the gradients'
    advised: int | None  # a sketch_dim (a power of two) of which WANTED would be signal; None: none can be named

    def as_notes(self) -> dict[str, Any]:
        """As an artefact notes it."""
        return self._asdict()


def sketch_noise(scores: np.ndarray, query: np.ndarray, dim: int) -> SketchNoise:
    """The noise in scores [n] of unit rows that were sketched to `dim` dimensions K, for a query [C·K] over C
    checkpoints.

    A sketched inner product of unit vectors has the variance (1 + ⟨x, y⟩²) / K at most (Kane & Nelson 2014, see
    `gradients.sketch`), for small ⟨x, y⟩ about 1/K. A score adds those of the checkpoints, times the length of the
    query's block each, so the variance of its error is ‖query‖² / K. To subtract it from the scores' is our own.
    """
    noise = float(np.linalg.norm(query.astype(np.float64))) / math.sqrt(dim)
    variance = float(np.var(scores.astype(np.float64)))
    left = max(variance - noise**2, 0.0)
    signal = left / variance if variance > 0 else 0.0
    advised = None
    if left > 0.02 * variance:  # of less nothing is known but that it is little
        wanted = 2 ** math.ceil(math.log2(dim * noise**2 / left * WANTED / (1 - WANTED)))
        advised = wanted if wanted * len(query) // dim <= MOST_INDEX_DIMENSIONS else None
    return SketchNoise(math.sqrt(variance), noise, signal, advised)
