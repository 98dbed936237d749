"""The gradient engine on a simulated accelerator: run by `test_on_a_device.py`, in a process of its own.

Every tensor must lie on the device, the results must be those of the CPU, and the host may wait once a batch (for
transformers' look at position ids), never once a layer.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from simulated_device import SIM, simulated
from test_engine import engine_gradients, llama_like, make_examples, make_model
from transformers import LlamaConfig, Qwen3Config

from prism_assets.gradients.batching import plan_batches, tokens_read
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.hidden_states import representations
from prism_assets.gradients.preconditioner import Moments, Preconditioner
from prism_assets.gradients.sketch import Sketch

BUDGET = 26
EXAMPLES = make_examples(8)
BATCHES = len(plan_batches([tokens_read(example) for example in EXAMPLES], BUDGET))
LOOK = "aten._local_scalar_dense.default"  # a value asked for: `if (…).all()`
COPY = "aten._to_copy.default"


def per_batch(waits):
    """Waits of a pass, a batch."""
    assert BATCHES > 2 and all(count % BATCHES == 0 for count in Counter(waits).values()), Counter(waits)
    return {name: count // BATCHES for name, count in Counter(waits).items()}


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        *((family, False) for family in ("llama", "qwen3", "gpt2", "gpt_neox", "mistral", "cohere", "phi", "gemma2")),
        *((family, True) for family in ("llama", "gpt2")),
    ],
)
def test_feature_rows(family, checkpointing):
    model, sketch = make_model(family), Sketch(64, 0)
    settings = dict(token_budget=BUDGET, recompute=checkpointing or None)
    expected = GradientEngine(model, **settings).feature_rows(EXAMPLES, sketch=sketch)
    with simulated() as waits:
        engine = GradientEngine(model.to(SIM), **settings)
        assert engine.device == SIM
        engine.weighted_gradient(EXAMPLES[:1], [1.0])  # what a pass keeps is measured, once
        waits.clear()
        found = engine.feature_rows(EXAMPLES, sketch=sketch)
    # The rows and the figures are read (a GPU's host does that a batch late, by an event).
    look = 2 if family == "gemma2" else 1  # it has two kinds of mask
    assert per_batch(waits) == {LOOK: look, COPY: 2}
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.refused == expected.refused


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_more_layers_are_no_more_waits(config_class):
    counts = []
    for layers in (1, 5):
        model = make_model(llama_like(config_class, num_hidden_layers=layers))
        with simulated() as waits:
            engine = GradientEngine(model.to(SIM), token_budget=BUDGET)
            engine.weighted_gradient(EXAMPLES[:1], [1.0])  # what a pass keeps is measured, once
            waits.clear()
            engine.feature_rows(EXAMPLES, sketch=Sketch(64, 0))
        counts.append(Counter(waits))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["adam", "adam_step", "adam_less"])
def test_preconditioned_rows(kind):
    model, sketch = make_model("llama"), Sketch(64, 0)
    engine = GradientEngine(model, token_budget=BUDGET)
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: Moments(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator))
        for name, shape in engine.parameter_shapes.items()
    }
    preconditioner = Preconditioner.build(kind, moments, step=7)
    expected = engine.feature_rows(EXAMPLES, sketch=sketch, preconditioner=preconditioner)
    with simulated() as waits:
        engine = GradientEngine(model.to(SIM), token_budget=BUDGET)
        engine.weighted_gradient(EXAMPLES[:1], [1.0])  # what a pass keeps is measured, once
        waits.clear()
        found = engine.feature_rows(EXAMPLES, sketch=sketch, preconditioner=preconditioner)
    assert per_batch(waits) == {LOOK: 1, COPY: 2}
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-4, atol=1e-4 * np.abs(expected.rows).max())


def test_weighted_gradient_and_directional_derivatives():
    model, weights = make_model("llama"), np.linspace(0.1, 1, len(EXAMPLES))
    engine = GradientEngine(model, token_budget=BUDGET)
    expected = engine.weighted_gradient(EXAMPLES, weights)
    derivatives = engine.directional_derivatives(EXAMPLES, expected.gradient)
    with simulated() as waits:
        engine = GradientEngine(model.to(SIM), token_budget=BUDGET)
        engine.weighted_gradient(EXAMPLES[:1], [1.0])  # what a pass keeps is measured, once
        waits.clear()
        found = engine.weighted_gradient(EXAMPLES, weights)
        assert per_batch(waits) == {LOOK: 1, COPY: 1}
        gradient = {name: value.cpu() for name, value in found.gradient.items()}
        for name, value in expected.gradient.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            engine.directional_derivatives(EXAMPLES, found.gradient), derivatives, rtol=1e-2, atol=1e-2
        )


def test_per_example_gradients_of_a_last_layer_at_supervised_positions():
    model = make_model("llama")
    expected = engine_gradients(GradientEngine(model, token_budget=BUDGET), EXAMPLES)
    with simulated():
        engine = GradientEngine(model.to(SIM), token_budget=BUDGET)
        assert engine._last_layer is not None
        found = engine_gradients(engine, EXAMPLES)
        for ours, theirs in zip(found, expected, strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name].cpu(), value, rtol=1e-4, atol=1e-5)


def test_representations():
    model = make_model("llama")
    expected = representations(model, EXAMPLES, token_budget=10**6)
    with simulated() as waits:
        model.to(SIM)
        waits.clear()
        found = representations(model, EXAMPLES, token_budget=10**6)
    assert Counter(waits) == {LOOK: 1, COPY: 1}
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# The simulation itself


def test_tensors_of_both_sides_do_not_mix():
    with simulated():
        with pytest.raises(RuntimeError, match="one on sim and one on the CPU"):
            torch.ones(3).to(SIM) + torch.ones(3)
        assert (torch.ones(3).to(SIM) * torch.tensor(2.0)).device == SIM  # numbers may, as on a GPU


@pytest.mark.parametrize(
    "ask",
    [
        lambda values: values.sum().item(),
        lambda values: bool((values > 0).all()),
        lambda values: values[values > 0],
        lambda values: values.cpu(),
        lambda values: values.nonzero(),
        lambda values: torch.empty(3).copy_(values),
    ],
    ids=["item", "if", "mask", "cpu", "nonzero", "copy"],
)
def test_a_wait_is_recorded(ask):
    with simulated() as waits:
        values = torch.arange(3.0).to(SIM)
        values * 2 + torch.zeros(3, device=SIM)
        assert waits == []
        ask(values)
        assert len(waits) == 1
