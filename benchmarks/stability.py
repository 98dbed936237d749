"""How far a ranking moves with the seed of the warm-up, and how much of that is the noise of the sketch.

    python -m benchmarks.stability --json [--models smollm2] [--arms short] [--exact] [--rows 80] [--work FOLDER]

The warm-up's seed draws the sample, the order of its batches and the first factor A of LoRA, through which a gradient
reaches the features; and another A gives another error of the sketch. Each arm runs the product up to the target
directions on the same rows of a real pool and the same targets (gsm8k and mmlu, PRISM_REAL_DATA), once for each seed;
settings are the defaults but for what its name says. `--exact` scores all rows again without the sketch.

JSON: `models` → model → arm → `between_seeds` → target → strategy → `spearman` and `overlap_10` (of the top 10%), means
over the pairs of seeds; with `--exact` → target → `exact`, likewise for prism; and `against_exact` → target →
`spearman`, `spread` (standard deviation of the exact scores) and `noise` (of the difference), means over the seeds;
`cpu_seconds_warmup` of one seed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.precision import STRATEGIES, TARGETS, build, command, compared, run_models, scores
from benchmarks.remove import run, with_settings
from prism_assets.stats.ranks import spearman

Scores = dict[str, dict[str, float]]

ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "short": {"warmup": {"epochs": 1}},  # min_rows of it: 64, four steps at 2e-5
    "short, sketch 65536": {"warmup": {"epochs": 1}, "features": {"sketch_dim": 65536}},
    "long": {"warmup": {"share": 1.0, "epochs": 4, "learning_rate": 2e-4}},
}


def measured(model: Path, data: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All arms on one model. What is finished is found again in the lake of its folder."""
    found: dict[str, Any] = {}
    for name in options.arms:
        of_seed, exact, spent = [], [], 0.0
        for seed in range(options.seeds):
            folder = work / f"{model.name}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            config = build(folder, model, data, {"dtype": "float32", "seed": seed}, options.rows, options.examples)
            with_settings(config, **ARMS[name])
            stage = run(config, "Index", TARGETS)
            of_seed.append(scores(stage))
            if options.exact:
                exact.append(exact_scores(stage, options.rows))
            spent = (stage.warmup.notes.get("cost") or {}).get("cpu_seconds", 0.0)
            print(f"{model.name} {name} seed {seed}: warm-up {spent:.0f} CPU s", file=sys.stderr)
        found[name] = {"cpu_seconds_warmup": spent, "between_seeds": _between(of_seed, exact)}
        if exact:
            found[name]["against_exact"] = _against(of_seed, exact)
        print(f"{model.name} {name}: {json.dumps(found[name])}", file=sys.stderr)
    return found


def exact_scores(stage: Any, rows: int) -> Scores:
    """Target → id of a row → its score along prism's direction, without the sketch."""
    from prism_assets.selection.query import query_index

    return {
        target: {row["id"]: row["score"] for row in query_index(stage, target=target, k=rows, rerank=1.0)}
        for target in TARGETS
    }


def _between(of_seed: Sequence[Mapping[str, Scores]], exact: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """Target → strategy, or `exact` → means over the pairs of seeds."""
    found: dict[str, dict[str, Any]] = {}
    for target in TARGETS:
        rankings = {strategy: [one[target][strategy] for one in of_seed] for strategy in STRATEGIES}
        rankings |= {"exact": [one[target] for one in exact]} if exact else {}
        for name, ranked in rankings.items():
            pairs = [compared(left, right) for left, right in combinations(ranked, 2)]
            means = {key: float(np.mean([one[key] for one in pairs])) for key in ("spearman", "overlap_10")}
            found.setdefault(target, {})[name] = means
    return found


def _against(of_seed: Sequence[Mapping[str, Scores]], exact: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Target → how far sketched scores along prism's direction are from exact ones, means over the seeds."""
    found = {}
    for target in TARGETS:
        each = []
        for sketched, true in zip(of_seed, exact, strict=True):
            ids = sorted(true[target])
            left = np.array([sketched[target]["prism"][one] for one in ids])
            right = np.array([true[target][one] for one in ids])
            each.append((float(spearman(left, right) or 0.0), right.std(), (left - right).std()))
        means = np.mean(each, axis=0).tolist()
        found[target] = dict(zip(("spearman", "spread", "noise"), means, strict=True))
    return found


def main() -> None:
    parser = command(__doc__, ARMS, rows=80, examples=16)
    parser.add_argument("--exact", action="store_true", help="score all rows without the sketch too: a pass a target")
    parser.add_argument("--seeds", type=int, default=2)
    run_models("benchmarks.stability", parser.parse_args(), measured)


if __name__ == "__main__":
    main()
