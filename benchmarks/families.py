"""On which model types are the engine's gradients exact? Every causal LM type of the installed transformers, tiny.

    OMP_NUM_THREADS=1 python -m benchmarks.families --json

Each type is built small and random in float64 (`tiny_models`) and gets the LoRA adapter that the product's defaults
give it, by the product's own code. The engine's per-example gradients of a batch of examples of different lengths are
compared with plain PEFT and autograd, one example at a time. Each type runs in a process of its own, with a time limit.

    exact          the largest relative error of any parameter of any example is below 1e-6
    refused        the engine says why it does not support the model
    wrong          it gives gradients, with a larger error
    cannot_build   no tiny model was made of the type's configuration, or plain autograd does not run on it
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peft import PeftModel

from benchmarks.fidelity import autograd_gradient, float64_throughout
from benchmarks.tiny_models import VOCABULARY, causal_lm_types, tiny_model
from prism_assets.corpus.encoder import TokenizedExample
from prism_assets.errors import ModelError, UnsupportedModelError
from prism_assets.gradients.engine import GradientEngine
from prism_assets.resources.model.language_model import LanguageModel
from prism_assets.settings.schema import LoraSettings

EXACT = 1e-6
LENGTHS = (40, 5, 9, 23, 3)  # tokens of the examples, one batch together
TIME_LIMIT = 120.0  # seconds a type
OUTCOMES = ("exact", "refused", "wrong", "cannot_build")


class Found(NamedTuple):
    """What became of one type."""

    outcome: str
    error: float | None = None  # the largest relative error, where there are gradients
    reason: str | None = None
    layers: int | None = None  # adapted


@dataclass(frozen=True)
class _TinyModel(LanguageModel):
    """A language model whose weights are made on the spot; all else is the product's."""

    def base(self) -> Any:
        if self.name not in _built:
            model = tiny_model(self.name).double()
            model.set_experts_implementation("eager")  # the one that knows float64
            _built[self.name] = model.requires_grad_(False)
        return _built[self.name]


_built: dict[str, Any] = {}


def survey(model_type: str) -> Found:
    """One type, in this process."""
    try:
        base = _TinyModel(model_type).base()
    except Exception as error:  # whatever a configuration or a constructor says
        return Found("cannot_build", reason=_said(error))
    lora = LoraSettings().model_dump()
    try:
        with _TinyModel(model_type).adapted(**lora, seed=0) as model, float64_throughout(model):
            _leave_the_start(model)
            return _compare(model)
    except ModelError as error:
        return Found("refused", reason=str(error).replace(type(base).__name__, model_type))


def make_examples() -> list[TokenizedExample]:
    """Rows of different lengths; the first token is never supervised, the last always, between them some."""
    rng = np.random.default_rng(0)
    examples = []
    for length in LENGTHS:
        mask = rng.random(length) < 0.6
        mask[0], mask[-1] = False, True
        examples.append(TokenizedExample(rng.integers(3, VOCABULARY - 7, length).astype(np.int32), mask))
    return examples


def run(types: Sequence[str], time_limit: float = TIME_LIMIT, quiet: bool = True) -> dict[str, Found]:
    """All types, each in a forked process that is ended at the time limit."""
    context = multiprocessing.get_context("fork")
    found = {}
    for model_type in types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_survey_into, args=(sender, model_type))
        started = time.perf_counter()
        process.start()
        sender.close()
        try:
            answer = receiver.recv() if receiver.poll(time_limit) else None
            found[model_type] = answer or Found("cannot_build", reason=f"not done after {time_limit:g} s")
        except EOFError:
            process.join()
            found[model_type] = Found("cannot_build", reason=f"the process ended with status {process.exitcode}")
        process.kill()
        process.join()
        receiver.close()
        if not quiet:
            print(_line(model_type, found[model_type], time.perf_counter() - started), flush=True)
    return found


def report(found: dict[str, Found]) -> dict[str, Any]:
    """What `--json` prints."""
    counts = Counter(one.outcome for one in found.values())
    return {
        "transformers": transformers.__version__,
        "types": {name: one._asdict() for name, one in found.items()},
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "largest_error_of_exact": max(
            (one.error or 0 for one in found.values() if one.outcome == "exact"), default=None
        ),
    }


def _survey_into(sender: Connection, model_type: str) -> None:
    """What runs in the process of one type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # optional kernels that are not installed, and the like
    torch.set_num_threads(1)
    sender.send(survey(model_type))


def _leave_the_start(model: PeftModel) -> None:
    """B is zero in a fresh adapter, and A has no gradient there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.double()


def _compare(model: PeftModel) -> Found:
    examples = make_examples()
    try:
        expected = [autograd_gradient(model, example) for example in examples]
    except Exception as error:
        return Found("cannot_build", reason=f"plain autograd: {_said(error)}")
    try:
        engine = GradientEngine(model, token_budget=10**6)
        found = list(engine.per_example_gradients(examples))
    except UnsupportedModelError as error:
        return Found("refused", reason=str(error))
    except Exception as error:  # not said in the product's words
        return Found("refused", reason=_said(error))
    errors = [
        _relative_error({name: values[row] for name, values in gradients.items()}, expected[position])
        for positions, gradients in found
        for row, position in enumerate(positions)
    ]
    largest = max(errors) if np.isfinite(errors).all() else float("nan")
    return Found("exact" if largest < EXACT else "wrong", error=largest, layers=len(engine.layers))


def _relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest of any parameter, against its own gradient; of one that has next to none, against the whole."""
    whole = float(torch.stack([value.norm() for value in expected.values()]).norm())
    return max(
        float((found[n] - value).norm()) / max(float(value.norm()), 1e-6 * whole) for n, value in expected.items()
    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _line(model_type: str, found: Found, seconds: float) -> str:
    error = "" if found.error is None else f"{found.error:.1e}"
    return f"{model_type:26} {found.outcome:13} {error:8} {seconds:5.1f} s  {found.reason or ''}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    parser.add_argument("--types", nargs="+", default=causal_lm_types(), help="these alone")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds a type")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.types) - set(causal_lm_types())):
        parser.error(f"--types {unknown[0]}: no causal LM type of transformers {transformers.__version__}")
    found = run(options.types, options.time_limit, quiet=options.json)
    result = report(found)
    if options.json:
        print(json.dumps(result))
    else:
        print(", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()))


if __name__ == "__main__":
    main()
