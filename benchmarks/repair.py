"""Can a model that bad SFT data misaligned be repaired by what preference-weighted influence selects? Several seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.repair --json [--seeds 3] [--work FOLDER]

The experiment of examples/repair_forward: a small model from scratch, trained on general and good records, then
misaligned by full fine-tuning on wrong maths, insecure code and false answers; repair candidates of six kinds; targets
are pairs of a safe and an unsafe answer. The clean model is trained once for all seeds. A seed redraws the misaligned
records and their order, the warm-up, the sketch, the random selection and the training order. CPU only.

Per strategy: `misaligned_share` and `good_share` of the selected rows, `auc_good_against_misaligned` (probability that
a good row scores above a misaligned one; strategies with one direction), `auc_maths`, `auc_code` and `auc_answers` (the
same between right and wrong rows of one form), `margin` (mean log-probability of the safe minus that of the unsafe
answer, held-out pairs), `safe_preferred` (share of pairs with a positive margin), `benign_log_prob` (held-out benign
records); `against` holds differences, paired by seed, to the clean and the misaligned model and to other strategies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.real_text import data_folder, example

COUNTERPARTS = ("clean", "misaligned", "random", "uniform", "less")


def run_seed(work: Path, data: Path, seed: int) -> dict[str, Any]:
    """One seed: misalign, select, fine-tune, measure."""
    prepare, measure = example("repair_forward"), example("repair_forward", "measure")
    started = time.process_time()
    folder, clean = work / f"seed-{seed}", work / "clean"
    with redirect_stdout(sys.stderr):
        if not (clean / "config.json").exists():
            prepare.train_clean(prepare.Data(data, 0), clean, 700)
        config = prepare.prepare(data, folder, seed=seed, clean=clean)
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content["seeds"] = [seed]
    for section in ("warmup", "features", "selection"):
        content.setdefault(section, {})["seed"] = seed
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    os.environ |= {"PRISM_CONFIG": str(config), "DAGSTER_HOME": str(folder / "dagster")}
    from benchmarks.project import run_project
    from prism_assets.ops.pipeline import Listener, steps_of

    def note(result: Any) -> None:
        print(f"seed {seed}: {result.step.title} {result.seconds:.0f} s", file=sys.stderr, flush=True)

    run_project(config, steps_of("run")[:-1], Listener(on_result=note))
    return {"seed": seed, **measure.measure(config, clean), "cpu_seconds": time.process_time() - started}


def summary(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and interval over seeds, and differences paired by seed."""
    from prism_assets.stats.seeds import paired_difference, summarize_seeds

    def over_seeds(part: str, name: str) -> dict[str, Any]:
        first = outcomes[0][part][name]
        return {
            metric: summarize_seeds([one[part][name][metric] for one in outcomes])._asdict()
            for metric, value in first.items()
            if isinstance(value, float)
        }

    def values(name: str) -> dict[str, list[float]]:
        part = "models" if name in outcomes[0]["models"] else "strategies"
        numbers = [metric for metric, value in outcomes[0][part][name].items() if isinstance(value, float)]
        return {metric: [one[part][name][metric] for one in outcomes] for metric in numbers}

    strategies = {}
    for name in outcomes[0]["strategies"]:
        others = {other: values(other) for other in COUNTERPARTS if other != name}
        strategies[name] = {
            **over_seeds("strategies", name),
            "against": {
                other: {
                    metric: paired_difference(numbers, theirs[metric])._asdict()
                    for metric, numbers in values(name).items()
                    if metric in theirs
                }
                for other, theirs in others.items()
            },
        }
    return {
        "misaligned_share_of_pool": outcomes[0]["misaligned_share_of_pool"],
        "models": {name: over_seeds("models", name) for name in outcomes[0]["models"]},
        "strategies": strategies,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the seeds that FOLDER does not hold yet, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the projects; by default a temporary one")
    options = parser.parse_args(arguments)
    data = data_folder()
    if data is None or not (data / "safety").is_dir():
        print("The real records are not here: name their folder in PRISM_REAL_DATA.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for seed in range(options.seeds):
            finished = work / f"outcome-{seed}.json"
            if not finished.exists():
                finished.write_text(json.dumps(run_seed(work, data, seed)))
            outcomes.append(json.loads(finished.read_text()))
    result = {"seeds": [one["seed"] for one in outcomes], **summary(outcomes)}
    result["cpu_seconds_per_seed"] = float(np.mean([one["cpu_seconds"] for one in outcomes]))
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{len(outcomes)} seeds; misaligned rows are {result['misaligned_share_of_pool']:.1%} of the pool")
    for name, entry in [*result["models"].items(), *result["strategies"].items()]:
        shown = [f"{metric} {one['mean']:.3f}±{one['std'] or 0:.3f}" for metric, one in entry.items() if "mean" in one]
        print(f"  {name:18}" + "  ".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
