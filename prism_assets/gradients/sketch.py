"""Projections of gradients that keep inner products: a sparse Johnson-Lindenstrauss sketch, and none at all.

The sketch of a gradient vector g with D coordinates is S g with S of shape [K, D], one entry of +1 or -1 in
each column. S is never formed. Each parameter tensor is flattened and cut into blocks of K coordinates; a
block goes through its own random permutation of K places and its own random signs, and the blocks are summed
in order. Two coordinates of one block never meet, two of different blocks (or tensors) meet with probability
1/K, and the signs are independent, so

    E <Sx, Sy> = <x, y>        Var <Sx, Sy> <= (|x|^2 |y|^2 + <x, y>^2) / K

(Kane & Nelson, "Sparser Johnson-Lindenstrauss transforms", 2014, with one non-zero a column; the same second
moments as feature hashing, Weinberger et al., 2009). A permutation is applied by a gather, so nothing is
added atomically and the order of every sum is fixed.

Permutation and signs of a tensor come from a counter-based generator (Philox) keyed by SHA-256 of (seed, dim,
name): they depend neither on the shard, the batch, the device nor on which other tensors exist.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Projection(Protocol):
    """What a gradient pass needs from a sketch: a size, and addition of one parameter's share."""

    dim: int
    least_parameters: int  # of a gradient that it is meant for

    def add_(self, out: Tensor, name: str, gradients: Tensor) -> None:
        """Add the projection of one parameter's gradients [b, *shape] to `out` [b, dim], in place."""
        ...

    def sketch_vector(self, vector: Mapping[str, Tensor]) -> Tensor:
        """The projection [dim] of one vector, given as parameter name -> tensor."""
        ...


class _Plan(NamedTuple):
    """Where the n coordinates of one flattened tensor go: m = n // K whole blocks, rest = n % K."""

    source: Tensor  # int32 [m*K]: output place k of block j reads coordinate source[j*K + k]
    signs: Tensor  # float [m, K], in the order of the output places
    rest_target: Tensor  # int64 [rest], distinct: the output place of each coordinate after the last whole block
    rest_signs: Tensor  # float [rest]


class Sketch:
    """Sparse Johnson-Lindenstrauss sketch to `dim` dimensions.

    Use it where the gradient has (many) more than `dim` coordinates; below that, `ExactFeatures` is smaller
    and exact.
    """

    def __init__(self, dim: int, seed: int) -> None:
        if dim < 1:
            raise ValueError(f"a sketch needs a positive dimension, not {dim}")
        self.dim = self.least_parameters = int(dim)
        self.seed = int(seed)
        self._plans: dict[tuple[str, int, torch.device, torch.dtype], _Plan] = {}

    def add_(self, out: Tensor, name: str, gradients: Tensor) -> None:
        """Adds the sketch of one parameter's gradients to `out`.

        out: [b, K], changed in place; gradients: [b, *shape], the same dtype and device as `out`.
        """
        flat = gradients.flatten(1)  # [b, n]
        batch, size = flat.shape
        plan = self._plan(name, size, flat.device, flat.dtype)
        whole = plan.source.numel()
        if whole:
            placed = flat.index_select(1, plan.source).view(batch, -1, self.dim)  # [b, m, K]
            out += placed.mul_(plan.signs).sum(1)
        if whole < size:
            # The places are distinct, so each output coordinate gets one addition: the order cannot matter.
            out.index_add_(1, plan.rest_target, flat[:, whole:] * plan.rest_signs)

    def sketch_vector(self, vector: Mapping[str, Tensor]) -> Tensor:
        """The sketch [K] (float32, or float64 of float64) of one vector given as parameter name -> tensor."""
        return _one_row(self, vector)

    def _plan(self, name: str, size: int, device: torch.device, dtype: torch.dtype) -> _Plan:
        key = (name, size, device, dtype)
        if key not in self._plans:
            plan = _draw_plan(self.seed, self.dim, name, size)
            self._plans[key] = _Plan(
                plan.source.to(device), plan.signs.to(device, dtype),
                plan.rest_target.to(device), plan.rest_signs.to(device, dtype),
            )  # fmt: skip
        return self._plans[key]


class ExactFeatures:
    """No sketch: the parameters' gradients side by side in the order given; `dim` is their number.

    For small models, where a few hundred thousand coordinates a row are affordable.
    """

    least_parameters = 0

    def __init__(self, parameter_shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._slices: dict[str, slice] = {}
        start = 0
        for name, shape in parameter_shapes.items():
            size = math.prod(shape)
            self._slices[name] = slice(start, start + size)
            start += size
        self.dim = start

    def add_(self, out: Tensor, name: str, gradients: Tensor) -> None:
        """Adds one parameter's gradients [b, *shape] to its columns of `out` [b, dim], in place."""
        out[:, self._slices[name]] += gradients.flatten(1)

    def sketch_vector(self, vector: Mapping[str, Tensor]) -> Tensor:
        """One vector, given as parameter name -> tensor, as a flat tensor [dim]; a missing parameter counts
        as zero."""
        return _one_row(self, vector)


def _one_row(projection: Projection, vector: Mapping[str, Tensor]) -> Tensor:
    """One vector, given as parameter name -> tensor, as what a projection makes of it [dim]."""
    first = next(iter(vector.values()))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    out = torch.zeros(1, projection.dim, dtype=dtype, device=first.device)
    for name, value in vector.items():
        projection.add_(out, name, value.to(dtype).unsqueeze(0))
    return out[0]


class DirectionProducts:
    """No sketch of the gradient at all, but its exact inner products with Q given directions; `dim` is Q.

    directions: each maps parameter names to tensors of the parameters' shapes; a missing parameter counts as zero.
    Each is multiplied by itself, so that a product does not depend, to the last bit, on the other directions.
    """

    least_parameters = 0

    def __init__(self, directions: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> None:
        self.dim = len(directions)
        self._columns: dict[str, list[tuple[int, Tensor]]] = {}  # name -> the directions that have it, [p] each
        for position, direction in enumerate(directions):
            for name, value in direction.items():
                self._columns.setdefault(name, []).append((position, value.flatten().to(device, dtype)))

    def add_(self, out: Tensor, name: str, gradients: Tensor) -> None:
        """Adds one parameter's share of the products of gradients [b, *shape] to `out` [b, Q], in place."""
        flat = gradients.flatten(1)
        for position, direction in self._columns.get(name, ()):
            out[:, position] += flat @ direction

    def sketch_vector(self, vector: Mapping[str, Tensor]) -> Tensor:
        """The products [Q] of one vector, given as parameter name -> tensor."""
        first = next(iter(vector.values()))
        out = torch.zeros(1, self.dim, dtype=first.dtype, device=first.device)
        for name, value in vector.items():
            self.add_(out, name, value.unsqueeze(0))
        return out[0]


class SideBySide:
    """Two projections of the same gradients, the values of the second behind those of the first."""

    def __init__(self, first: Projection, second: Projection) -> None:
        self.first, self.second = first, second
        self.dim = first.dim + second.dim
        self.least_parameters = max(first.least_parameters, second.least_parameters)

    def add_(self, out: Tensor, name: str, gradients: Tensor) -> None:
        """Adds both projections of one parameter's gradients [b, *shape] to `out` [b, dim], in place."""
        self.first.add_(out[:, : self.first.dim], name, gradients)
        self.second.add_(out[:, self.first.dim :], name, gradients)

    def sketch_vector(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Both projections [dim] of one vector."""
        return torch.cat([self.first.sketch_vector(vector), self.second.sketch_vector(vector)])


def _draw_plan(seed: int, dim: int, name: str, size: int) -> _Plan:
    """Draws the permutations and signs of one tensor, on the CPU.

    Uses raw generator words only (their sequence is fixed by the Philox algorithm, while numpy may change how
    it turns words into permutations): a block's permutation is the order of its K words, its signs are their
    lowest bits.
    """
    digest = hashlib.sha256(f"{seed}\n{dim}\n{name}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    blocks = -(-size // dim)
    words = generator.random_raw(blocks * dim).reshape(blocks, dim)
    order = np.argsort(words, axis=1, kind="stable").astype(np.int32)  # [blocks, K]: a permutation a block
    signs = np.where(words & np.uint64(1), np.float32(1), np.float32(-1))
    whole, rest = divmod(size, dim)
    source = order[:whole] + (np.arange(whole, dtype=np.int64) * dim)[:, None]
    if size < 2**31:
        source = source.astype(np.int32)
    return _Plan(
        source=torch.from_numpy(source.reshape(-1)),
        signs=torch.from_numpy(signs[:whole].copy()),
        rest_target=torch.from_numpy(order[whole:, :rest].reshape(-1).astype(np.int64)),
        rest_signs=torch.from_numpy(signs[whole:, :rest].reshape(-1).copy()),
    )
