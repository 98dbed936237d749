"""Does influence find the right kind of data in real text, and does it help? Six targets, a small model, several seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.retrieval --json [--seeds 3] [--work FOLDER]

The real records (folder named by PRISM_REAL_DATA) are sampled to a share of the pool
that is the same in every run, the held-out files to 60 records spread over their subtasks. Too long a record loses the
start of its prompt, as everywhere in the product; one whose completion alone is longer than 384 tokens (some solutions
of math500 and bbh) is refused. A Llama of about 2M parameters is trained from scratch on the sample once and serves all
seeds, so the seeds say nothing of other models. A seed redraws the warm-up, the sketch, the random selection and the
training order. Everything else is the product's own pipeline.

`average_precision` is the area under the precision-recall curve of "comes from a matching source" over the whole
ranking (strategies with one direction; `random` is the share of matching rows). A matching row that the ranking lacks,
because its gradient was refused, counts as never found:

    gsm8k          flan_cot/gsm8k
    tydiqa         tydiqa/*
    arc_challenge  arc_easy
    mmlu           multiple-choice sources (arc_easy, flan_cot/aqua, flan_cot/ecqa, p3/commonsense_qa, p3/cosmos_qa,
                   p3/quarel): the pool has no MMLU, so this is a matching form, not a matching subject

bbh and math500 have no matching source. `gain` is held-out mean log-probability (nats per token) after fine-tuning less
that of the base model, for all six; `gain_in_preference` is the same for the mean per-token probability. `against`
holds differences to other strategies, paired by seed. CPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.real_text import average_precision, data_folder, example, only, sampled, spread_out

CHOICE = ("arc_easy", "flan_cot/aqua", "flan_cot/ecqa", "p3/commonsense_qa", "p3/cosmos_qa", "p3/quarel")
MATCHING: dict[str, tuple[str, ...]] = {
    "gsm8k": ("flan_cot/gsm8k",),
    "tydiqa": ("tydiqa/",),
    "arc_challenge": ("arc_easy",),
    "mmlu": CHOICE,
    "bbh": (),
    "math500": (),
}
RANKED = ("prism", "uniform", "less", "prism-unit")
STRATEGIES = (*RANKED, "prism-cover", "random")
COUNTERPARTS = ("uniform", "less", "random")
SHARE = 0.25
HELD_OUT = 60
STEPS = 700


def prepare(folder: Path, data: Path, *, share: float = SHARE, steps: int = STEPS) -> None:
    """Inbox, targets and model of all seeds. Prompt, completion and source are kept; no selector sees the source."""
    import torch

    script = example("real_text")
    records = sampled(script.read_records(data / "pool.jsonl"), share)
    pool = [only(one, ("prompt", "completion", "source")) for one in records]
    prompts = set()
    for name in MATCHING:
        for kind, most in (("target", None), ("eval", HELD_OUT)):
            rows = script.read_records(data / "targets" / name / f"{kind}.jsonl")
            # All of them, also those that are not measured: the model must not know a held-out prompt.
            prompts |= {one["prompt"].strip() for one in rows}
            kept = [only(one, ("prompt", "completion")) for one in (spread_out(rows, most) if most else rows)]
            path = folder / "targets" / name / f"{kind}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
    script.write_inbox(pool, folder / "inbox", 2)
    seen = [one for one in pool if one["prompt"].strip() not in prompts]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = script.train_tokenizer((one[field] for one in seen for field in ("prompt", "completion")), 4096)
    model = script.build_model(tokenizer, hidden=160, layers=4)
    with _quiet():
        script.train(model, script.packed(seen, tokenizer, "\n", 128), minutes=0, steps=steps, seed=0, batch_size=8)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _quiet() -> Any:
    """What the example prints while it trains goes to standard error."""
    from contextlib import redirect_stdout

    return redirect_stdout(sys.stderr)


def project_settings(folder: Path, seed: int) -> Any:
    """One seed's project; data and model are those of all seeds."""
    from prism_assets.settings import from_mapping

    home = folder / f"seed-{seed}"
    home.mkdir(exist_ok=True)
    content = {
        "model": {"name": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "lora": {"rank": 8, "alpha": 16},
        "tokenization": {"max_length": 384, "separator": "\n"},
        "warmup": {"share": 0.05, "epochs": 4, "learning_rate": 1e-3, "seed": seed},
        "features": {"optimizer": "adam", "sketch_dim": 4096, "seed": seed},
        "candidates": {"inbox": str(folder / "inbox"), "at_rest_seconds": 0},
        "targets": {
            name: {
                "examples": str(folder / "targets" / name / "target.jsonl"),
                "eval": str(folder / "targets" / name / "eval.jsonl"),
            }
            for name in MATCHING
        },
        "preference": {"temperature": 1.0},
        "selection": {"budget": "5%", "seed": seed},
        # Two passes over what is selected.
        "training": {"steps": 26, "batch_size": 8, "learning_rate": 2e-3},
        "strategies": list(STRATEGIES),
        "seeds": [seed],
        "storage": {"root": str(home / "lake"), "report": str(home / "report")},
    }
    path = home / "prism.yaml"
    path.write_text(yaml.safe_dump(content))
    return from_mapping(content, path)


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Per target and strategy the figures of one seed."""
    from prism_assets.ops.home import instance_of
    from prism_assets.ops.pipeline import Listener, run_pipeline, steps_of

    settings = project_settings(folder, seed)
    home = folder / f"seed-{seed}"
    os.environ |= {"PRISM_CONFIG": str(home / "prism.yaml"), "DAGSTER_HOME": str(home / "dagster")}
    from prism_assets import build_definitions, open_stage
    from prism_assets.project import Project

    def note(result: Any) -> None:
        print(f"seed {seed}: {result.step.title} {result.seconds:.0f} s", file=sys.stderr, flush=True)

    started = time.process_time()
    with instance_of(settings) as instance:
        run_pipeline(
            Project.of(settings),
            build_definitions(settings),
            instance,
            steps=steps_of("run")[:-1],
            listener=Listener(on_result=note),
        )
    stage = open_stage(settings)
    found = {name: _figures(stage, name, seed) for name in MATCHING}
    return {"seed": seed, "targets": found, "cpu_seconds": time.process_time() - started}


def _figures(stage: Any, name: str, seed: int) -> dict[str, dict[str, float]]:
    from prism_assets.identity import base_key, join_key, seed_partition
    from prism_assets.selection.query import query_index

    lake, pool = stage.lake, stage.shown("live_pool")
    base = stage.shown("evaluations", base_key(name)).notes
    matching = sum(n for source, n in pool.notes["sources"].items() if source.startswith(MATCHING[name]))
    found: dict[str, dict[str, float]] = {}
    for strategy in STRATEGIES:
        key = join_key(name, strategy)
        after = stage.shown("evaluations", seed_partition(key, seed)).notes
        sources = lake.read_table(stage.shown("selection", key), ["source"])["source"].to_pylist()
        entry = {
            "gain": after["mean_log_prob"] - base["mean_log_prob"],
            "gain_in_preference": after["target_preference"] - base["target_preference"],
        }
        if MATCHING[name]:
            entry["precision"] = float(np.mean([one.startswith(MATCHING[name]) for one in sources]))
            if strategy in RANKED:
                count = pool.notes["canonical_rows"]
                ranked = query_index(stage, target=name, strategy=strategy, k=count)
                relevant = [row["source"].startswith(MATCHING[name]) for row in ranked]
                entry["average_precision"] = average_precision(relevant, matching)
            if strategy == "random":  # its expectation
                entry["average_precision"] = matching / pool.notes["canonical_rows"]
        found[strategy] = entry
    return found


def summary(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Per target and strategy mean, standard deviation and interval over seeds; `against` others, paired by seed."""
    from prism_assets.stats.seeds import paired_difference, summarize_seeds

    result: dict[str, Any] = {}
    for name in outcomes[0]["targets"]:
        per_seed = [one["targets"][name] for one in outcomes]
        result[name] = {
            strategy: {
                **{metric: summarize_seeds([one[strategy][metric] for one in per_seed])._asdict() for metric in entry},
                "against": {
                    other: {
                        metric: paired_difference(
                            [one[strategy][metric] for one in per_seed], [one[other][metric] for one in per_seed]
                        )._asdict()
                        for metric in entry
                        if metric in per_seed[0][other]
                    }
                    for other in COUNTERPARTS
                    if other != strategy
                },
            }
            for strategy, entry in per_seed[0].items()
        }
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the seeds that FOLDER does not hold yet, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the projects; by default a temporary one")
    options = parser.parse_args(arguments)
    data = data_folder()
    if data is None:
        print("The real records are not here: name their folder in PRISM_REAL_DATA.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "model" / "config.json").exists():
            prepare(work, data)
        outcomes = []
        for seed in range(options.seeds):
            finished = work / f"outcome-{seed}.json"
            if not finished.exists():
                finished.write_text(json.dumps(run_seed(work, seed)))
            outcomes.append(json.loads(finished.read_text()))
    result = {
        "seeds": [one["seed"] for one in outcomes],
        "targets": summary(outcomes),
        "cpu_seconds_per_seed": float(np.mean([one["cpu_seconds"] for one in outcomes])),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    for name, strategies in result["targets"].items():
        print(f"\n{name}, {len(outcomes)} seeds")
        for strategy, entry in strategies.items():
            shown = [
                f"{metric} {one['mean']:.4f}±{one['std'] or 0:.4f}" for metric, one in entry.items() if "mean" in one
            ]
            print(f"  {strategy:18}" + "  ".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
