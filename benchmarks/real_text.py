"""Real SFT records for benchmarks, and a small model made from them; prints nothing itself."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from prism_assets.stats import ranks

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path | None:
    """The folder of the real data, which PRISM_REAL_DATA names; None where it names none that holds a pool.jsonl."""
    named = os.environ.get("PRISM_REAL_DATA")
    return Path(named) if named and (Path(named) / "pool.jsonl").is_file() else None


def example(name: str, module: str = "prepare") -> ModuleType:
    """A script of the folder examples/, as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_{module}", ROOT / "examples" / name / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sampled(records: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The records whose hashed prompt and completion fall into the share: the same ones in every run."""

    def place(record: dict[str, Any]) -> float:
        text = f"{record['prompt']}\n{record['completion']}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64

    return [record for record in records if place(record) < share]


def spread_out(records: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many records, at equal distances: files are in order of their subtasks, and each keeps its share."""
    if len(records) <= most:
        return list(records)
    return [records[number * len(records) // most] for number in range(most)]


def only(record: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """These fields and no others."""
    return {field: record[field] for field in fields if field in record}


def average_precision(relevant: Sequence[bool], total: int | None = None) -> float:
    """Area under the precision-recall curve of a ranking, best first: the mean over relevant rows of the precision at
    their place (Manning, Raghavan and Schütze 2008, section 8.4). Of `total` relevant rows (by default those of the
    ranking) the ones that the ranking lacks count as never found. NaN without a relevant row. Raises ValueError where
    the ranking holds more than `total`."""
    hits = int(np.count_nonzero(relevant))
    total = hits if total is None else total
    if hits > total:
        raise ValueError(f"The ranking holds {hits} relevant rows of {total}.")
    if total and not hits:
        return 0.0
    found = ranks.average_precision(-np.arange(len(relevant)), np.asarray(relevant))
    return found * hits / total if total else found


def area_under_curve(good: Sequence[float], bad: Sequence[float]) -> float:
    """Probability that a random good row scores above a random bad one, ties counting half (Mann and Whitney 1947)."""
    labels = np.repeat([True, False], [len(good), len(bad)])
    return ranks.area_under_curve(np.concatenate([good, bad]), labels)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file of JSON Lines, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
