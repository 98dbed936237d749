"""How far a ranking moves with the seed of the warm-up, which nobody chooses: by length of the warm-up and LoRA rank.

    python -m benchmarks.stability --json [--models smollm2] [--rows 80] [--seeds 2] [--arms short long] [--work FOLDER]

The warm-up's seed draws the sample, the order of its batches and the first factor A of LoRA, through which a gradient
reaches the features: after few steps B is near zero, so the features are the base model's gradients in r random
directions. Each arm runs the product up to the target directions on the same rows of a real pool and the same targets
(gsm8k and mmlu, PRISM_REAL_DATA), once for each seed; settings are the defaults but for what its name says.

JSON: `models` → model → arm → `cpu_seconds_warmup` (of one seed) and, for every target and strategy, `spearman` and
`overlap_10` (of the top 10%): mean over the pairs of seeds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import logging
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.precision import STRATEGIES, TARGETS, build, compared, scores
from benchmarks.real_text import data_folder, example
from benchmarks.remove import MODELS, run, with_settings

ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "short": {"warmup": {"epochs": 1}},  # min_rows of it: 64, four steps at 2e-5
    "short, rank 64": {"warmup": {"epochs": 1}, "lora": {"rank": 64, "alpha": 128}},
    "long": {"warmup": {"share": 1.0, "epochs": 4, "learning_rate": 2e-4}},
}


def measured(model: Path, data: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All arms on one model. What is finished is found again in the lake of its folder."""
    found: dict[str, Any] = {}
    for name in options.arms:
        of_seed, spent = [], 0.0
        for seed in range(options.seeds):
            folder = work / f"{model.name}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            config = build(folder, model, data, {"dtype": "float32", "seed": seed}, options.rows, options.examples)
            with_settings(config, **ARMS[name])
            stage = run(config, "Target directions", TARGETS)
            of_seed.append(scores(stage))
            spent = (stage.warmup.notes.get("cost") or {}).get("cpu_seconds", 0.0)
            print(f"{model.name} {name} seed {seed}: warm-up {spent:.0f} CPU s", file=sys.stderr)
        found[name] = {"cpu_seconds_warmup": spent, **_between(of_seed)}
        print(f"{model.name} {name}: {json.dumps(found[name])}", file=sys.stderr)
    return found


def _between(of_seed: list[dict[str, dict[str, dict[str, float]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Target → strategy → means over the pairs of seeds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for target in TARGETS:
        for strategy in STRATEGIES:
            pairs = [
                compared(left[target][strategy], right[target][strategy]) for left, right in combinations(of_seed, 2)
            ]
            found.setdefault(target, {})[strategy] = {
                key: float(np.mean([one[key] for one in pairs])) for key in ("spearman", "overlap_10")
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--examples", type=int, default=16, help="of a target")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/models"), help="where the models are, or are put")
    parser.add_argument("--work", type=Path, help="where lakes stay, so that a run goes on")
    options = parser.parse_args()
    data = data_folder()
    if data is None:
        raise SystemExit("benchmarks.stability needs real data: set PRISM_REAL_DATA to a folder with pool.jsonl")
    logging.getLogger("prism_assets").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as draft:
        work = options.work or Path(draft)
        models = {
            name: measured(example("real_models", "fetch").fetch(name, options.folder), data, options, work)
            for name in options.models
        }
    result = {"models": models}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
