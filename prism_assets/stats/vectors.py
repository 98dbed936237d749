"""Checked vectors for statistics."""

from typing import Any

import numpy as np


def finite_vector(name: str, values: Any) -> np.ndarray:
    """`values` as float64 [n]. Raises ValueError, naming it and the first positions, where one is not finite, or n is
    0."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} needs a vector of at least one value, got shape {vector.shape}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise ValueError(f"{name} is not finite at position(s) {bad[:5].tolist()}, {len(bad)} of {len(vector)}")
    return vector
