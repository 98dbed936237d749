"""Gradient features on a GPU: ours against a plain training pass, and exact top-k by chunked products.

    python -m benchmarks.features_gpu --json [--model 0.6b] [--rows 256]

Not run on a GPU yet: its code path is tested on a CPU (`--device cpu --tiny`), so no figure of it is known.
Without CUDA it prints a message and exits with status 2. It needs torch, transformers, peft and numpy alone.

The model has Qwen3's shape, random weights and bfloat16; LoRA of rank 16 on all linear layers; rows of 128 to
1,024 random tokens, of which a random share at the end is supervised. Plain runs with a padding mask, as a
trainer runs it, and without one (`plain_unmasked`), which leaves it the causal kernel; its batches lie on the
device beforehand, ours are copied there. Every arm runs at the best of several token budgets (padded tokens a
batch) on the same rows sorted by length, one after the other in every round. Reported for each arm: examples
and tokens a second, the most memory that it needs beside the model, and the rate of its matrix products over
the rate of one large product in bfloat16 on the same device; for ours also how often the host waited for the
device in a pass, by torch's own count, which leaves out the results that are read a batch late. Products are
counted by formula: the frozen weights forward and backward by their inputs, the LoRA factors, causal attention
(backward 2.5 times forward) and the head; ours has the head, and what follows the last attention, at
supervised positions only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from prism_assets.gradients.batching import plan_batches
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.sketch import Sketch


class Example(NamedTuple):
    """Random tokens; the supervised ones are at the end."""

    input_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]


class ModelShape(NamedTuple):
    """Dimensions of a Qwen3-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int


class Scale(NamedTuple):
    """How much is measured."""

    shape: ModelShape
    rank: int
    shortest: int
    longest: int
    token_budgets: tuple[int, ...]
    sketch_dim: int
    product: int  # side of the square product that sets the peak
    index_rows: int
    chunk: int


SHAPES = {
    "0.6b": ModelShape(1024, 3072, 28, 16, 8, 128, 151_936),
    "1.2b": ModelShape(1536, 4608, 28, 16, 8, 128, 151_936),
}
TINY = Scale(ModelShape(32, 48, 2, 4, 2, 8, 97), 4, 6, 20, (40, 80), 64, 64, 1000, 128)


def make_model(scale: Scale, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A random model with an adapter whose B is not zero."""
    shape = scale.shape
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * scale.longest,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        base = Qwen3ForCausalLM(config).to(dtype)
    lora = LoraConfig(r=scale.rank, lora_alpha=2 * scale.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def make_examples(count: int, scale: Scale, seed: int = 0) -> list[Example]:
    """Lengths are log-uniform; a fifth to four fifths of the tokens are supervised."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(np.exp(rng.uniform(np.log(scale.shortest), np.log(scale.longest + 1))))
        supervised = max(1, int(length * rng.uniform(0.2, 0.8)))
        ids = rng.integers(0, scale.shape.vocabulary, length).astype(np.int32)
        examples.append(Example(ids, np.arange(length) >= length - supervised))
    return examples


# Arms


def plain_pass(
    model: PeftModel,
    examples: Sequence[Example],
    token_budget: int,
    device: torch.device,
    padding_mask: bool = True,
) -> Callable[[], None]:
    """Forward and backward as a trainer does them; nothing is read back."""
    batches = []
    for positions in plan_batches([len(example.input_ids) for example in examples], token_budget):
        width = len(examples[positions[0]].input_ids)
        ids = torch.zeros(len(positions), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, position in enumerate(positions):
            example = examples[position]
            length = len(example.input_ids)
            ids[row, :length] = torch.from_numpy(example.input_ids.astype(np.int64))
            mask[row, :length] = 1
            labels[row, :length] = torch.where(torch.from_numpy(example.loss_mask), ids[row, :length], -100)
        inputs = {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if padding_mask else {})
        batches.append({name: tensor.to(device) for name, tensor in inputs.items()})

    def run() -> None:
        for inputs in batches:
            model(**inputs, use_cache=False).loss.backward()
            model.zero_grad()

    return run


def our_pass(model: PeftModel, examples: Sequence[Example], token_budget: int, sketch: Sketch) -> Callable[[], Any]:
    """Feature rows with norms, on the host."""
    engine = GradientEngine(model, token_budget=token_budget)
    return lambda: engine.feature_rows(examples, sketch=sketch)


# Measuring


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trial(NamedTuple):
    """An arm at one token budget."""

    run: Callable[[], Any]
    seconds: float
    peak_bytes: int | None  # most that the arm had on the device beside what was there before; None on a CPU


def trials(
    make: Callable[[int], Callable[[], Any]], token_budgets: Sequence[int], device: torch.device
) -> dict[int, Trial]:
    """An arm's trials by token budget; budgets that do not fit the memory are left out."""
    found = {}
    for budget in token_budgets:
        before = clean_memory(device)
        run = make(budget)
        try:
            run()  # allocations and kernels are found at the first call
            peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
            found[budget] = Trial(run, seconds(run, device), peak)
        except torch.OutOfMemoryError:
            continue  # what it held is freed by the next `clean_memory`, after its traceback is gone
    if not found:
        raise SystemExit(f"not even {min(token_budgets)} tokens a batch fit the memory of {device}")
    return found


def clean_memory(device: torch.device) -> int:
    """Frees what nothing holds and starts the count of the peak; returns the bytes still allocated."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def waits(run: Callable[[], Any], device: torch.device) -> int | None:
    """How many calls within a run made the host wait for the device, as torch counts them; None on a CPU."""
    if device.type != "cuda":
        return None
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large square product: the peak that products are held to."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(5))


def operations(shape: ModelShape, rank: int, examples: Sequence[Example]) -> dict[str, float]:
    """Floating-point operations of the matrix products that each arm needs for these rows."""
    query, key_value = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    sides = {
        "attention": [(shape.hidden, query), (shape.hidden, key_value), (shape.hidden, key_value)],
        "after": [(query, shape.hidden), *[(shape.hidden, shape.intermediate)] * 3],  # gate, up, down
    }
    # A token at a layer: frozen weight forward and backward by the input; A and B the same and by the factor.
    cost = {part: sum(4 * i * o + 6 * rank * (i + o) for i, o in layers) for part, layers in sides.items()}
    head = 4 * shape.hidden * shape.vocabulary
    plain = ours = 0.0
    for example in examples:
        tokens, supervised = len(example.input_ids), int(example.loss_mask.sum())
        attention = 3.5 * 2 * tokens**2 * query * shape.layers  # causal: half of 4 T^2 d forward
        plain += shape.layers * tokens * (cost["attention"] + cost["after"]) + attention + tokens * head
        ours += shape.layers * tokens * cost["attention"] + attention + supervised * head
        ours += ((shape.layers - 1) * tokens + supervised) * cost["after"]
    return {"plain": plain, "ours": ours}


def agreement_with_autograd(model: PeftModel, examples: Sequence[Example], device: torch.device) -> float:
    """The smallest cosine of our gradient of a row with that of plain autograd on the same model."""
    parameters = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    smallest = 1.0
    for positions, gradients in GradientEngine(model).per_example_gradients(examples):
        for row, position in enumerate(positions):
            model.eval()
            ids = torch.from_numpy(examples[position].input_ids.astype(np.int64))[None].to(device)
            log_probs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
            chosen = log_probs.gather(1, ids[0, 1:, None])[:, 0]
            mean = chosen[torch.from_numpy(examples[position].loss_mask[1:]).to(device)].mean()
            expected = torch.autograd.grad(mean, list(parameters.values()))
            ours = torch.cat([gradients[name][row].flatten() for name in parameters])
            theirs = torch.cat([gradient.flatten() for gradient in expected])
            smallest = min(smallest, float(torch.cosine_similarity(ours.double(), theirs.double(), dim=0)))
    return smallest


# Exact top-k


def exact_top_k(chunks: Iterator[Tensor], query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products with `query`, largest first, equal ones in the order of the rows.

    chunks: [n_i, K] in any floating-point type; query: float32 [K]. Returns float32 scores and int64 row
    numbers, [min(k, n)]; there is no limit on k.
    """
    scores = query.new_empty(0)
    numbers = torch.empty(0, dtype=torch.int64, device=query.device)
    start = 0
    for chunk in chunks:
        found = chunk.to(query.device).float() @ query
        scores = torch.cat([scores, found])
        numbers = torch.cat([numbers, torch.arange(start, start + len(found), device=query.device)])
        scores, order = torch.sort(scores, descending=True, stable=True)
        scores, numbers = scores[:k], numbers[order[:k]]
        start += len(chunk)
    return scores, numbers


def time_top_k(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Exact top 5% of float16 unit rows that lie on the device, and whether a full sort finds the same."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.empty(scale.index_rows, scale.sketch_dim, dtype=torch.float16, device=device)
    for part in rows.split(scale.chunk):
        values = torch.randn(part.shape, device=device, generator=generator)
        part.copy_(values / values.norm(dim=1, keepdim=True))
    query = torch.randn(scale.sketch_dim, device=device, generator=generator)
    k = scale.index_rows // 20

    def run() -> tuple[Tensor, Tensor]:
        return exact_top_k(iter(rows.split(scale.chunk)), query, k)

    _, numbers = run()
    whole = torch.cat([part.float() @ query for part in rows.split(scale.chunk)])
    expected = torch.sort(whole, descending=True, stable=True).indices[:k]
    return {
        "rows": scale.index_rows,
        "dim": scale.sketch_dim,
        "k": k,
        "milliseconds": 1000 * statistics.median(seconds(run, device) for _ in range(5)),
        "equal_to_a_full_sort": bool(torch.equal(numbers, expected)),
    }


# The whole


def benchmark(scale: Scale, rows: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The whole report."""
    model, examples = make_model(scale, device, dtype), make_examples(rows, scale)
    makers: dict[str, Callable[[int], Callable[[], Any]]] = {
        "ours": lambda budget: our_pass(model, examples, budget, Sketch(scale.sketch_dim, 0)),
        "plain": lambda budget: plain_pass(model, examples, budget, device),
        "plain_unmasked": lambda budget: plain_pass(model, examples, budget, device, padding_mask=False),
    }
    tried = {name: trials(make, scale.token_budgets, device) for name, make in makers.items()}
    budgets = {name: min(found, key=lambda budget: found[budget].seconds) for name, found in tried.items()}
    best = {name: tried[name][budget] for name, budget in budgets.items()}
    taken: dict[str, list[float]] = {name: [] for name in best}
    for turn in range(rounds):
        for name in list(best)[:: 1 if turn % 2 == 0 else -1]:
            taken[name].append(seconds(best[name].run, device))
    tokens = sum(len(example.input_ids) for example in examples)
    work = operations(scale.shape, scale.rank, examples)
    peak = product_rate(scale.product, device, dtype)
    arms = {}
    for name, values in taken.items():
        median, operations_done = statistics.median(values), work["ours" if name == "ours" else "plain"]
        arms[name] = {
            "examples_per_second": rows / median,
            "tokens_per_second": tokens / median,
            "product_operations_per_second": operations_done / median,
            "share_of_peak": operations_done / median / peak,
            "peak_memory_bytes_beside_the_model": best[name].peak_bytes,
            "token_budget": budgets[name],
            "seconds_by_token_budget": {str(budget): trial.seconds for budget, trial in tried[name].items()},
        }
    arms["ours"]["waits"] = waits(best["ours"].run, device)
    return {
        "benchmark": "features_gpu",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": model.get_base_model().num_parameters(),
        "rows": rows,
        "mean_tokens": tokens / rows,
        "mean_supervised_tokens": float(np.mean([example.loss_mask.sum() for example in examples])),
        "peak_product_operations_per_second": peak,
        **ratio("plain", taken),
        **ratio("plain_unmasked", taken),
        "arms": arms,
        "cosine_with_autograd": agreement_with_autograd(model, examples[:2], device),
        "top_k": time_top_k(scale, device),
    }


def ratio(arm: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    """The arm's seconds over ours in the same round: the median, and the range."""
    ratios = [theirs / ours for theirs, ours in zip(taken[arm], taken["ours"], strict=True)]
    return {f"ratio_{arm}": statistics.median(ratios), f"ratio_{arm}_range": [min(ratios), max(ratios)]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sketch-dim", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32, to try the code path")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "features_gpu needs a CUDA device and torch finds none. On a CPU only the code path runs: "
            "--device cpu --tiny",
            file=sys.stderr,
        )
        raise SystemExit(2)
    scale, dtype = TINY, torch.float32
    if not given.tiny:
        budgets = (4096, 8192, 16384, 32768, 65536)
        scale = Scale(SHAPES[given.model], 16, 128, 1024, budgets, given.sketch_dim, 8192, 500_000, 65_536)
        dtype = torch.bfloat16
    result = benchmark(scale, given.rows, given.rounds, device, dtype)
    print(json.dumps(result, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
