"""Which part of the ranking matters? R-precision of the gradient strategies under other settings, without fine-tuning.

    OMP_NUM_THREADS=1 python -m benchmarks.ranking --json --work FOLDER [--seeds 10] [--variants temperature-3 sgd …]

Works on the projects of `benchmarks.quality --work FOLDER` (those that are missing are written), in their lakes: a
variant is the project's settings with one key changed, run through the pipeline up to the target directions. Features
that a variant shares with the default are found, not computed. R-precision is the share of right rows among the first
n of the ranking, n being their number in the pool; precision is their share within the budget. CPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import GRADIENT, SITUATIONS, project_settings, right_rows, write_project

# One section of prism.yaml changed at a time. A temperature of 1,000 is `uniform` but for rounding.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "temperature-0.1": {"preference": {"temperature": 0.1}},
    "temperature-0.3": {"preference": {"temperature": 0.3}},
    "temperature-3": {"preference": {"temperature": 3.0}},
    "temperature-10": {"preference": {"temperature": 10.0}},
    "sgd": {"features": {"optimizer": "sgd"}},
    "adam_step": {"features": {"optimizer": "adam_step"}},
    "sketch-1024": {"features": {"sketch_dim": 1024}},
    "sketch-16384": {"features": {"sketch_dim": 16384}},
    "checkpoints-4": {"warmup": {"checkpoints": 4}},
    "score-sum": {"preference": {"score": "sum"}},
    # A score is divided by its number of tokens, or by about their mean: what is left is the weighting by length.
    "score-sum-temperature-5": {"preference": {"score": "sum", "temperature": 5.0}},
    "fisher-0.01": {"curvature": {"kind": "fisher", "damping": 0.01}},
    "fisher-0.1": {"curvature": {"kind": "fisher", "damping": 0.1}},
    "rerank-2": {"selection": {"rerank": 2.0}},
    "rerank-4": {"selection": {"rerank": 4.0}},
    "rerank-4-fisher-0.1": {"selection": {"rerank": 4.0}, "curvature": {"kind": "fisher", "damping": 0.1}},
    "rerank-4-score-sum-temperature-5": {
        "selection": {"rerank": 4.0},
        "preference": {"score": "sum", "temperature": 5.0},
    },
    "warmup-20%": {"warmup": {"share": 0.2}},
    "rerank-4-warmup-20%": {"selection": {"rerank": 4.0}, "warmup": {"share": 0.2}},
}


def varied(settings: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """The settings with keys of some sections changed."""
    return settings.model_copy(
        update={section: getattr(settings, section).model_copy(update=keys) for section, keys in changes.items()}
    )


def precisions(folder: Path, seed: int, changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """R-precision and precision at the budget, per situation and strategy with a direction, of one project under one
    variant."""
    from prism_assets.ops.home import instance_of
    from prism_assets.ops.pipeline import run_pipeline, steps_of

    situations = list(SITUATIONS)
    if not (folder / "prism.yaml").exists():
        write_project(folder, seed, situations)
    settings = varied(project_settings(folder, seed, situations), changes)
    os.environ |= {"PRISM_CONFIG": str(folder / "prism.yaml"), "DAGSTER_HOME": str(folder / "dagster")}
    from prism_assets import build_definitions, open_stage
    from prism_assets.project import Project
    from prism_assets.selection.query import query_index

    until = next(at for at, step in enumerate(steps_of("run")) if "target_direction" in step.assets) + 1
    with instance_of(settings) as instance:
        run_pipeline(Project.of(settings), build_definitions(settings), instance, steps=steps_of("run")[:until])
    stage = open_stage(settings)
    pool = stage.shown("live_pool")
    budget = max(1, round(settings.selection.budget.amount * pool.notes["canonical_rows"]))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in situations:
        right = set(SITUATIONS[name].right)
        number = right_rows(stage.lake, pool, right).num_rows
        found[name] = {}
        for strategy in GRADIENT:
            rows = query_index(
                stage, target=name, strategy=strategy, k=max(number, budget),
                rerank=settings.selection.rerank,
            )  # fmt: skip
            is_right = [row["source"] in right for row in rows]
            found[name][strategy] = {
                "r_precision": float(np.mean(is_right[:number])),
                "precision": float(np.mean(is_right[:budget])),
            }
    return found


def summary(measured: dict[str, dict[int, dict[str, dict[str, dict[str, float]]]]]) -> dict[str, Any]:
    """Per variant, situation and strategy the summary over seeds, and the paired change of it against the default."""
    from prism_assets.stats.seeds import paired_difference, summarize_seeds

    result: dict[str, Any] = {}
    for variant, seeds in measured.items():
        shared = [seed for seed in seeds if seed in measured["default"]]

        def values(of: str, name: str, strategy: str, metric: str, shared: list[int] = shared) -> list[float]:
            return [measured[of][seed][name][strategy][metric] for seed in shared]

        result[variant] = {
            name: {
                strategy: {
                    **{
                        metric: summarize_seeds(values(variant, name, strategy, metric))._asdict()
                        for metric in ("r_precision", "precision")
                    },
                    "against_default": paired_difference(
                        values(variant, name, strategy, "r_precision"),
                        values("default", name, strategy, "r_precision"),
                    )._asdict(),
                }
                for strategy in GRADIENT
            }
            for name in SITUATIONS
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measures what FOLDER does not hold yet, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args(arguments)
    measured: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        folder = options.work.resolve() / f"all-{seed}"
        for variant in dict.fromkeys(["default", *options.variants]):
            finished = folder / f"ranking-{variant}.json"
            if not finished.exists():
                started = time.process_time()
                outcome = precisions(folder, seed, VARIANTS[variant])
                finished.write_text(json.dumps(outcome))
                print(f"seed {seed}, {variant}: {time.process_time() - started:.0f} CPU s", file=sys.stderr, flush=True)
            measured.setdefault(variant, {})[seed] = json.loads(finished.read_text())
    result = summary(measured)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for variant, situations in result.items():
        print(f"\n{variant}, {len(measured[variant])} seeds: R-precision ({', '.join(GRADIENT)})")
        for name, strategies in situations.items():
            print(f"  {name:17}" + "  ".join(f"{one['r_precision']['mean']:.3f}" for one in strategies.values()))


if __name__ == "__main__":
    main()
