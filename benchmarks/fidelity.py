"""How exact features are: engine against autograd, sketch against exact products, re-ranking against both.

A part of `python -m benchmarks.features`; every figure is computed from the model and rows it is given.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.common import measure
from prism_assets.corpus.encoder import TokenizedExample
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.sketch import ExactFeatures, Sketch

TOP_SHARE = 0.05
SHORTLIST = 4  # times the budget


class _WideTorch:
    """torch with float32 meaning float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def float64_throughout(model: PeftModel) -> Iterator[None]:
    """Modelling code casts to float32 inside (norms, rotary angles, routers), whatever the model's precision; rounding
    there would be all that two float64 computations differ by."""
    own = type(model.get_base_model()).__module__
    modules = [
        module
        for name, module in list(sys.modules.items())
        if (name == own or name.startswith("transformers.")) and vars(module).get("torch") is torch
    ]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "torch", _WideTorch()))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        yield


def autograd_gradient(model: PeftModel, example: TokenizedExample) -> dict[str, Tensor]:
    """g of one example: PEFT's own layers, a batch of one, plain autograd."""
    model.eval()
    parameters = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.enable_grad():
        log_probs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
        chosen = log_probs.gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(example.loss_mask[1:])]
        gradients = torch.autograd.grad(chosen.mean(), list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def autograd_error(model: PeftModel, examples: Sequence[TokenizedExample]) -> dict[str, float]:
    """The largest relative error |found - expected| / |expected| of any example and parameter.

    fp32 and fp64: ours against autograd, both at that precision. fp32_from_fp64: ours in fp32 against autograd in fp64;
    autograd_fp32_from_fp64: autograd in fp32 against the same, what rounding alone does to this model.
    """
    ours, plain = _our_gradients(model, examples), [autograd_gradient(model, example) for example in examples]
    wide = copy.deepcopy(model).double()
    with float64_throughout(wide):
        wide_ours = _our_gradients(wide, examples)
        wide_plain = [autograd_gradient(wide, example) for example in examples]
    return {
        "fp32": _largest_error(ours, plain),
        "fp64": _largest_error(wide_ours, wide_plain),
        "fp32_from_fp64": _largest_error(ours, wide_plain),
        "autograd_fp32_from_fp64": _largest_error(plain, wide_plain),
    }


def _our_gradients(model: PeftModel, examples: Sequence[TokenizedExample]) -> list[dict[str, Tensor]]:
    """The engine's gradients by example, in the examples' order."""
    found: dict[int, dict[str, Tensor]] = {}
    for positions, gradients in GradientEngine(model).per_example_gradients(examples):
        for row, position in enumerate(positions):
            found[int(position)] = {name: gradient[row].clone() for name, gradient in gradients.items()}
    return [found[position] for position in range(len(examples))]


def _largest_error(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> float:
    errors = [
        float((ours[name].double() - theirs.double()).norm() / theirs.double().norm())
        for ours, example in zip(found, expected, strict=True)
        for name, theirs in example.items()
    ]
    return float(np.max(errors))  # not max(): it can lose a NaN


def sketch_and_reranking(
    model: PeftModel,
    candidates: Sequence[TokenizedExample],
    targets: Sequence[TokenizedExample],
    dims: Sequence[int],
    seeds: int,
) -> dict[str, Any]:
    """Errors of inner products and scores by sketch dimension, and what exact re-ranking corrects and costs.

    Scores are cosines of the candidates' gradients with the mean gradient of the targets. The re-ranked
    selection is the top 5% of a shortlist (`SHORTLIST` times as long, by sketched score) by the directional
    derivative along the target direction over the exact norm.
    """
    engine = GradientEngine(model)
    exact = ExactFeatures(engine.parameter_shapes)
    found = engine.feature_rows(candidates, sketch=exact)
    target = engine.weighted_gradient(targets, np.full(len(targets), 1 / len(targets))).gradient
    rows = torch.from_numpy(found.rows / found.norms[:, None]).float()  # [n, D], unit
    direction = exact.sketch_vector(target)
    vectors = torch.cat([rows, (direction / direction.norm())[None]])  # [n + 1, D]; the last is the target
    true_gram = (vectors @ vectors.t()).double().numpy()
    true_scores = true_gram[-1, :-1]
    derivatives = engine.directional_derivatives(candidates, target)
    exact_scores = derivatives / found.norms / float(direction.double().norm())

    by_dim = {}
    for dim in dims:
        draws = [_gram_after(Sketch(dim, seed), vectors, engine.parameter_shapes) for seed in range(seeds)]
        by_dim[str(dim)] = _compare(draws, true_gram, true_scores, exact_scores, dim)
    return {
        "candidates": len(candidates),
        "targets": len(targets),
        "exact_dimensions": exact.dim,
        "sketch_seeds": seeds,
        "top": _budget(len(candidates)),
        "shortlist": SHORTLIST * _budget(len(candidates)),
        "score_standard_deviation": float(true_scores.std()),
        "sketch": by_dim,
        "directional_derivative_relative_error": float(
            np.linalg.norm(exact_scores - true_scores) / np.linalg.norm(true_scores)
        ),
    }


def reranking_cost(model: PeftModel, examples: Sequence[TokenizedExample], dim: int, rounds: int) -> dict[str, float]:
    """CPU seconds a row of directional derivatives over those of the gradient pass, interleaved."""
    engine, sketch = GradientEngine(model), Sketch(dim, 0)
    direction = engine.weighted_gradient(examples[:4], np.ones(len(examples[:4]))).gradient
    engine.feature_rows(examples[:2], sketch=sketch)  # draws the sketch
    ratios = []
    for _ in range(rounds):
        gradients = measure(lambda: engine.feature_rows(examples, sketch=sketch))
        derivatives = measure(lambda: engine.directional_derivatives(examples, direction))
        ratios.append(derivatives.cpu / gradients.cpu)
    return {"cost_over_gradient_pass": statistics.median(ratios), "rounds": rounds}


def _gram_after(sketch: Sketch, vectors: Tensor, shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Inner products of the sketched vectors, float64 [n, n]."""
    out = torch.zeros(len(vectors), sketch.dim)
    start = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        sketch.add_(out, name, vectors[:, start : start + size].reshape(-1, *shape))
        start += size
    return (out @ out.t()).double().numpy()


def _compare(
    grams: list[np.ndarray],
    true_gram: np.ndarray,
    true_scores: np.ndarray,
    exact_scores: np.ndarray,
    dim: int,
) -> dict[str, float]:
    """Figures of one dimension from its draws. A draw's errors share one sketch, so the standard error of the
    bias is taken between draws, not between pairs."""
    off_diagonal = ~np.eye(len(true_gram), dtype=bool)
    errors = [(gram - true_gram)[off_diagonal] for gram in grams]
    means = np.array([error.mean() for error in errors])
    mean_square = float(np.mean([np.square(error).mean() for error in errors]))
    budget = _budget(len(true_scores))
    best = _top(true_scores, budget)
    spearman, before, after = [], [], []
    for gram in grams:
        scores = gram[-1, :-1] / np.sqrt(np.diag(gram)[:-1])
        spearman.append(np.corrcoef(_ranks(scores), _ranks(true_scores))[0, 1])
        before.append(len(_top(scores, budget) & best) / budget)
        shortlist = np.array(sorted(_top(scores, SHORTLIST * budget)))
        reranked = {int(shortlist[index]) for index in _top(exact_scores[shortlist], budget)}
        after.append(len(reranked & best) / budget)
    return {
        "bias_in_standard_errors": float(means.mean() / (means.std(ddof=1) / len(means) ** 0.5)),
        "rms_error_times_sqrt_dim": (mean_square * dim) ** 0.5,
        "spearman": float(np.mean(spearman)),
        "top_overlap": float(np.mean(before)),
        "top_overlap_reranked": float(np.mean(after)),
    }


def _budget(count: int) -> int:
    return max(1, round(TOP_SHARE * count))


def _top(scores: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")
