"""Exact top-k over many segments: a `SegmentedIndex` answers a query as if they were one.

Exactness. A row's score is FAISS's single-precision dot product of the query with that row alone, always in
the same order of summation: it does not depend on the segment the row lies in, on its neighbours, on the
number of threads, on the device, or on the other queries of a batch. One query is answered by scanning the
codes with FAISS's scanner on all cores. A batch is first multiplied in blocks (a matrix product, on the CPU
or on a GPU), which narrows the rows down to those that the rounding error of that product cannot exclude;
those are then scored as above. So `top_k_many(queries, k)[i]` equals `top_k(queries[i], k)` to the last
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from prism_assets.resources.index.segments import ROW_CHUNK, Segment, require_same_dim

QUERY_BLOCK = 32  # queries multiplied together: 32 x rows x 4 bytes of scores are held at a time
SCAN_QUERIES = 3  # up to this many queries are scanned one by one; above, the matrix product is faster
GPU_FAISS_MAX_K = 2048  # FAISS's limit on k on a GPU
GPU_FAISS_SPARE = 64  # rows asked for beyond k, so that the last one proves that nothing was cut off
SINGLE_ROUNDING = 2.0**-24  # unit round-off of float32


class TopK(NamedTuple):
    """The best rows of one query, by descending score, ties by (segment, row)."""

    scores: np.ndarray  # float32 [k']
    segment: np.ndarray  # int32 [k'], position of the segment among the opened paths
    row: np.ndarray  # int64 [k'], row within the segment


class SegmentedIndex:
    """Exact inner-product search over memory-mapped segments, as if they were one index.

    `allowed` in the methods below is one boolean mask [n_i] per segment, or None where every row of the
    segment may be returned; None in its place allows everything.
    """

    def __init__(self, segments: Sequence[Segment], device: str = "cpu"):
        require_same_dim(segments)
        self._segments = list(segments)
        self._device = device
        self.sizes: list[int] = [segment.size for segment in segments]
        self.total: int = sum(self.sizes)
        self.dim: int | None = segments[0].dim if segments else None
        self._offsets = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).astype(np.int64)

    def scores(self, query: np.ndarray) -> list[np.ndarray]:
        """Scores of every row for one query [d]: one float32 [n_i] per segment."""
        return np.split(self._scan(self._queries(query)[0]), self._offsets[1:-1]) if self._segments else []

    def vectors(self, segment: int, rows: np.ndarray) -> np.ndarray:
        """These rows [m] of one segment, float32 [m, d]; no other is read."""
        return self._segments[segment].values[rows].astype(np.float32)

    def top_k(
        self,
        query: np.ndarray,
        k: int,
        allowed: Sequence[np.ndarray | None] | None = None,
        *,
        with_ties: bool = False,
    ) -> TopK:
        """The k best allowed rows for one query [d]; fewer where fewer are allowed, any k.

        `with_ties` returns also every row whose score equals that of the k-th: a caller that breaks ties by
        another order (an identifier) needs them to cut at the same place whatever the order of the segments.
        """
        return self._top_k(self._queries(query), k, allowed, with_ties)[0]

    def top_k_many(
        self,
        queries: np.ndarray,
        k: int,
        allowed: Sequence[np.ndarray | None] | None = None,
        *,
        with_ties: bool = False,
    ) -> list[TopK]:
        """`top_k` of each of the queries [q, d], bit for bit, in a fraction of the time of asking one by
        one.
        """
        return self._top_k(self._queries(queries, many=True), k, allowed, with_ties)

    def _top_k(self, queries: np.ndarray, k: int, allowed, with_ties: bool) -> list[TopK]:
        if k < 0:
            raise ValueError(f"k is {k}: it must not be negative")
        mask = self._mask(allowed)
        number_allowed = self.total if mask is None else int(mask.sum())
        if k == 0 or number_allowed == 0:
            return [self._top_k_of(np.empty(0, np.int64), np.empty(0, np.float32), 0, False) for _ in queries]
        k = min(k, number_allowed)
        if self._device == "cpu" and len(queries) <= SCAN_QUERIES:
            every_row = np.arange(self.total) if mask is None else np.flatnonzero(mask)
            return [
                self._top_k_of(every_row, scores if mask is None else scores[mask], k, with_ties)
                for scores in map(self._scan, queries)
            ]
        results = []
        for start in range(0, len(queries), QUERY_BLOCK):
            block = queries[start : start + QUERY_BLOCK]
            candidates = self._faiss_gpu_candidates(block, k) if mask is None else None
            if candidates is None:
                candidates = self._product_candidates(block, k, mask)
            for rows, scores in zip(candidates, self._scan_rows(block, candidates), strict=True):
                results.append(self._top_k_of(rows, scores, k, with_ties))
        return results

    def _top_k_of(self, rows: np.ndarray, scores: np.ndarray, k: int, with_ties: bool) -> TopK:
        """The k best of rows [m] (ascending positions over all segments) with their scores [m]."""
        if k < len(rows):
            best = np.flatnonzero(scores >= _kth_largest(scores, k))
            rows, scores = rows[best], scores[best]
        order = np.argsort(-scores, kind="stable")  # stable: ties stay in order of (segment, row)
        if not with_ties:
            order = order[:k]
        rows, scores = rows[order], scores[order]
        segment = np.searchsorted(self._offsets, rows, side="right") - 1
        return TopK(scores, segment.astype(np.int32), rows - self._offsets[segment])

    # Scanning: one query over codes, in FAISS.

    def _scan(self, query: np.ndarray) -> np.ndarray:
        """Scores of every row, float32 [total]."""
        out = np.empty(self.total, np.float32)

        def scan(piece: tuple[int, int, int]) -> None:
            i, start, stop = piece
            first = self._offsets[i]
            out[first + start : first + stop] = self._segments[i].scan(query, start, stop)

        _side_by_side(scan, self._pieces())
        return out

    def _scan_rows(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Scores of the ascending rows [m_i] of each query, float32 [m_i]."""
        out = [np.empty(len(wanted), np.float32) for wanted in rows]
        bounds = [np.searchsorted(wanted, self._offsets).tolist() for wanted in rows]
        # Segment by segment, so that the queries find it in the cache. In one thread: these scans are so
        # short that two threads would spend more time on handing the interpreter lock over than on
        # computing.
        for i, segment in enumerate(self._segments):
            for q in range(len(rows)):
                start, stop = bounds[q][i : i + 2]
                if start < stop:
                    out[q][start:stop] = segment.scan_rows(queries[q], rows[q][start:stop] - self._offsets[i])
        return out

    def _pieces(self) -> list[tuple[int, int, int]]:
        """(segment, start, stop): segments, cut so that no core idles, for work side by side."""
        step = max(ROW_CHUNK, -(-self.total // (4 * _threads())))
        return [
            (i, start, min(start + step, size)) for i, size in enumerate(self.sizes) for start in range(0, size, step)
        ]

    # Batches: a matrix product narrows the rows down.

    def _product_candidates(self, queries: np.ndarray, k: int, mask: np.ndarray | None) -> list[np.ndarray]:
        """Rows that may be among the k best of each query, ascending: a superset of them."""
        approximate = self._product(queries)  # [q, total]
        if mask is not None:
            approximate[:, ~mask] = -np.inf
        # Two float32 dot products of the same pair differ by at most twice the bound, so the k-th best
        # score is at least the k-th best product minus that, and the product of a row among the best at
        # least that minus it again.
        slack = 2 * self._product_error(queries)
        out: list[Any] = [None] * len(queries)

        def cut(i: int) -> None:
            threshold = _kth_largest(approximate[i], k).astype(np.float64) - 2 * slack[i]
            out[i] = np.flatnonzero(approximate[i] >= max(threshold, np.finfo(np.float32).min))

        _side_by_side(cut, range(len(queries)))
        return out

    def _product(self, queries: np.ndarray) -> np.ndarray:
        """All scores [q, total] in float32, by products of chunks of rows, in any order of summation.

        On `cuda` the rows are copied chunk by chunk. Not run on a GPU yet.
        """
        import torch

        chunk = ROW_CHUNK if self._device == "cpu" else 64 * ROW_CHUNK
        columns = torch.from_numpy(queries).to(self._device).T.contiguous()  # [d, q]
        out = np.empty((len(queries), self.total), np.float32)

        def multiply(piece: tuple[int, int, int]) -> None:
            i, start, stop = piece
            values = torch.from_numpy(self._segments[i].values[start:stop])
            buffer = torch.empty((min(chunk, len(values)), values.shape[1]), dtype=torch.float32, device=self._device)
            for first in range(0, len(values), chunk):
                rows = values[first : first + chunk]
                product = buffer[: len(rows)].copy_(rows) @ columns  # [rows, q]
                offset = self._offsets[i] + start + first
                out[:, offset : offset + len(rows)] = product.T.cpu().numpy()

        with _plain_products(torch):
            _side_by_side(multiply, self._pieces())
        return out

    def _product_error(self, queries: np.ndarray) -> np.ndarray:
        """Bound on the rounding error of a float32 dot product, in any order, float64 [q]:
        |error| <= d u / (1 - d u) * ||q|| * max ||x||, u = 2^-24 (Higham, Accuracy and Stability, sec. 3.1).
        """
        du = queries.shape[1] * SINGLE_ROUNDING
        return du / (1 - du) * np.linalg.norm(queries.astype(np.float64), axis=1) * self._largest_norm

    @cached_property
    def _largest_norm(self) -> float:
        """The largest Euclidean norm of a row, with room for rounding."""
        import torch

        largest = np.zeros(len(self._segments))

        def measure(i: int) -> None:
            for start in range(0, self.sizes[i], ROW_CHUNK):
                rows = torch.from_numpy(self._segments[i].values[start : start + ROW_CHUNK]).float()
                largest[i] = max(largest[i], float(torch.linalg.vector_norm(rows, dim=1).max()))

        with _plain_products(torch):
            _side_by_side(measure, range(len(self._segments)))
        return 1.001 * float(largest.max())

    # FAISS on a GPU, for small k.

    @cached_property
    def _faiss_gpu_index(self) -> Any | None:
        """All rows as one float32 `GpuIndexFlatIP`; None where FAISS has no GPU, or they would fill more than
        half of its free memory. Not run on a GPU yet.
        """
        import faiss

        if self._device != "cuda" or not hasattr(faiss, "GpuIndexFlatIP") or faiss.get_num_gpus() == 0:
            return None
        import torch

        assert self.dim is not None  # it has segments
        if 4 * self.total * self.dim > torch.cuda.mem_get_info()[0] // 2:
            return None
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = False  # half precision there would round the query as well
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), self.dim, config)
        for segment in self._segments:
            index.add(segment.values.astype(np.float32))
        return index

    def _faiss_gpu_candidates(self, queries: np.ndarray, k: int) -> list[np.ndarray] | None:
        """As `_product_candidates`, by FAISS's own top-k; None where it cannot serve: no FAISS on a GPU, k
        above its limit, or near ties at the cut that it may have resolved otherwise. Not run on a GPU yet.
        """
        wanted = min(k + GPU_FAISS_SPARE, self.total)
        if wanted > GPU_FAISS_MAX_K or self._faiss_gpu_index is None:
            return None
        scores, rows = self._faiss_gpu_index.search(queries, wanted)
        proven = scores[:, k - 1] - scores[:, -1] > 4 * self._product_error(queries)
        return [np.sort(found) for found in rows] if wanted == self.total or proven.all() else None

    # Input.

    def _queries(self, queries: np.ndarray, many: bool = False) -> np.ndarray:
        """Checked queries as contiguous float32 [q, d]."""
        queries = np.asarray(queries)
        wanted = "[q, d]" if many else "[d]"
        if queries.ndim != (2 if many else 1) or (self.dim is not None and queries.shape[-1] != self.dim):
            raise ValueError(
                f"queries of shape {list(queries.shape)} do not fit an index of d = {self.dim}: "
                f"the shape must be {wanted}"
            )
        checked = np.ascontiguousarray(np.atleast_2d(queries), np.float32)
        if not np.isfinite(checked).all():
            raise ValueError(f"query {int(np.argmin(np.isfinite(checked).all(axis=1)))} has a value that is not finite")
        return checked

    def _mask(self, allowed: Sequence[np.ndarray | None] | None) -> np.ndarray | None:
        """One boolean mask [total], or None where everything is allowed."""
        if allowed is None:
            return None
        if len(allowed) != len(self._segments):
            raise ValueError(f"{len(allowed)} masks for {len(self._segments)} segments")
        if all(mask is None for mask in allowed):
            return None
        masks = [
            np.ones(size, bool) if mask is None else np.asarray(mask)
            for mask, size in zip(allowed, self.sizes, strict=True)
        ]
        for i, (mask, size) in enumerate(zip(masks, self.sizes, strict=True)):
            if mask.dtype != np.bool_ or mask.shape != (size,):
                raise ValueError(
                    f"mask {i} is {mask.dtype} of shape {list(mask.shape)}; "
                    f"{self._segments[i].path} needs bool of shape [{size}]"
                )
        return np.concatenate(masks)


def _kth_largest(values: np.ndarray, k: int) -> np.float32:
    return np.partition(values, len(values) - k)[len(values) - k]


def _threads() -> int:
    import faiss

    return faiss.omp_get_max_threads()  # honours OMP_NUM_THREADS and the cores this process may use


def _side_by_side(work: Callable[[Any], None], pieces: Sequence[Any]) -> None:
    """Do independent pieces of work on all cores: FAISS and numpy leave the interpreter lock while they
    compute.
    """
    if _threads() == 1 or len(pieces) == 1:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(work, pieces):
            pass


@contextmanager
def _plain_products(torch: Any) -> Iterator[None]:
    """Float32 products without TF32 or bfloat16 shortcuts, each on the thread that asks for it.

    The number of threads is inherited by threads that start inside, so `_side_by_side` does not compete with
    torch's own; the caller's settings come back afterwards.
    """
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
