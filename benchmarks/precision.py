"""Base weights in bfloat16 against float32: what it saves on this machine, and what it does to rankings.

    python -m benchmarks.precision --json [--models smollm2 gemma3_270m] [--rows 200] [--folder runs/models] [--work F]

Three arms run the product up to the target directions, on the same rows of a real pool and the same targets (gsm8k and
mmlu, PRISM_REAL_DATA): `float32`, `bfloat16` (`model.dtype`, which holds for the warm-up, candidates and targets
alike), and `other_warmup`, float32 with another seed of the warm-up: how far a ranking moves for reasons that nobody
chose. `float32` runs whatever `--arms` says. Settings are the defaults but for a warm-up of one epoch.

JSON: `models` → model → `cpu_seconds_a_row` → arm → `warm-up` (a row and epoch) and `features`; and `against_float32` →
arm → target → strategy → `overlap_5` and `overlap_10`, the shares of the top 5% and 10% of float32 that the arm's have,
and `spearman` of all scores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.real_text import data_folder, example, only, read_lines, spread_out, write_lines
from benchmarks.remove import MODELS, run
from prism_assets.stats.ranks import spearman

# Of a model's folder, the data's, the options and a folder for lakes: what is found.
Measured = Callable[[Path, Path, argparse.Namespace, Path], dict[str, Any]]
ARMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "seed": 0},
    "bfloat16": {"dtype": "bfloat16", "seed": 0},
    "other_warmup": {"dtype": "float32", "seed": 1},
}
TARGETS = ("gsm8k", "mmlu")
STRATEGIES = ("prism", "uniform", "less")
EPOCHS = 1


def build(folder: Path, model: Path, data: Path, arm: dict[str, Any], rows: int, examples: int) -> Path:
    """A project; its prism.yaml."""
    pool = [only(row, ("prompt", "completion")) for row in read_lines(data / "pool.jsonl")]
    write_lines(folder / "inbox" / "pool.jsonl", spread_out(pool, rows))
    targets = {}
    for target in TARGETS:
        files = data / "targets" / target
        records = [only(row, ("prompt", "completion")) for row in read_lines(files / "target.jsonl")]
        write_lines(folder / f"{target}.jsonl", spread_out(records, examples))
        write_lines(folder / f"{target}_eval.jsonl", read_lines(files / "eval.jsonl")[:2])  # never looked at
        targets[target] = {"examples": f"{target}.jsonl", "eval": f"{target}_eval.jsonl"}
    content = {
        "model": {"name": str(model.resolve()), "dtype": arm["dtype"], "device": "cpu"},
        "warmup": {"epochs": EPOCHS, "seed": arm["seed"]},
        "candidates": {"inbox": "inbox", "at_rest_seconds": 0},
        "targets": targets,
        "strategies": list(STRATEGIES),
    }
    config = folder / "prism.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config


def scores(stage: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Target → strategy → id of a row → its score."""
    from prism_assets.selection.direction_artifacts import load_direction
    from prism_assets.selection.pool import indexed_pool

    pool = indexed_pool(stage)
    ids = pool.column("id")["id"].to_pylist()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for target in TARGETS:
        for strategy in STRATEGIES:
            direction = load_direction(stage.lake, stage.shown("target_directions", target, strategy))
            influence = pool.influence(direction.query).tolist()
            found.setdefault(target, {})[strategy] = dict(zip(ids, influence, strict=True))
    return found


def costs(stage: Any, rows: int) -> dict[str, float]:
    """CPU seconds a row: of the warm-up, an epoch, and of the candidates' gradient pass over so many rows."""
    spent: dict[str, float] = {}
    for artifact in stage.lake.artifacts():
        cost = (artifact.notes.get("cost") or {}).get("cpu_seconds", 0.0)
        spent[artifact.table] = spent.get(artifact.table, 0.0) + cost
    sample = stage.lake.read_table(stage.shown("warmup_sample")).num_rows
    return {
        "warm-up": spent["warmup_checkpoints"] / (sample * EPOCHS),
        "features": spent["feature_blocks"] / rows,
    }


def compared(reference: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """How much of the reference's top the other's has, and the rank correlation."""
    ids = sorted(reference)
    left, right = (np.array([one[name] for name in ids]) for one in (reference, other))
    found = {f"overlap_{share}": _overlap(left, right, share) for share in (5, 10)}
    return {**found, "spearman": float(spearman(left, right) or 0.0)}


def _overlap(left: np.ndarray, right: np.ndarray, share: int) -> float:
    most = max(1, round(len(left) * share / 100))
    tops = [set(np.argsort(-one, kind="stable")[:most].tolist()) for one in (left, right)]
    return len(tops[0] & tops[1]) / most


def measured(model: Path, data: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All arms on one model. What is finished is found again in the lake of its folder."""
    found, spent = {}, {}
    arms = {name: arm for name, arm in ARMS.items() if name == "float32" or name in options.arms}
    for name, arm in arms.items():
        config = build(work / f"{model.name}-{name}", model, data, arm, options.rows, options.examples)
        stage = run(config, "Index", TARGETS)
        found[name] = scores(stage)
        spent[name] = costs(stage, len(found[name][TARGETS[0]][STRATEGIES[0]]))
        print(f"{model.name} {name}: {spent[name]}", file=sys.stderr)
    against = {
        name: {
            target: {
                strategy: compared(found["float32"][target][strategy], found[name][target][strategy])
                for strategy in STRATEGIES
            }
            for target in TARGETS
        }
        for name in arms
        if name != "float32"
    }
    return {"rows": options.rows, "cpu_seconds_a_row": spent, "against_float32": against}


def command(doc: str | None, arms: Iterable[str], rows: int, examples: int) -> argparse.ArgumentParser:
    """The options of a benchmark whose arms run on the same rows of a real pool."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms))
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--examples", type=int, default=examples, help="of a target")
    parser.add_argument("--folder", type=Path, default=Path("runs/models"), help="where the models are, or are put")
    parser.add_argument("--work", type=Path, help="where lakes stay, so that a run goes on")
    return parser


def run_models(benchmark: str, options: argparse.Namespace, measured: Measured) -> None:
    """Measure every model that the options name, and print it. Raises SystemExit where there are no real data."""
    data = data_folder()
    if data is None:
        raise SystemExit(f"{benchmark} needs real data: set PRISM_REAL_DATA to a folder with pool.jsonl")
    logging.getLogger("prism_assets").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as draft:
        work = options.work or Path(draft)
        models = {
            name: measured(example("real_models", "fetch").fetch(name, options.folder), data, options, work)
            for name in options.models
        }
    result = {"models": models}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


def main() -> None:
    options = command(__doc__, ARMS, rows=200, examples=24).parse_args()
    run_models("benchmarks.precision", options, measured)


if __name__ == "__main__":
    main()
