"""How many dimensions must a sketch have on a real model? The spread of exact scores, and rankings against them.

    python -m benchmarks.sketch --json [--models smollm2] [--arms sgd adam] [--rows 120] [--work FOLDER]

Rows of a real pool and target examples (PRISM_REAL_DATA): gsm8k and mmlu as they are and against shuffled answers, and
pairs of harmful and honest answers (wrong mathematics, false answers). An arm is a preconditioner of the rows
(`features.optimizer`). Gradients are kept whole, every coordinate of every row, and sketched afterwards by the
product's sketch under several seeds, so that only the sketch differs; the exact scores are inner products of whole
vectors in numpy. About 5 MB a row of SmolLM2 are held in memory, twice.

JSON: `models` → model → arm → target → `spread` (standard deviation of the exact scores along prism's direction) and
`dims` → dimensions → `spearman` (with the exact scores) and `noise_root_dim` (standard deviation of the error times the
root of the dimensions: 1 by theory), means over the sketches' seeds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.precision import TARGETS, build, command, run_models
from benchmarks.real_text import write_lines
from benchmarks.remove import paired, run, with_settings
from prism_assets.stats.ranks import spearman

ARMS = {"sgd": {"optimizer": "sgd"}, "adam": {"optimizer": "adam"}}
DIMS = (4096, 8192, 16384, 65536, 262144)


def measured(model: Path, data: Path, options: Namespace, work: Path) -> dict[str, Any]:
    """All arms on one model. What is finished is found again in the lake of its folder; the whole gradients are not."""
    found = {}
    for arm in options.arms:
        config = build(
            work / f"{model.name}", model, data, {"dtype": "float32", "seed": 0}, options.rows, options.examples
        )
        names = _with_more_targets(config, data, options.examples)
        with_settings(config, features=ARMS[arm])
        stage = run(config, "Target directions", names)
        rows, queries = _whole(stage, names)
        found[arm] = _against_exact(stage, names, rows, queries, options.sketch_seeds)
        print(f"{model.name} {arm}: {json.dumps(found[arm])}", file=sys.stderr)
    return found


def _with_more_targets(config: Path, data: Path, examples: int) -> list[str]:
    """Anchored targets beside the plain ones; the names of all."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    targets = content["targets"]
    for name in TARGETS:
        targets[f"{name}_shuffled"] = {**targets[name], "anchors": "shuffled"}
    for kind, pairs in paired(data).items():
        records = [
            {"prompt": harm["prompt"], "chosen": good["completion"], "rejected": harm["completion"]}
            for harm, good in pairs[: examples + 2]
        ]
        write_lines(config.parent / f"{kind}.jsonl", records[:examples])
        write_lines(config.parent / f"{kind}_eval.jsonl", records[examples:])  # never looked at
        targets[kind] = {"examples": f"{kind}.jsonl", "eval": f"{kind}_eval.jsonl"}
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return list(targets)


def _whole(stage: Any, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Unit gradients of all rows by parameter [n, *shape], and prism's unit direction of each target, at the last
    checkpoint."""
    from prism_assets.corpus.token_tables import from_table
    from prism_assets.features.exact_products import read_vectors
    from prism_assets.features.gradient_pass import gradient_pass
    from prism_assets.gradients.sketch import ExactFeatures
    from prism_assets.gradients.vectors import norm

    shards = [stage.lake.get("candidates", head["fingerprint"]) for head in stage.lake.heads("candidates")]
    examples = [one for shard in shards for one in from_table(stage.lake.read_table(shard))]
    with gradient_pass(stage) as work:
        shapes = work.at(work.checkpoints[-1]).parameter_shapes
        one = work.candidate_rows(examples, projections=[ExactFeatures(shapes)] * len(work.checkpoints))[-1]
    unit = torch.from_numpy(one.rows) / torch.from_numpy(one.norms).float()[:, None]
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    rows = dict(zip(shapes, unit.split(sizes, dim=1), strict=True))
    directions = {}
    for name in names:
        vector = read_vectors(stage.lake, stage.shown("target_directions", name, "prism"))[-1]
        directions[name] = {key: value / norm(vector) for key, value in vector.items()}
    return rows, directions


def _against_exact(
    stage: Any,
    names: list[str],
    rows: dict[str, torch.Tensor],
    directions: dict[str, dict[str, torch.Tensor]],
    seeds: int,
) -> dict[str, Any]:
    from prism_assets.gradients.sketch import Sketch

    exact = {
        name: sum(rows[key].numpy() @ value.flatten().numpy() for key, value in directions[name].items())
        for name in names
    }
    found: dict[str, Any] = {name: {"spread": float(np.std(exact[name])), "dims": {}} for name in names}
    number = len(next(iter(rows.values())))
    for dim in DIMS:
        agreed: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for seed in range(seeds):
            sketch = Sketch(dim, seed)
            placed = torch.zeros(number, dim)
            for key, values in rows.items():
                sketch.add_(placed, key, values)
            for name in names:
                scores = (placed @ sketch.sketch_vector(directions[name])).numpy()
                error = float(np.std(scores - exact[name])) * dim**0.5
                agreed[name].append((float(spearman(scores, exact[name]) or 0.0), error))
        for name in names:
            rank, noise = np.mean(agreed[name], axis=0).tolist()
            found[name]["dims"][dim] = {"spearman": rank, "noise_root_dim": noise}
    return found


def main() -> None:
    parser = command(__doc__, ARMS, rows=120, examples=16)
    parser.add_argument("--sketch-seeds", type=int, default=3)
    run_models("benchmarks.sketch", parser.parse_args(), measured)


if __name__ == "__main__":
    main()
