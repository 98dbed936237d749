"""Each measurement against a slow one: plain forward passes, autograd, and parameters moved by hand."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.preconditioner import Moments, Preconditioner
from prism_assets.selection.direction import TargetSet, target_vector
from prism_assets.trust.measures import (
    Probe,
    Slopes,
    growing_steps,
    random_directions,
    single_candidate_steps,
    subset_outcomes,
    weight_stability,
)

VOCABULARY = 31


class Example(NamedTuple):
    input_ids: np.ndarray
    loss_mask: np.ndarray


def make_examples(count, seed):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(5, 10))
        mask = np.zeros(length, bool)
        mask[-int(rng.integers(2, length - 1)) :] = True
        examples.append(Example(rng.integers(0, VOCABULARY, length).astype(np.int32), mask))
    return examples


TARGETS, HELD_OUT, CANDIDATES = make_examples(6, 1), make_examples(4, 2), make_examples(5, 3)


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    return GradientEngine(tiny_model(torch.float64))


def tiny_model(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(dtype)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    model = model.double() if dtype == torch.float64 else model
    with torch.no_grad():  # a LoRA whose B is zero has no gradient in A
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    return model.eval()


def probe_of(engine, kind="plain", temperature=0.7):
    pairs = kind == "pairs"
    held_out = TargetSet(HELD_OUT, 2 if pairs else 4, pairs)
    return Probe(engine, TargetSet(TARGETS, 3 if pairs else 6, pairs), kind, temperature, held_out)


# The slow way: transformers' own forward pass, one example at a time, differentiable.


def slow_score(engine, example):
    ids = torch.from_numpy(example.input_ids).long()[None]
    log_probs = engine.model(input_ids=ids).logits[0].log_softmax(-1)
    supervised = [position for position in range(1, ids.shape[1]) if example.loss_mask[position]]
    return torch.stack([log_probs[position - 1, ids[0, position]] for position in supervised]).mean()


def slow_scores(engine, kind):
    scores = torch.stack([slow_score(engine, example) for example in TARGETS])
    return scores[:3] - scores[3:] if kind == "pairs" else scores


def slow_phi(scores, kind, temperature):
    if kind == "plain":
        return torch.exp(scores / temperature)
    return temperature * torch.nn.functional.softplus(scores / temperature)


def slow_outcome(engine, kind="plain", temperature=0.7):
    """J, mean score and held-out mean log-probability."""
    scores = slow_scores(engine, kind)
    objective = slow_phi(scores, kind, temperature)
    wanted = HELD_OUT[:2] if kind == "pairs" else HELD_OUT
    held_out = torch.stack([slow_score(engine, example) for example in wanted]).mean()
    return objective.mean(), scores.mean(), held_out


def slow_weights(engine, kind="plain", temperature=0.7):
    """The derivative of each target's share of J, normalised: what autograd says of φ′."""
    scores = slow_scores(engine, kind).detach().requires_grad_(True)
    phi = slow_phi(scores, kind, temperature)
    (slope,) = torch.autograd.grad(phi.sum(), scores)
    return (slope / slope.sum()).numpy()


def slow_gradient(engine, value):
    names = list(engine.parameters)
    with torch.enable_grad():
        gradients = torch.autograd.grad(value(), [engine.parameters[name] for name in names])
    return dict(zip(names, gradients, strict=True))


def numbers(outcome):
    return [one.item() if isinstance(one, torch.Tensor) else float(one) for one in outcome]


class Moved:
    """Within it the parameters are θ + size · direction, set by hand."""

    def __init__(self, engine, direction, size):
        self.engine, self.direction, self.size = engine, direction, size

    def __enter__(self):
        self.saved = {name: value.detach().clone() for name, value in self.engine.parameters.items()}
        with torch.no_grad():
            for name, change in self.direction.items():
                self.engine.parameters[name] += self.size * change.to(torch.float64)

    def __exit__(self, *_):
        with torch.no_grad():
            for name, value in self.saved.items():
                self.engine.parameters[name].copy_(value)


@pytest.fixture(autouse=True)
def parameters_stay(engine):
    """No measurement leaves a trace, to the last bit."""
    before = {name: value.detach().clone() for name, value in engine.parameters.items()}
    yield
    assert all(torch.equal(value, before[name]) for name, value in engine.parameters.items())


@pytest.mark.parametrize("kind", ["plain", "pairs"])
def test_outcome_and_weights_are_those_of_plain_forward_passes(engine, kind):
    outcome, weights = probe_of(engine, kind).look()
    assert numbers(outcome) == pytest.approx(numbers(slow_outcome(engine, kind)), rel=1e-9)
    assert weights == pytest.approx(slow_weights(engine, kind), rel=1e-9)


def test_a_half_precision_model_is_measured_in_single_precision():
    model = tiny_model(torch.bfloat16)
    engine = GradientEngine(model)
    outcome, _ = probe_of(engine).look()
    direction = next(random_directions(engine.parameter_shapes, 1, seed=0))
    (step,) = growing_steps(probe_of(engine), direction, Slopes(direction, direction), [0.5])
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    half = numbers(slow_outcome(engine))
    model.float()
    wide = numbers(slow_outcome(engine))
    assert numbers(outcome) == pytest.approx(wide, rel=1e-5) and numbers(outcome) != pytest.approx(half, rel=1e-4)
    with engine.step(direction, 0.5), torch.no_grad():
        assert step["measured"] == pytest.approx(float(slow_outcome(engine)[0]) - wide[0], rel=1e-3)


def test_random_directions_are_unit_differ_and_come_again_for_a_seed(engine):
    first, second = ([*random_directions(engine.parameter_shapes, 3, seed=5)] for _ in range(2))
    for one, again in zip(first, second, strict=True):
        flat = torch.cat([one[name].flatten() for name in engine.parameters])
        assert float(flat.norm()) == pytest.approx(1, rel=1e-5)
        assert all(torch.equal(one[name], again[name]) for name in one)
    cosines = [sum(float((a[n] * b[n]).sum()) for n in a) for a, b in zip(first, first[1:], strict=False)]
    assert max(map(abs, cosines)) < 0.3
    other = next(random_directions(engine.parameter_shapes, 1, seed=6))
    assert not torch.equal(other[engine.parameter_names[0]], first[0][engine.parameter_names[0]])


@pytest.mark.parametrize("kind", ["plain", "pairs"])
def test_flips_are_those_of_weights_formed_anew_at_the_moved_parameters(engine, kind):
    probe = probe_of(engine, kind)
    directions = [*random_directions(engine.parameter_shapes, 3, seed=0)]
    found = weight_stability(probe, directions, length=8.0)
    before = slow_weights(engine, kind)
    for position, direction in enumerate(directions):
        with Moved(engine, direction, 8.0):
            after = slow_weights(engine, kind)
        m = len(before)
        flips = [(before[i] - before[j]) * (after[i] - after[j]) < 0 for i in range(m) for j in range(i)]
        assert found.flipped[position] == np.mean(flips)
        ranks = [np.argsort(np.argsort(one)) for one in (before, after)]
        assert found.rank_correlations[position] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert max(found.flipped) > 0  # a step that long is seen
    still = weight_stability(probe, directions, length=1e-7)
    assert still.flipped == [0, 0, 0]


def slow_held_out(engine, kind):
    """The mean held-out margin of pairs, else the mean log-probability."""
    scores = torch.stack([slow_score(engine, example) for example in HELD_OUT])
    return (scores[:2] - scores[2:]).mean() if kind == "pairs" else scores.mean()


@pytest.mark.parametrize("kind", ["plain", "pairs"])
def test_growing_steps_are_predicted_by_autograd_and_measured_by_hand(engine, kind):
    probe = probe_of(engine, kind)
    slopes = Slopes(probe.gradient(), probe.held_out_gradient())
    expected = [
        slow_gradient(engine, lambda: slow_outcome(engine, kind)[0]),
        slow_gradient(engine, lambda: slow_held_out(engine, kind)),
    ]
    along = target_vector(engine, probe.targets, np.full(probe.targets.size, 1 / probe.targets.size))
    steps = growing_steps(probe, along, slopes, [0.001, 0.05, 1.0])
    length = float(torch.cat([one.flatten() for one in along.values()]).norm())
    slope, held_out_slope = (sum(float((one[name] * along[name]).sum()) for name in along) / length for one in expected)

    def look():
        with torch.no_grad():
            return [*numbers(slow_outcome(engine, kind)), slow_held_out(engine, kind).item()]

    before = look()
    for step in steps:
        with Moved(engine, along, step["size"] / length):
            after = look()
        assert step["predicted"] == pytest.approx(step["size"] * slope, rel=1e-6)
        assert step["measured"] == pytest.approx(after[0] - before[0], rel=1e-6)
        assert step["held_out"] == pytest.approx(after[2] - before[2], rel=1e-6)
        assert step["held_out_predicted"] == pytest.approx(step["size"] * held_out_slope, rel=1e-6)
        assert step["held_out_measured"] == pytest.approx(after[3] - before[3], rel=1e-6)
    # First order: the error vanishes faster than the step.
    errors = [abs(step["measured"] / step["predicted"] - 1) for step in steps]
    assert errors[0] < 0.01 < errors[2]


@pytest.mark.parametrize("form", ["sgd", "adam", "adam_step"])
def test_single_steps_follow_the_preconditioned_gradient_and_change_what_plain_passes_say(engine, form):
    generator = torch.Generator().manual_seed(4)
    moments = {
        name: Moments(
            torch.randn(shape, generator=generator, dtype=torch.float64) * 1e-2,
            torch.rand(shape, generator=generator, dtype=torch.float64) * 1e-3,
        )
        for name, shape in engine.parameter_shapes.items()
    }
    preconditioner = Preconditioner.build(form, moments, step=7, betas=(0.9, 0.99), eps=1e-6)
    directions = {
        "prism": slow_gradient(engine, lambda: slow_outcome(engine)[0]),
        "uniform": slow_gradient(engine, lambda: slow_outcome(engine)[1]),
    }
    effects = single_candidate_steps(probe_of(engine), CANDIDATES, preconditioner, directions, 0.3)
    before, weights = numbers(slow_outcome(engine)), slow_weights(engine)
    for example, effect in zip(CANDIDATES, effects, strict=True):
        g = slow_gradient(engine, lambda example=example: slow_score(engine, example))
        step = {name: by_hand(form, g[name], moments[name]) for name in g}
        length = sum(float(value.square().sum()) for value in step.values()) ** 0.5
        for name, t in directions.items():
            product = sum(float((t[key] * step[key]).sum()) for key in step)
            norm_t = sum(float(value.square().sum()) for value in t.values()) ** 0.5
            assert effect.cosines[name] == pytest.approx(product / (norm_t * length), rel=1e-6)
        with Moved(engine, step, 0.3 / length), torch.no_grad():
            after = numbers(slow_outcome(engine))
        with Moved(engine, step, 0.3 / length):
            moved = slow_weights(engine)
        assert numbers(effect.change) == pytest.approx(np.subtract(after, before), rel=1e-6)
        flips = [(weights[i] - weights[j]) * (moved[i] - moved[j]) < 0 for i in range(6) for j in range(i)]
        assert effect.flipped == np.mean(flips)


def by_hand(form, g, moments):
    """Γ by the table of docs/method.md, section 4."""
    if form == "sgd":
        return g
    if form == "adam":
        return g / ((moments.exp_avg_sq / (1 - 0.99**7)).sqrt() + 1e-6)
    first = (0.9 * moments.exp_avg - 0.1 * g) / (1 - 0.9**8)
    second = (0.99 * moments.exp_avg_sq + 0.01 * g**2) / (1 - 0.99**8)
    return -first / (second.sqrt() + 1e-6)


def test_scores_order_what_small_steps_really_do(engine):
    directions = {"prism": slow_gradient(engine, lambda: slow_outcome(engine)[0])}
    effects = single_candidate_steps(probe_of(engine), TARGETS, Preconditioner.build("sgd"), directions, 0.05)
    cosines = [one.cosines["prism"] for one in effects]
    changes = [one.change.prism for one in effects]
    assert np.corrcoef(cosines, changes)[0, 1] > 0.95


def test_a_candidate_without_a_gradient_is_refused(engine, monkeypatch):
    class Vanished:
        gradient = {name: torch.zeros(shape) for name, shape in engine.parameter_shapes.items()}

    monkeypatch.setattr(engine, "weighted_gradient", lambda examples, weights: Vanished)
    with pytest.raises(ValueError, match="candidate 0 has a preconditioned gradient of norm 0"):
        single_candidate_steps(probe_of(engine), CANDIDATES, Preconditioner.build("sgd"), {}, 0.1)


def test_every_subset_is_trained_on_alone_and_from_the_same_start(engine):
    start = {name: value.detach().clone() for name, value in engine.parameters.items()}

    def restore():
        with torch.no_grad():
            for name, value in start.items():
                engine.parameters[name].copy_(value)

    def train(examples):
        """Two steps of plain gradient ascent."""
        for _ in range(2):
            g = slow_gradient(engine, lambda: torch.stack([slow_score(engine, one) for one in examples]).mean())
            with torch.no_grad():
                for name, value in g.items():
                    engine.parameters[name] += 0.1 * value

    masks = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=bool)
    changes = subset_outcomes(probe_of(engine), CANDIDATES, masks, train, restore)
    before = numbers(slow_outcome(engine))
    for mask, change in zip(masks, changes, strict=True):
        train([example for example, taken in zip(CANDIDATES, mask, strict=True) if taken])
        with torch.no_grad():
            after = numbers(slow_outcome(engine))
        restore()
        assert numbers(change) == pytest.approx(np.subtract(after, before), rel=1e-6)
    assert changes[0] == changes[2] != changes[1]

    def fail(examples):
        train(examples)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        subset_outcomes(probe_of(engine), CANDIDATES, masks, fail, restore)  # `parameters_stay` looks at the rest
