"""Segments: one immutable FAISS index file each, written whole, checked before it is mapped.

A *segment* is an `IndexScalarQuantizer` of half precision and inner products: n rows of d values, 2 d bytes a row.
"""

from __future__ import annotations

import copy
import os
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prism_assets.compat import delete_scanner
from prism_assets.errors import DamagedSegment

STORAGE = "float16"  # of the values of a row: numpy's half precision is FAISS's
MAGIC = b"IxSQ"  # FAISS's first four bytes of a scalar quantizer
# Its header: magic, d, rows, two unused, trained, metric, type, range statistic and its argument, d, bytes a row,
# number of trained values, bytes of codes.
LAYOUT = struct.Struct("<4siqqq?iiifQQQQ")
ROW_CHUNK = 512  # rows converted and multiplied at a time: 2 MiB of float32 at d = 1,024, about a cache


class SegmentPart(NamedTuple):
    """Rows first_row … first_row + rows of a segment file: what one of several compacted segments became."""

    path: Path
    first_row: int
    rows: int


class Segment:
    """One opened segment: its rows as a view of the mapped file, and FAISS's dot products over them.

    The index's `search` keeps a heap and its `range_search` is slow (15 times, in FAISS 1.15); the scanner that
    inverted lists use runs at the speed of memory and takes any slice of codes.
    """

    def __init__(self, path: Path, index: Any):
        import faiss

        self.path, self.index = path, index  # the index owns the mapping: keep it as long as the view
        self.size, self.dim = int(index.ntotal), int(index.d)
        nbytes = self.size * index.code_size
        codes = faiss.rev_swig_ptr(index.codes.data(), nbytes) if nbytes else np.empty(0, np.uint8)
        self.values = codes.view(STORAGE).reshape(self.size, self.dim)

    def part(self, first_row: int, rows: int) -> Segment:
        """These rows as a segment of their own, over the same mapping."""
        if first_row < 0 or rows < 0 or first_row + rows > self.size:
            raise ValueError(f"{self.path} has {self.size} rows: there is no part of {rows} from row {first_row}")
        view = copy.copy(self)
        view.size, view.values = rows, self.values[first_row : first_row + rows]
        return view

    def scan(self, query: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Scores of the rows start..stop, float32 [stop - start]. Raises FloatingPointError, see `scan_rows`."""
        return self._scan_codes(query, start, stop, selector=None, expected=stop - start)

    def scan_rows(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores of the ascending rows [m], float32 [m]. Raises FloatingPointError for one that is not finite."""
        import faiss

        first, last = int(rows[0]), int(rows[-1]) + 1
        wanted = np.zeros(last, bool)
        wanted[rows] = True
        bitmap = faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))  # pyright: ignore[reportCallIssue]
        return self._scan_codes(query, first, last, selector=bitmap, expected=len(rows))

    def _scan_codes(self, query: np.ndarray, start: int, stop: int, selector: Any, expected: int) -> np.ndarray:
        import faiss

        identifiers = np.arange(start, stop, dtype=np.int64)
        scanner = self.index.sq.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, False, selector, False)
        found = faiss.RangeSearchResult(1, True)
        partial = faiss.RangeSearchPartialResult(found)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            scanner.set_query(faiss.swig_ptr(query))
            scanner.set_list(0, 0.0)
            scanner.scan_codes_range(
                stop - start,
                faiss.swig_ptr(self.values[start:stop].view(np.uint8)),
                faiss.swig_ptr(identifiers),
                -np.inf,
                partial.new_result(0),
            )
        finally:
            delete_scanner(scanner)
        partial.finalize()
        number = int(faiss.rev_swig_ptr(found.lims, 2)[1])
        if number != expected:  # a score of minus infinity or NaN: nothing else is left out
            raise FloatingPointError(
                f"{self.path}: {expected - number} of the rows {start} to {stop} have no "
                "finite score for this query; is the query of unit size?"
            )
        return faiss.rev_swig_ptr(found.distances, number).copy()


class _Header(NamedTuple):
    """What a segment file says of itself before its codes."""

    dim: int
    rows: int
    metric: int
    code_bytes: int  # that follow the header


def open_segment(path: Path) -> Segment:
    """The file memory-mapped; no more than its header is read. Raises DamagedSegment where it is no whole segment."""
    import faiss

    # FAISS reads a mapped file without looking where it ends: a truncated one is a segmentation fault. So the
    # header is checked here first.
    header = _read_header(path)
    if header.metric != faiss.METRIC_INNER_PRODUCT:
        raise DamagedSegment(path, "is a FAISS index, but not of inner products")
    expected = LAYOUT.size + header.code_bytes
    if header.code_bytes != header.rows * header.dim * np.dtype(STORAGE).itemsize:
        raise DamagedSegment(
            path,
            f"its header contradicts itself: {header.rows} {STORAGE} rows of "
            f"{header.dim} values in {header.code_bytes} bytes",
        )
    if (size := path.stat().st_size) != expected:
        raise DamagedSegment(path, f"has {size} bytes instead of {expected}: it is truncated or was overwritten")
    try:
        return Segment(path, faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
    except RuntimeError as error:
        raise DamagedSegment(path, f"cannot be read by FAISS ({error})") from error


def _read_header(path: Path) -> _Header:
    """Parse FAISS's header of a segment; DamagedSegment for anything else."""
    import faiss

    try:
        with path.open("rb") as file:
            head = file.read(LAYOUT.size)
    except OSError as error:
        raise DamagedSegment(path, f"cannot be read ({error.strerror})") from error
    magic = head[:4]
    if magic != MAGIC:
        raise DamagedSegment(path, f"is no segment: it starts with {magic!r}" if magic else "is empty")
    if len(head) < LAYOUT.size:
        raise DamagedSegment(path, f"has {len(head)} bytes, less than its header of {LAYOUT.size}")
    _, dim, rows, _, _, trained, metric, *quantizer = LAYOUT.unpack(head)
    if dim < 1 or rows < 0 or not trained:
        raise DamagedSegment(path, f"its header is no segment's: {rows} rows of {dim} values")
    kind, _, _, quantizer_dim, code_size, training_values, code_bytes = quantizer
    if (kind, quantizer_dim, code_size, training_values) != (faiss.ScalarQuantizer.QT_fp16, dim, 2 * dim, 0):
        raise DamagedSegment(path, "is a FAISS scalar quantizer, but not of half precision")
    return _Header(dim, rows, metric, code_bytes)


def empty_index(dim: int) -> Any:
    """A FAISS index of half precision and inner products without rows."""
    import faiss

    index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True  # half precision has nothing to train
    return index


def write_index(index: Any, path: Path) -> None:
    """Write the index beside `path`, see that it reads back whole, then rename it into place.

    Raises OSError where it cannot be written; then there is no file.
    """
    import faiss

    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        faiss.write_index(index, str(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if open_segment(temporary).size != index.ntotal:
            raise RuntimeError("it does not read back whole")
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:  # FAISS raises RuntimeError where the disk is full
        raise OSError(
            f"{path}: the segment of {index.ntotal} rows ({index.ntotal * index.code_size} bytes) could "
            f"not be written: {error}. Is the disk full?"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_same_dim(segments: Sequence[Segment]) -> None:
    """Raises ValueError, naming two of them, for segments of different dimensions."""
    for segment in segments:
        if segment.dim != segments[0].dim:
            raise ValueError(
                f"segments of different dimensions: {segments[0].path} has {segments[0].dim}, "
                f"{segment.path} has {segment.dim}; they belong to different feature versions"
            )
