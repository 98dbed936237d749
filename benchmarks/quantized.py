"""What an NF4 or int8 base changes: gradient rows, rankings, time and memory against float32, on real rows.

    python -m benchmarks.quantized MODEL --json [--data FOLDER] [--rows 400] [--quick]

MODEL is a folder of a causal LM with a chat template, in float32 or narrower. Each precision runs in a process of its
own: the base is loaded, one adapter (trained for a few steps on the float32 base, with AdamW's moments) is put on it,
and the rows of a pool and of some targets go through the gradient engine as the pipeline runs it (Adam's diagonal for
candidates, none for targets, the sketch). Compared with float32, row by row:

- cosines of candidate rows and of raw target rows;
- overlap of the top 5% of the pool for each target, by the cosine of a candidate's row with the mean of the target's
  unit gradients, beside the correlation of these scores. `by_chance` is the share that a random selection would have;
- mean log-probabilities.

CPU seconds are of the pool's rows, bytes those of the base's tensors and the most that the process held. For int8 the
rows are also read with bitsandbytes' own product, which rounds inputs as well: `own_product` compares
log-probabilities.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import encode, measure, read_pool, resident_bytes, run_process
from benchmarks.real_text import data_folder, spread_out
from prism_assets.corpus.encoder import TokenizedExample
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.preconditioner import Moments, Preconditioner
from prism_assets.gradients.sketch import Sketch
from prism_assets.quantized import is_quantized, state_bytes
from prism_assets.resources.model import LanguageModel
from prism_assets.sft.trainer import Training, fine_tune

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "nf4": {"dtype": "float32", "quantization": "nf4"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
}
TARGETS = ("bbh", "gsm8k", "mmlu")
LORA = {"rank": 8, "alpha": 16, "target_modules": "all-linear", "seed": 0}
SKETCH = 8192
LONGEST = 192  # tokens
WARMUP_ROWS, WARMUP_STEPS = 64, 12


def read_examples(model: LanguageModel, data: Path, rows: int, of_target: int) -> dict[str, list[TokenizedExample]]:
    """`pool`, `warmup` and the targets, rows of at most LONGEST tokens."""
    tokenizer = model.tokenizer()

    def short(path: Path, count: int) -> list[TokenizedExample]:
        records = read_pool(path)
        spread = spread_out([one._asdict() for one in records], 6 * count)
        found = []
        for record in spread:
            try:
                (_, (example,)) = encode(tokenizer, [type(records[0])(**record)], 1)
            except SystemExit:
                continue
            if len(example.input_ids) <= LONGEST:
                found.append(example)
        return found[:count]

    pool = short(data / "pool.jsonl", rows + WARMUP_ROWS)
    targets = {name: short(data / "targets" / name / "target.jsonl", of_target) for name in TARGETS}
    return {"pool": pool[WARMUP_ROWS:], "warmup": pool[:WARMUP_ROWS], **targets}


def warm_up(model: LanguageModel, examples: Sequence[TokenizedExample], path: Path) -> None:
    """An adapter and its moments, in a file."""
    with model.adapted(**LORA) as adapted:
        training = Training(steps=WARMUP_STEPS, batch_size=8, learning_rate=2e-4)
        end = fine_tune(GradientEngine(adapted), examples, training, seed=0).checkpoints[-1]
    torch.save({"lora": end.lora_state, "m": end.exp_avg, "v": end.exp_avg_sq, "step": end.optimizer_step}, path)


def look(model: LanguageModel, examples: dict[str, list[TokenizedExample]], warmup: Path, out: Path) -> None:
    """Rows, log-probabilities and costs of one precision, in a file."""
    saved = torch.load(warmup, weights_only=True)
    moments = {name: Moments(saved["m"][name], saved["v"][name]) for name in saved["m"]}
    adam, sketch = Preconditioner.build("adam", moments, step=saved["step"]), Sketch(SKETCH, 0)
    before = resident_bytes("VmRSS")
    found: dict[str, Any] = {}
    with model.adapted(**LORA, state=saved["lora"]) as adapted:
        loaded = resident_bytes("VmRSS")
        engine = GradientEngine(adapted)
        engine.feature_rows(examples["pool"][:2], sketch=sketch, preconditioner=adam)  # what is paid once
        results: list[Any] = []
        cost = measure(
            lambda: results.append(engine.feature_rows(examples["pool"], sketch=sketch, preconditioner=adam))
        )
        peak = resident_bytes("VmHWM")
        found["pool"], found["pool_log_probs"] = results[0].rows, results[0].mean_log_probs
        for name in TARGETS:
            found[name] = engine.feature_rows(examples[name], sketch=sketch).rows
        base = adapted.get_base_model()
        tensors = [one for name, one in base.named_parameters() if "lora_" not in name]
        size = sum(one.numel() * one.element_size() for one in tensors) + state_bytes(base)
        layers = [layer for layer in base.modules() if is_quantized(layer)]
        if layers and model.quantization == "int8":
            found["own_log_probs"] = bitsandbytes_log_probs(adapted, layers, examples["pool"][:64])
    np.savez(out, cost=[cost.cpu, size, before, loaded, peak], **found)


@torch.no_grad()
def bitsandbytes_log_probs(model: Any, layers: Sequence[Any], examples: Sequence[TokenizedExample]) -> np.ndarray:
    """Mean log-probabilities by bitsandbytes' own products, one example at a time."""
    for layer in layers:
        vars(layer).pop("forward")
    values = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        logits = model.eval()(input_ids=ids).logits[0, :-1].float()
        picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        values.append(float(picked[torch.from_numpy(example.loss_mask[1:])].mean()))
    return np.array(values)


def compare(found: Any, reference: Any, rows: int) -> dict[str, Any]:
    """Figures of one precision beside those of float32."""
    size = max(1, rows // 20)
    cpu, base, before, loaded, peak = found["cost"].tolist()
    result: dict[str, Any] = {
        "cpu_milliseconds_a_row": 1000 * cpu / rows,
        "base_mebibytes": base / 2**20,
        "peak_mebibytes": peak / 2**20,
        "peak_above_start_mebibytes": (peak - before) / 2**20,
        "loaded_above_start_mebibytes": (loaded - before) / 2**20,
        "pool_cosine": _spread(_cosines(found["pool"], reference["pool"])),
        "log_prob_rms_difference": _rms(found["pool_log_probs"] - reference["pool_log_probs"]),
        "targets": {},
    }
    if "own_log_probs" in found:
        own = found["own_log_probs"]
        result["own_product"] = {
            "log_prob_rms_difference_from_ours": _rms(own - found["pool_log_probs"][: len(own)]),
            "log_prob_rms_difference_from_float32": _rms(own - reference["pool_log_probs"][: len(own)]),
        }
    for name in TARGETS:
        tops, scores = [], []
        for one in (found, reference):
            score = _units(one["pool"]) @ _units(one[name]).mean(0)
            scores.append(score)
            tops.append(set(np.argsort(-score)[:size].tolist()))
        result["targets"][name] = {
            "cosine": _spread(_cosines(found[name], reference[name])),
            "top_5_percent_overlap": len(tops[0] & tops[1]) / size,
            "by_chance": size / rows,
            "score_correlation": float(np.corrcoef(*scores)[0, 1]),
        }
    return result


def _units(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (_units(one) * _units(other)).sum(1)


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [5, 50, 95]).tolist()
    return {"mean": float(values.mean()), "5%": low, "50%": middle, "95%": high}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of a causal LM")
    parser.add_argument("--data", type=Path, default=data_folder(), help="by default that of PRISM_REAL_DATA")
    parser.add_argument("--rows", type=int, default=400, help="of the pool")
    parser.add_argument("--target-rows", type=int, default=12, help="of each target")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["float32", "nf4", "int8"])
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument("--look", choices=list(PRECISIONS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.data is None or not (given.data / "pool.jsonl").is_file():
        raise SystemExit("name the folder of the real data in --data or PRISM_REAL_DATA: it holds pool.jsonl, targets/")
    if given.quick:
        given.rows, given.target_rows = 20, 2
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if given.look:
        model = LanguageModel(name=str(given.model), device="cpu", **PRECISIONS[given.look])
        examples = read_examples(model, given.data, given.rows, given.target_rows)
        if not (given.folder / "warmup.pt").exists():
            warm_up(model, examples["warmup"], given.folder / "warmup.pt")
        else:
            look(model, examples, given.folder / "warmup.pt", given.folder / f"{given.look}.npz")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = dict.fromkeys(["float32", *given.precisions])
        for precision in ["float32", *asked]:  # the first makes the warm-up
            options = ["--rows", str(given.rows), "--target-rows", str(given.target_rows), "--data", str(given.data)]
            command = [sys.executable, "-m", "benchmarks.quantized", str(given.model), *options]
            done = run_process([*command, "--look", precision, "--folder", name])
            if done.returncode:
                raise SystemExit(f"{precision} failed:\n{done.output[-2000:]}")
            print(f"{precision}: {done.cost.cpu:.0f} CPU seconds", file=sys.stderr, flush=True)
        found = {one: np.load(folder / f"{one}.npz") for one in asked}
        result = {
            **{"benchmark": "quantized", "model": given.model.name, "rows": given.rows},
            **{"torch": torch.__version__, "threads": torch.get_num_threads(), "sketch_dim": SKETCH},
            "precisions": {one: compare(values, found["float32"], given.rows) for one, values in found.items()},
        }
    print(json.dumps(result, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
