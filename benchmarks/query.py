"""Queries at size: 300,000 rows of 1,024 in 30 half-precision segments, the top 5%, one target and 32.

    python -m benchmarks.query --json

The same question is put to numpy: its float32 product with all rows, then argpartition (and sorting what is returned).
Times are medians of interleaved repetitions, so that other work on the machine weighs on both alike; the ratio is ours
over numpy's. Peak memory is that of a fresh process that opens the rows and answers one query, minus what it used
before it opened them (libraries): numpy loads its float32 matrix from disk, the store maps its segments.

Exact means: every returned score lies within 1e-5 of the float64 product of the stored values, and no row that is left
out has a float64 product above the last returned score by more than that.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prism_assets.resources.index.search import SegmentedIndex, TopK
from prism_assets.resources.index.store import VectorStore

TOLERANCE = 1e-5
CHUNK = 10_000


def unit_rows(number: int, dim: int, seed: int) -> np.ndarray:
    """Random rows of unit length, float32 [number, dim]."""
    rows = np.random.default_rng(seed).standard_normal((number, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def write(folder: Path, rows: int, dim: int, segments: int) -> list[Path]:
    """Segments of random unit rows, and the stored values as one float32 matrix for numpy."""
    store = VectorStore(device="cpu")
    paths = []
    matrix = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float32, shape=(rows, dim))
    for number, part in enumerate(np.array_split(np.arange(rows), segments)):
        vectors = unit_rows(len(part), dim, seed=number).astype(np.float16)
        matrix[part] = vectors
        paths.append(folder / f"segment-{number:03d}.faiss")
        store.write_segment(paths[-1], vectors)
    matrix.flush()
    return paths


def by_numpy(matrix: np.ndarray, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and scores of the k best of each query, best first."""
    scores = queries @ matrix.T if len(queries) > 1 else (matrix @ queries[0])[None]
    answers = []
    for one in scores:
        best = np.argpartition(one, len(one) - k)[len(one) - k :]
        best = best[np.argsort(-one[best], kind="stable")]
        answers.append((best, one[best]))
    return answers


def interleaved(repeats: int, *works: Callable[[], Any]) -> list[float]:
    """The median seconds of each piece of work, done in turn."""
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(repeats):
        for work, taken in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def is_exact(index: SegmentedIndex, matrix: np.ndarray, queries: np.ndarray, answers: list[TopK], k: int) -> bool:
    """Against float64 products of the stored values."""
    wide = queries.astype(np.float64)
    products = np.concatenate(
        [matrix[first : first + CHUNK].astype(np.float64) @ wide.T for first in range(0, len(matrix), CHUNK)]
    )
    firsts = np.concatenate([[0], np.cumsum(index.sizes)])
    for query, answer in enumerate(answers):
        rows = firsts[answer.segment] + answer.row
        left_out = np.ones(len(matrix), dtype=bool)
        left_out[rows] = False
        right = (
            len(rows) == k == len(np.unique(rows))
            and np.abs(answer.scores - products[rows, query]).max() <= TOLERANCE
            and products[left_out, query].max(initial=-np.inf) <= answer.scores[-1] + TOLERANCE
        )
        if not right:
            return False
    return True


def peak_of(way: str, folder: Path, queries: int, k: int, dim: int) -> float:
    """MiB that a fresh process needs at its peak to open the rows and answer, beyond its libraries."""
    command = [sys.executable, "-m", "benchmarks.query", "--peak-of", way, str(folder), str(queries), str(k), str(dim)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(answer.stdout)


def measure_peak(way: str, folder: Path, queries: int, k: int, dim: int) -> float:
    """Runs in the fresh process. The warm-up on a small index loads libraries and starts their threads."""
    asked = unit_rows(queries, dim, seed=-1 % 2**32)
    with tempfile.TemporaryDirectory() as small:
        (path,) = write(Path(small), 2 * 64, dim, 1)
        VectorStore(device="cpu").open([path]).top_k_many(asked, 5)
        by_numpy(np.load(Path(small) / "rows.npy"), asked, 5)
    before = peak_mib()
    if way == "numpy":
        by_numpy(np.load(folder / "rows.npy"), asked, k)
    else:
        index = VectorStore(device="cpu").open(sorted(folder.glob("*.faiss")))
        index.top_k(asked[0], k) if queries == 1 else index.top_k_many(asked, k)
    return peak_mib() - before


def peak_mib() -> float:
    """Largest resident set of this process so far, mapped files included. (`getrusage` counts the parent's too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def benchmark(
    folder: Path, *, rows: int, dim: int, segments: int, share: float, many: int, repeats: int
) -> dict[str, Any]:
    """The whole measurement."""
    import faiss

    paths = write(folder, rows, dim, segments)
    k = round(rows * share)
    queries = unit_rows(many, dim, seed=-1 % 2**32)
    matrix = np.load(folder / "rows.npy")
    index = VectorStore(device="cpu").open(paths)
    ours, numpys = interleaved(repeats, lambda: index.top_k(queries[0], k), lambda: by_numpy(matrix, queries[:1], k))
    ours_many, numpys_many = interleaved(
        max(3, repeats // 3), lambda: index.top_k_many(queries, k), lambda: by_numpy(matrix, queries, k)
    )
    answers = [index.top_k(queries[0], k), *index.top_k_many(queries, k)]
    exact = is_exact(index, matrix, np.concatenate([queries[:1], queries]), answers, k)
    alike = all(
        np.array_equal(a, b) for a, b in zip(answers[0], answers[1], strict=True)
    )  # one by one and in a batch, to the last bit
    index = matrix = None  # unmapped before what follows is measured
    peaks = {
        f"{name}{suffix}": peak_of(way, folder, number, k, dim)
        for way, name in (("store", "peak_mib"), ("numpy", "numpy_peak_mib"))
        for number, suffix in ((1, ""), (many, f"_{many}"))
    }
    return {
        "rows": rows,
        "dim": dim,
        "segments": segments,
        "k": k,
        "threads": faiss.omp_get_max_threads(),
        "ratio_numpy": ours / numpys,
        f"ratio_numpy_{many}": ours_many / numpys_many,
        "exact": exact,
        "batch_equals_single": alike,
        "seconds": ours,
        "numpy_seconds": numpys,
        f"seconds_{many}": ours_many,
        f"numpy_seconds_{many}": numpys_many,
        **peaks,
        "memory_ratio_numpy": peaks["peak_mib"] / peaks["numpy_peak_mib"],
    }


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--peak-of"]:
        way, folder, queries, k, dim = sys.argv[2:]
        print(measure_peak(way, Path(folder), int(queries), int(k), int(dim)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.05, help="of the rows that a query returns")
    parser.add_argument("--many", type=int, default=32, help="targets of the query for many")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prism-query-"))
    os.environ.setdefault("PYTHONPATH", os.getcwd())
    try:
        result = benchmark(
            folder,
            rows=arguments.rows,
            dim=arguments.dim,
            segments=arguments.segments,
            share=arguments.share,
            many=arguments.many,
            repeats=arguments.repeats,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
