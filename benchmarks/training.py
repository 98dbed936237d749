"""What a fine-tuning step costs and holds, ours against TRL's SFTTrainer and the plain Trainer, on real models.

    python -m benchmarks.training --json [--models smollm2 gemma3_270m] [--rounds 3] [--folder runs/models]

Every run is a process of its own: it loads the model, puts LoRA on it (rank 16, all linear layers, B not zero), and
takes
`--steps` AdamW steps on the same 16 rows (mean loss over their supervised tokens, constant learning rate), so that
the order
of the rows does not matter. Ours splits a step as it does by default. The other two run 16 rows as they do by
default where that fits the machine, else `--micro-batch` rows with accumulation: the same effective batch.

Cost: CPU seconds of a step, the first one left out. A ratio is the median over rounds of the arm's cost over ours in
the
same round (above 1: ours is cheaper); a round runs every arm once, another one first each time. `peak_gib`: the largest
resident memory of an arm's process. `difference`: the largest of the norms of (their update - ours) over the norm of
their update, of the whole adapter after the first step by SGD, where an update is the gradient.

Rows are real ones where a pool is found (--pool, PRISM_REAL_DATA), else generated ones; at most 256 tokens.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import find_pool, generate_pool, read_pool, resident_bytes
from benchmarks.real_text import example
from prism_assets.corpus.encoder import Encoder, TokenizedExample
from prism_assets.corpus.records import Message

ARMS = ("ours", "trl", "trainer")
MODELS = ("smollm2", "gemma3_270m")
BATCH = 16
LONGEST = 256
RATE = 1e-3


def rows_of(tokenizer: Any, pool: Path | None, count: int) -> list[TokenizedExample]:
    """The first rows of the pool, or generated ones, cut to LONGEST tokens."""
    records = read_pool(pool) if pool else generate_pool(4 * count)
    encoder = Encoder(tokenizer, max_length=LONGEST)
    found: list[TokenizedExample] = []
    for record in records:
        turns = (Message("user", record.prompt), Message("assistant", record.completion))
        try:
            found.append(encoder.encode(turns))
        except Exception:  # a row that does not fit; rejects are not what is measured
            continue
        if len(found) == count:
            break
    return found


def adapted(folder: Path) -> Any:
    """The model in float32 with LoRA whose B is not zero, the same in every process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


class Stopwatch:
    """CPU seconds at the end of every step, as a callback of the Trainer gets them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def cost(self) -> float:
        """Of a step, the first one left out."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def callback(watch: Stopwatch) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.ends.append(time.process_time())

    return Watch()


def run_ours(model: Any, rows: Sequence[TokenizedExample], steps: int, _: int, watch: Stopwatch) -> None:
    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.sft.trainer import Training, fine_tune

    training = Training(steps=steps, batch_size=BATCH, learning_rate=RATE, scheduler="constant", warmup_ratio=0)
    engine = GradientEngine(model)
    fine_tune(engine, rows, training, seed=0, progress=lambda *_: watch.ends.append(time.process_time()))


def run_peer(arm: str, model: Any, rows: Sequence[TokenizedExample], steps: int, micro: int, watch: Stopwatch) -> None:
    """TRL's SFTTrainer, or the Trainer with transformers' own loss, on the same tokens and labels."""
    import datasets
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    labels = [np.where(row.loss_mask, row.input_ids, -100).tolist() for row in rows]
    columns = {"input_ids": [row.input_ids.tolist() for row in rows], "labels": labels}
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=micro,
            gradient_accumulation_steps=BATCH // micro, learning_rate=RATE, lr_scheduler_type="constant",
            warmup_steps=0, weight_decay=0.0, report_to="none", logging_strategy="no", save_strategy="no",
            disable_tqdm=True, use_cpu=True, bf16=False,
        )  # fmt: skip
        if arm == "trl":
            from trl import SFTConfig, SFTTrainer

            data = datasets.Dataset.from_dict(columns)
            arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
            tokenizer = _tokenizer(model)
            trainer: Any = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        else:
            columns["attention_mask"] = [[1] * len(row.input_ids) for row in rows]
            data = datasets.Dataset.from_dict(columns)
            collator = DataCollatorForSeq2Seq(_tokenizer(model))
            trainer = Trainer(model, TrainingArguments(**common), train_dataset=data, data_collator=collator)
        trainer.add_callback(callback(watch))
        trainer.train()


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().config._name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def worker(arm: str, folder: Path, pool: Path | None, steps: int, micro: int, out: Path) -> None:
    """One arm in this process: prints its cost and peak, and saves the moments of the first step."""
    from transformers import AutoTokenizer

    rows = rows_of(AutoTokenizer.from_pretrained(folder), pool, BATCH)
    model, watch = adapted(folder), Stopwatch()
    start = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    kept: dict[str, torch.Tensor] = {}
    step = torch.optim.AdamW.step

    def first_gradient(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.update({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = first_gradient  # type: ignore[method-assign]
    run = run_ours if arm == "ours" else lambda *given: run_peer(arm, *given)
    run(model, rows, steps, micro, watch)
    assert kept.keys() == start.keys()
    torch.save(torch.cat([kept[name].flatten() for name in sorted(kept)]), out)
    tokens = sum(len(row.input_ids) for row in rows)
    facts = {"cpu_seconds": watch.cost(), "peak_gib": resident_bytes("VmHWM") / 2**30, "tokens": tokens}
    print(json.dumps(facts))


def measure_model(name: str, folder: Path, pool: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one model."""
    costs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    peaks: dict[str, float] = dict.fromkeys(ARMS, 0.0)
    gradients: dict[str, torch.Tensor] = {}
    tokens = 0
    for turn in range(options.rounds):
        for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3]):
            with tempfile.TemporaryDirectory() as draft:
                out = Path(draft) / "gradient.pt"
                given = ["--worker", arm, "--folder", str(folder), "--steps", str(options.steps), "--out", str(out)]
                given += ["--micro-batch", str(options.micro_batch), *(["--pool", str(pool)] if pool else [])]
                command = [sys.executable, "-m", "benchmarks.training", *given]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise SystemExit(f"{name}, {arm}: {run.stderr[-3000:]}")
                found = json.loads(run.stdout.splitlines()[-1])
                gradients.setdefault(arm, torch.load(out, weights_only=True).double())
            costs[arm].append(found["cpu_seconds"])
            peaks[arm] = max(peaks[arm], found["peak_gib"])
            tokens = found["tokens"]
            print(f"{name} round {turn + 1} {arm}: {found}", file=sys.stderr)
    ours = gradients["ours"]
    return {
        "rows_of_a_step": BATCH,
        "tokens_of_a_step": tokens,
        "cpu_seconds_of_a_step": {arm: statistics.median(values) for arm, values in costs.items()},
        **{
            f"ratio_{arm}": statistics.median(a / b for a, b in zip(costs[arm], costs["ours"], strict=True))
            for arm in ARMS[1:]
        },
        "ratios": {arm: [a / b for a, b in zip(costs[arm], costs["ours"], strict=True)] for arm in ARMS[1:]},
        "peak_gib": peaks,
        "difference": max(float((gradients[arm] - ours).norm() / gradients[arm].norm()) for arm in ARMS[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a pass of the other two")
    parser.add_argument("--folder", type=Path, default=Path("runs/models"), help="where the models are, or are put")
    parser.add_argument("--pool", type=Path, help="JSON Lines with prompt and completion")
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        worker(options.worker, options.folder, options.pool, options.steps, options.micro_batch, options.out)
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: `pip install trl`")
    fetch = example("real_models", "fetch").fetch
    pool = find_pool(options.pool)
    found = {name: measure_model(name, fetch(name, options.folder), pool, options) for name in options.models}
    result = {"rows": "real" if pool else "generated", "micro_batch_of_peers": options.micro_batch, "models": found}
    if options.json:
        print(json.dumps(result))
        return
    for name, one in found.items():
        print(f"{name}: {json.dumps(one, indent=1)}")


if __name__ == "__main__":
    main()
