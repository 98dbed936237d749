"""The target direction on a tiny model, against plain autograd through the preference objective."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.sketch import ExactFeatures
from prism_assets.selection.direction import (
    TargetSet,
    first_order_gain,
    inner,
    norm,
    query_vector,
    target_vector,
)
from prism_assets.selection.preference import preference_weights
from prism_assets.selection.strategies import STRATEGIES, TargetScores

VOCABULARY = 37


class Example(NamedTuple):
    input_ids: np.ndarray
    loss_mask: np.ndarray


def make_examples(count, seed):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(5, 11))
        mask = np.zeros(length, bool)
        mask[-int(rng.integers(2, length - 1)) :] = True
        examples.append(Example(rng.integers(0, VOCABULARY, length).astype(np.int32), mask))
    return examples


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )
    model = get_peft_model(base.double(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")).double()
    with torch.no_grad():  # a LoRA whose B is zero has no gradient in A
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.2)
    return GradientEngine(model.eval(), token_budget=40)


def score_of(engine, example):
    """The mean log-probability of one example, written out, with autograd's graph."""
    ids = torch.as_tensor(example.input_ids, dtype=torch.long)
    log_probs = engine.model(ids[None]).logits[0, :-1].log_softmax(-1)
    supervised = torch.as_tensor(example.loss_mask[1:])
    return log_probs.gather(1, ids[1:, None])[:, 0][supervised].mean()


def objective(engine, targets, kind, temperature):
    """J = mean_j φ(s_j), one example at a time."""
    scores = torch.stack([score_of(engine, example) for example in targets.examples])
    if targets.pairs:
        scores = scores[: targets.size] - scores[targets.size :]
    scaled = scores / temperature
    return (
        scaled.exp() if kind == "plain" else temperature * torch.nn.functional.softplus(scaled)
    ).mean(), scores.detach().numpy()


def make_targets(kind, count=5):
    if kind == "plain":
        return TargetSet(make_examples(count, 1), count, False)
    return TargetSet([*make_examples(count, 1), *make_examples(count, 2)], count, True)


@pytest.mark.parametrize("kind", ["plain", "pairs"])
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_z_times_t_is_the_gradient_of_the_preference_objective(engine, kind, temperature):
    targets = make_targets(kind)
    value, scores = objective(engine, targets, kind, temperature)
    parameters = {name: engine.parameters[name] for name in engine.parameter_names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    expected = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))

    found_scores = targets.scores(engine.mean_log_probs(targets.examples))
    np.testing.assert_allclose(found_scores, scores, rtol=1e-6)
    preference = preference_weights(found_scores, kind, temperature)
    t = target_vector(engine, targets, preference.weights)
    assert list(t) == engine.parameter_names
    z = np.exp(preference.log_z)
    # In float64 but for the model's own RMSNorm, which transformers computes in float32.
    difference = norm({name: z * t[name] - expected[name] for name in t})
    assert difference <= 1e-6 * norm(expected)
    assert preference.objective == pytest.approx(value.item(), rel=1e-6)
    # The weights matter: the uniform direction is another one.
    uniform = target_vector(engine, targets, np.full(targets.size, 1 / targets.size))
    assert inner(uniform, t) / norm(uniform) / norm(t) < 0.999


def test_the_less_direction_is_the_mean_of_unit_gradients(engine):
    targets = make_targets("plain", 4)
    single = [target_vector(engine, targets.target(j), np.ones(1)) for j in range(4)]
    norms = np.array([norm(one) for one in single])
    weights = STRATEGIES["less"].weigh(TargetScores(np.zeros((1, 4)), norms[None], "plain", 1.0, np.zeros(4)))[0]
    found = target_vector(engine, targets, weights)
    expected = {name: sum(one[name] / n for one, n in zip(single, norms, strict=True)) / 4 for name in found}
    assert norm({name: found[name] - expected[name] for name in found}) <= 1e-6 * norm(expected)


def test_a_pair_is_its_wanted_completion_minus_its_unwanted_one(engine):
    targets = make_targets("pairs", 3)
    np.testing.assert_array_equal(targets.expand(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5, -0.2, -0.3, -0.5])
    np.testing.assert_array_equal(targets.scores(np.array([5.0, 6, 7, 1, 1, 2])), [4, 5, 5])
    second = targets.target(1)
    assert second.examples == [targets.examples[1], targets.examples[4]] and second.size == 1 and second.pairs
    weights = np.array([0.2, 0.3, 0.5])
    whole = target_vector(engine, targets, weights)
    parts = [target_vector(engine, targets.target(j), np.ones(1)) for j in range(3)]
    expected = {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in whole}
    assert norm({name: whole[name] - expected[name] for name in whole}) <= 1e-6 * norm(whole)


def test_plain_targets_are_themselves():
    targets = make_targets("plain", 3)
    weights = np.array([0.2, 0.3, 0.5])
    np.testing.assert_array_equal(targets.expand(weights), weights)
    np.testing.assert_array_equal(targets.scores(weights), weights)
    assert targets.target(2).examples == [targets.examples[2]]


# -- the query ---------------------------------------------------------------------------------------------------


def test_the_query_scores_a_candidate_with_the_weighted_sum_of_its_cosines():
    rng = np.random.default_rng(3)
    checkpoints, dimensions, rows = 3, 40, 25
    t = rng.normal(size=(checkpoints, dimensions)) * np.array([[0.01], [1.0], [100.0]])
    gamma = rng.normal(size=(rows, checkpoints, dimensions)) * rng.uniform(0.01, 100, size=(rows, checkpoints, 1))
    rates = np.array([2e-5, 1e-5, 5e-6])

    expected = np.zeros(rows)  # Σ_k η̄_k cos(t_k, Γ_ik), one term at a time
    for i in range(rows):
        for k in range(checkpoints):
            cosine = t[k] @ gamma[i, k] / np.linalg.norm(t[k]) / np.linalg.norm(gamma[i, k])
            expected[i] += rates[k] * cosine

    stored = (gamma / np.linalg.norm(gamma, axis=2, keepdims=True)).reshape(rows, -1)
    query = query_vector(list(t), [np.linalg.norm(one) for one in t], rates.tolist())
    assert query.dtype == np.float32 and query.shape == (checkpoints * dimensions,)
    # The rates count up to a common factor, which changes no ranking: they are scaled to sum to 1.
    np.testing.assert_allclose(stored @ query, expected / rates.sum(), atol=1e-6)


def test_the_query_divides_by_the_exact_norm_not_by_the_sketchs():
    query = query_vector([np.array([3.0, 4.0])], [10.0], [1e-4])
    np.testing.assert_allclose(query, [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("length", [0.0, np.nan, np.inf])
def test_a_direction_without_length_is_refused(length):
    with pytest.raises(ValueError, match=r"target vector of checkpoint 1 has norm"):
        query_vector([np.ones(2), np.ones(2)], [1.0, length], [1.0, 1.0])


def test_a_cosine_with_the_query_is_the_exact_influence_of_a_real_candidate(engine):
    """Exact features end to end: ⟨t, g⟩/(‖t‖‖g‖) from the engine's rows is that of autograd."""
    targets, candidates = make_targets("plain", 3), make_examples(4, 7)
    t = target_vector(engine, targets, np.full(3, 1 / 3))
    exact = ExactFeatures(engine.parameter_shapes)
    rows = engine.feature_rows(candidates, sketch=exact)
    query = query_vector([exact.sketch_vector(t).numpy()], [norm(t)], [1.0])
    found = (rows.rows / rows.norms[:, None]) @ query
    for example, score in zip(candidates, found, strict=True):
        names = engine.parameter_names
        gradient = torch.autograd.grad(score_of(engine, example), [engine.parameters[name] for name in names])
        gradient = dict(zip(names, gradient, strict=True))
        assert score == pytest.approx(inner(t, gradient) / norm(t) / norm(gradient), abs=1e-5)


# -- the measured step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "pairs"])
def test_the_first_order_gain_is_what_a_step_does(engine, kind):
    targets, held_out = make_targets(kind), make_examples(4, 9)
    before_scores = targets.scores(engine.mean_log_probs(targets.examples))
    preference = preference_weights(before_scores, kind, 1.0)
    t = target_vector(engine, targets, preference.weights)
    gradient = {name: np.exp(preference.log_z) * value for name, value in t.items()}
    held_before = float(np.mean(engine.mean_log_probs(held_out)))
    parameters = {name: value.detach().clone() for name, value in engine.parameters.items()}

    def gain(along, size):
        return first_order_gain(
            engine,
            along,
            gradient,
            size,
            lambda scores: preference_weights(scores, kind, 1.0).objective,
            targets,
            held_out,
            (preference.objective, held_before),
        )

    size = 1e-4
    found = gain(t, size)
    assert found.predicted == pytest.approx(size * norm(gradient), rel=1e-6)
    assert found.measured == pytest.approx(found.predicted, rel=1e-2) and found.measured > 0
    assert all(torch.equal(value, parameters[name]) for name, value in engine.parameters.items())
    # By hand: move the parameters, look, move them back.
    with torch.no_grad():
        for name, value in engine.parameters.items():
            value.add_(size * t[name] / norm(t))
        moved = float(np.mean([score_of(engine, example).item() for example in held_out]))
        measured = objective(engine, targets, kind, 1.0)[0].item() - preference.objective
        for name, value in engine.parameters.items():
            value.copy_(parameters[name])
    assert found.held_out_mean_log_prob == pytest.approx(moved - held_before, rel=1e-6)
    assert found.measured == pytest.approx(measured, rel=1e-6)
    # No other direction of that length raises J faster.
    torch.manual_seed(1)
    other = {name: torch.randn_like(value) for name, value in t.items()}
    assert abs(gain(other, size).predicted) < found.predicted
    opposite = gain({name: -value for name, value in t.items()}, size)
    assert opposite.measured < 0 and opposite.predicted == pytest.approx(-found.predicted)


def test_norm_and_inner_product_run_over_all_parameters():
    left = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
    right = {"b": torch.tensor([5.0]), "a": torch.tensor([[-1.0, 4.0]])}
    assert norm(left) == pytest.approx(14**0.5)
    assert inner(left, right) == pytest.approx(-1 + 8 + 15)
    # Accumulated in float64: float32 would lose the small one.
    assert (
        inner({"a": torch.tensor([1e8]), "b": torch.tensor([1.0])}, {"a": torch.ones(1), "b": torch.ones(1)}) == 1e8 + 1
    )


def test_learning_rates_of_zero_count_alike():
    sketches = [np.array([3.0, 4.0]), np.array([0.0, 2.0])]
    query = query_vector(sketches, [5.0, 2.0], [0.0, 0.0])
    np.testing.assert_allclose(query, [0.3, 0.4, 0.0, 0.5], rtol=1e-6)


def test_without_a_usable_sample_row_a_correction_says_what_to_do():
    import pyarrow as pa

    from prism_assets.errors import SettingsError
    from prism_assets.selection.curvature import correct

    sample = pa.table({"refused": ["the gradient vanishes", "the gradient is not finite"]})
    lake = SimpleNamespace(read_table=lambda artifact, columns=None: sample)
    settings = SimpleNamespace(curvature=SimpleNamespace(kind="fisher", damping=0.1))
    stage = SimpleNamespace(lake=lake, settings=settings)
    work = SimpleNamespace(stage=stage, checkpoints=[None], at=lambda checkpoint: None)
    with pytest.raises(SettingsError, match="curvature.kind: .* 2 rows and none .*vanishes.* warmup.share"):
        correct(work, 0, [{}], sample)


def test_agreement_of_weights_is_the_worst_rank_correlation_with_ties_shared():
    from prism_assets.selection.target_direction import _rank_agreement

    last, near, far = np.array([0.1, 0.2, 0.2, 0.5]), np.array([0.1, 0.3, 0.2, 0.4]), np.array([0.4, 0.1, 0.1, 0.4])
    # By hand: equal values share the mean of their ranks.
    ranks = np.array([[1, 2.5, 2.5, 4], [1, 3, 2, 4], [3.5, 1.5, 1.5, 3.5]])
    expected = np.corrcoef(ranks)[0, 1:].min()
    assert _rank_agreement([near, far, last]) == pytest.approx(expected)
    assert _rank_agreement([last]) is None and _rank_agreement([np.full(4, 0.25), last]) is None
