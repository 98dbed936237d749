"""The vector store: writes, opens and compacts segments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from prism_assets.errors import NoSuchDevice
from prism_assets.resources.index.search import SegmentedIndex
from prism_assets.resources.index.segments import (
    STORAGE,
    Segment,
    SegmentPart,
    empty_index,
    open_segment,
    require_same_dim,
    write_index,
)

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class VectorStore:
    """FAISS segments of inner-product vectors on local disk."""

    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    # A part of what an index artefact is made from: another form of the rows would be another artefact.
    storage: ClassVar[str] = STORAGE

    def write_segment(self, path: Path, vectors: np.ndarray) -> None:
        """Write `vectors` [n, d] (float16 or float32) as one segment; the file appears whole or not at all.

        Raises ValueError, naming the first row, for values that are not finite in half precision.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] == 0 or vectors.dtype not in (np.float16, np.float32):
            raise ValueError(
                f"{path}: vectors must be float16 or float32 of shape [n, d], "
                f"not {vectors.dtype} of shape {list(vectors.shape)}"
            )
        with np.errstate(over="ignore"):
            stored = vectors.astype(STORAGE, copy=False)
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            cause = (
                f"exceeds the range of {STORAGE}"
                if np.isfinite(vectors[row]).all()
                else "has a value that is not finite"
            )
            raise ValueError(
                f"{path}: row {row} {cause} ({int((~finite).sum())} such rows of {len(vectors)}); "
                "leave these rows out before indexing"
            )
        index = empty_index(vectors.shape[1])
        if len(stored):
            codes = np.ascontiguousarray(stored).view(np.uint8)  # our half-precision values are FAISS's codes
            index.add_sa_codes(codes)
        write_index(index, Path(path))

    def open(self, paths: Sequence[Path | SegmentPart]) -> SegmentedIndex:
        """Open segments, or parts of them, memory-mapped: nothing but their headers is read before the first query.

        Parts of one file share its mapping. Raises DamagedSegment for a file that is truncated or foreign, ValueError
        where dimensions differ or a part lies outside of its file.
        """
        opened: dict[Path, Segment] = {}
        segments = []
        for one in paths:
            path = Path(one.path if isinstance(one, SegmentPart) else one)
            if path not in opened:
                opened[path] = open_segment(path)
            whole = opened[path]
            segments.append(whole.part(one.first_row, one.rows) if isinstance(one, SegmentPart) else whole)
        return SegmentedIndex(segments, self._device())

    def compact(self, paths: Sequence[Path], out: Path) -> list[int]:
        """Write several segments as one, code for code: no score changes.

        Returns the first row of each input in `out`: row r of paths[i] is row offsets[i] + r. The inputs
        stay.
        """
        segments = [open_segment(Path(path)) for path in paths]
        if not segments:
            raise ValueError("compact needs at least one segment")
        require_same_dim(segments)
        index = empty_index(segments[0].dim)
        offsets = []
        for segment in segments:
            offsets.append(int(index.ntotal))
            if segment.size:
                index.add_sa_codes(segment.values.view(np.uint8))
        write_index(index, Path(out))
        return offsets

    def _device(self) -> str:
        if self.device not in DEVICES:
            raise ValueError(f"vector store: device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        if self.device == "cpu":
            return "cpu"
        found = _cuda_found()
        if self.device == "cuda" and not found:
            raise NoSuchDevice(
                "vector store: device is cuda, but torch finds no CUDA device here; set device: cpu or auto"
            )
        return "cuda" if found else "cpu"


def _cuda_found() -> bool:
    """Whether torch sees a CUDA device; without an NVIDIA driver torch is not even imported."""
    if "torch" not in sys.modules and not Path("/proc/driver/nvidia").exists():
        return False
    import torch

    return torch.cuda.is_available()
