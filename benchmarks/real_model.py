"""`prism run` from nothing on a real model, SmolLM2-135M-Instruct, with default settings: memory, time, and what it
gains.

    python -m benchmarks.real_model --json [--model smollm2] [--rows 200] [--held-out 24] [--folder runs/models]
    python -m benchmarks.real_model --json --long --rows 24 --targets 6 --held-out 4 --model gemma3_270m

The pool are real rows at equal distances of a real pool, the target is gsm8k with its held-out records
(PRISM_REAL_DATA);
without real data the rows of `examples/real_models/`, whose target is of the same kind. Settings are the defaults
but for one seed and the strategies prism and random. The run is a process of its own. With --long every row is joined
from several, so that it has more tokens than `tokenization.max_length` (1,024) lets through: what a run needs at most.
The model qwen3_600m is a Qwen3 of 0.6B parameters with random weights and SmolLM2's tokens, for its memory alone. The
JSON has

- `peak_gib`: the largest resident memory of that process;
- `cpu_seconds`: by table, what the artefacts say they cost, `loading and the rest` to the whole of the process;
- `gain`: the mean log-probability of the held-out records under each strategy's adapter, minus that of the base model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.real_text import ROOT, data_folder, example, only, read_lines, spread_out, write_lines

STRATEGIES = ["prism", "random"]
FIELDS = ("prompt", "completion", "source", "answer")
LONG = 6_000  # characters of a prompt under --long: more than 1,024 tokens of any of the models
QWEN3_600M = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}


class Rows(NamedTuple):
    """How many records of each kind, and whether they are made long."""

    pool: int
    targets: int | None  # None for all
    held_out: int
    long: bool


def model_folder(name: str, folder: Path) -> Path:
    """The model's folder below `folder`, fetched or made if it is not there."""
    fetch = example("real_models", "fetch").fetch
    if name != "qwen3_600m":
        return fetch(name, folder)
    out = folder / name
    if not (out / "config.json").exists():
        import torch
        from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        AutoTokenizer.from_pretrained(fetch("smollm2", folder)).save_pretrained(out)
        Qwen3ForCausalLM(Qwen3Config(**QWEN3_600M)).to(torch.bfloat16).save_pretrained(out)
    return out


def build(folder: Path, model: Path, rows: Rows) -> tuple[Path, str]:
    """A project in `folder`; its prism.yaml, and where the rows are from. Raises SystemExit where long rows are asked
    for and there are no real ones to make them of."""
    data = data_folder()
    if data is None and rows.long:
        raise SystemExit("--long makes its rows of real ones: set PRISM_REAL_DATA")
    if data is None:
        example("real_models", "prepare").prepare(folder, models=model.parent)
        target, origin = "discounts", "generated"
    else:
        target, origin = "gsm8k", "real"
        files = {
            "inbox/pool.jsonl": (data / "pool.jsonl", rows.pool),
            "target.jsonl": (data / "targets" / target / "target.jsonl", rows.targets),
            "eval.jsonl": (data / "targets" / target / "eval.jsonl", rows.held_out),
        }
        for name, (source, most) in files.items():
            records = _read(source)
            chosen = records if most is None else spread_out(records, most)
            write_lines(folder / name, _made_long(chosen, records) if rows.long else chosen)
    place = Path("targets") / target if data is None else Path()
    settings = {
        "model": {"name": str(model.resolve())},
        "candidates": {"inbox": "inbox", "at_rest_seconds": 0},
        "targets": {target: {"examples": str(place / "target.jsonl"), "eval": str(place / "eval.jsonl")}},
        "strategies": STRATEGIES,
        "seeds": [0],
    }
    config = folder / "prism.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return config, origin


def run(config: Path) -> dict[str, Any]:
    """One `prism run` in a process of its own: what it took."""
    command = [sys.executable, "-c", "from prism_assets.cli import main; main()", "run", "--config", str(config)]
    wall = time.perf_counter()
    with (config.parent / "run.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"prism run failed:\n{(config.parent / 'run.log').read_text()[-3000:]}")
    return {
        "peak_gib": usage.ru_maxrss / 2**20,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": {"whole process": usage.ru_utime + usage.ru_stime},
    }


def outcome(config: Path) -> dict[str, Any]:
    """What the lake says of the run: cost by table, rows, gains."""
    from prism_assets import load_settings, open_stage
    from prism_assets.identity import base_key, split_key

    settings = load_settings(config)
    (target,) = settings.targets
    cost: dict[str, float] = {}
    scores: dict[str, float] = {}
    rows = 0
    for artifact in open_stage(settings).lake.artifacts():
        spent = (artifact.notes.get("cost") or {}).get("cpu_seconds", 0.0)
        cost[artifact.table] = cost.get(artifact.table, 0.0) + spent
        if artifact.table == "evaluations":
            scores[str(artifact.header["partition"])] = artifact.notes["mean_log_prob"]
        if artifact.table == "candidates":
            rows += artifact.notes["rows"]
    base = scores.pop(base_key(target))
    gain = {split_key(name)[1]: value - base for name, value in scores.items()}
    return {"rows": rows, "cost": cost, "base": base, "gain": gain}


def _made_long(chosen: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chosen records, each after as many others as make its prompt LONG characters."""
    texts = itertools.cycle(f"{record['prompt']}\n{record['completion']}\n\n" for record in others)
    made = []
    for record in chosen:
        before = ""
        while len(before) + len(record["prompt"]) < LONG:
            before += next(texts)
        made.append({**record, "prompt": before + record["prompt"]})
    return made


def _read(path: Path) -> list[dict[str, Any]]:
    return [only(record, FIELDS) for record in read_lines(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "gemma3_270m", "qwen3_600m"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--targets", type=int, help="target records; by default all")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--long", action="store_true", help="rows of more than 1,024 tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/models"), help="where the model is, or is put")
    parser.add_argument("--out", type=Path, help="keep the project here; by default it is deleted")
    options = parser.parse_args()
    model = model_folder(options.model, options.folder)
    with tempfile.TemporaryDirectory() as draft:
        folder = options.out or Path(draft)
        folder.mkdir(parents=True, exist_ok=True)
        config, origin = build(folder, model, Rows(options.rows, options.targets, options.held_out, options.long))
        found = run(config)
        print(f"peak {found['peak_gib']:.2f} GiB, {found['wall_seconds']:.0f} s", file=sys.stderr)
        seen = outcome(config)
    spent = seen.pop("cost")
    whole = found["cpu_seconds"].pop("whole process")
    found["cpu_seconds"] = {**spent, "loading and the rest": whole - sum(spent.values()), "total": whole}
    result = {"model": options.model, "data": origin, "long": options.long, **found, **seen}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
