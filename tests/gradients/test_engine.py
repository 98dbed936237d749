"""The gradient engine against plain autograd, one example at a time, on tiny random models."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.batching import plan_batches
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.memory import is_out_of_memory
from prism_assets.gradients.preconditioner import Moments, Preconditioner
from prism_assets.gradients.sketch import ExactFeatures, Sketch

VOCABULARY = 61


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products only lose time by being split between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Example(NamedTuple):
    input_ids: np.ndarray
    loss_mask: np.ndarray


def make_examples(count=5, seed=0, longest=13):
    """Rows of different lengths; supervised tokens at the end, for every third row also in the middle."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(rng.integers(4, longest + 1))
        mask = np.zeros(length, dtype=bool)
        mask[-int(rng.integers(1, length - 1)) :] = True
        if index % 3 == 2:
            mask[-1], mask[1] = False, True
        examples.append(Example(rng.integers(0, VOCABULARY, length).astype(np.int32), mask))
    return examples


def llama_like(config_class, **settings):
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return config_class(**(common | settings))


FAMILIES = {
    "llama": lambda: llama_like(LlamaConfig),
    "qwen2": lambda: llama_like(Qwen2Config, tie_word_embeddings=True),
    "qwen3": lambda: llama_like(Qwen3Config),
    "mistral": lambda: llama_like(MistralConfig, sliding_window=4),
    "gemma": lambda: llama_like(GemmaConfig),
    "gemma2": lambda: llama_like(Gemma2Config, final_logit_softcapping=2.0, sliding_window=4),
    "cohere": lambda: llama_like(CohereConfig, logit_scale=0.25),
    "granite": lambda: llama_like(GraniteConfig, logits_scaling=3.0, residual_multiplier=0.5),
    "phi": lambda: llama_like(PhiConfig, num_key_value_heads=4, partial_rotary_factor=0.5),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: llama_like(GPTNeoXConfig, num_key_value_heads=4, rotary_pct=0.5),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
    ),
    "falcon_alibi": lambda: FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        alibi=True,
        new_decoder_architecture=False,
        multi_query=False,
        parallel_attn=False,
    ),
}


def make_model(family="llama", dtype=torch.float32, seed=0, targets="all-linear", **lora):
    """A random model with a random, non-zero B; weights large enough for far from uniform predictions."""
    torch.manual_seed(seed)
    config = FAMILIES[family]() if isinstance(family, str) else family
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    settings = dict(r=3, lora_alpha=8, lora_dropout=0.2, target_modules=targets) | lora
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.to(dtype)


class _WideTorch:
    """torch with float32 meaning float64, for modelling code that casts to float32 inside (RMS norms, rotary
    angles)."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def widen_float32_islands(model, monkeypatch):
    """Makes a float64 model compute in float64 throughout, so that only the engine's own error is left to
    see."""
    monkeypatch.setattr(sys.modules[type(model.get_base_model()).__module__], "torch", _WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def naive_mean_log_prob(model, example):
    """s of one example by the model's own forward pass, batch of one, no gathering; differentiable."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return log_probs[torch.from_numpy(example.loss_mask[1:])].mean()


def naive_gradient(model, example, allow_unused=False):
    """g of one example by plain autograd on PEFT's own layers: canonical name -> tensor."""
    model.eval()
    parameters = {
        name.replace(".default", ""): parameter for name, parameter in model.named_parameters() if "lora_" in name
    }
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            naive_mean_log_prob(model, example), list(parameters.values()), materialize_grads=allow_unused
        )
    return dict(zip(parameters, gradients, strict=True))


def engine_gradients(engine, examples):
    """Each example's g, in the given order."""
    result = [None] * len(examples)
    for positions, gradients in engine.per_example_gradients(examples):
        for row, position in enumerate(positions):
            result[position] = {name: value[row].clone() for name, value in gradients.items()}
    return result


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_per_example_gradients_equal_autograd_module_by_module(family, dtype, bound, monkeypatch):
    model, examples = make_model(family, dtype), make_examples()
    if dtype == torch.float64:
        widen_float32_islands(model, monkeypatch)
    engine = GradientEngine(model, token_budget=26)
    assert len(plan_batches([len(e.input_ids) for e in examples], 26)) > 1
    found = engine_gradients(engine, examples)
    log_probs = engine.mean_log_probs(examples)
    for index, example in enumerate(examples):
        expected = naive_gradient(model, example)
        assert list(found[index]) == list(expected) == engine.parameter_names
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert relative_error(found[index][name], gradient) <= bound, (index, name)
        assert abs(log_probs[index] - naive_mean_log_prob(model, example).item()) <= (1e-5 if bound > 1e-6 else 1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_in_many_chunks_change_nothing(family, monkeypatch):
    monkeypatch.setattr("prism_assets.gradients.head.CHUNK_ELEMENTS_CPU", 1)
    examples = make_examples(24)
    model = make_model(family)
    engine = GradientEngine(model, token_budget=10_000)  # more than 32 supervised tokens, so more than one chunk
    assert sum(e.loss_mask.sum() for e in examples) > 64
    found = engine_gradients(engine, examples)
    for index in (0, 11, 23):
        for name, gradient in naive_gradient(model, examples[index]).items():
            assert relative_error(found[index][name], gradient) <= 1e-4


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"layers": 1},
        {"rank_pattern": {"q_proj": 5}},
    ],
    ids=["rslora", "lm_head", "last_layer", "ranks"],
)
def test_kinds_of_adapter(lora):
    lora = dict(lora)
    targets = lora.pop("target_modules", ["q_proj", "down_proj"])
    if "layers" in lora:
        lora = {"layers_to_transform": [lora.pop("layers")]}
    model, examples = make_model("llama", targets=targets, **lora), make_examples()
    found = engine_gradients(GradientEngine(model), examples)
    for index, example in enumerate(examples):
        for name, gradient in naive_gradient(model, example).items():
            assert relative_error(found[index][name], gradient) <= 1e-4, name


def test_gradient_checkpointing_changes_nothing():
    model, examples = make_model("qwen3"), make_examples()
    kept = engine_gradients(GradientEngine(model), examples)
    recomputed = engine_gradients(GradientEngine(model, recompute=True), examples)
    for first, second in zip(kept, recomputed, strict=True):
        for name in first:
            assert relative_error(second[name], first[name]) <= 1e-6


def test_nothing_below_the_lowest_adapted_layer_is_recorded():
    model = make_model("llama", targets=["down_proj"], layers_to_transform=[1])
    recorded = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, __, out, name=name: recorded.setdefault(name, []).append(out.requires_grad)
            )
    GradientEngine(model).feature_rows(make_examples(2), sketch=Sketch(16, 0))
    assert not any(recorded["base_model.model.model.layers.0.mlp.down_proj"])
    assert not any(recorded["base_model.model.model.layers.1.mlp.up_proj"])
    assert recorded["base_model.model.model.layers.1.mlp.down_proj"][-1]


GATHERED_LAST_LAYER = {"llama", "qwen2", "qwen3", "mistral", "gemma"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "gpt2"])
def test_only_supervised_positions_pass_the_last_mlp_where_the_layer_is_known(family):
    model, examples = make_model(family), make_examples(4)
    mlp = [module for name, module in model.named_modules() if name.endswith("mlp")][-1]
    engine = GradientEngine(model, token_budget=10**6)
    seen = []
    hook = mlp.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    engine.mean_log_probs(examples)
    hook.remove()
    supervised = sum(int(example.loss_mask.sum()) for example in examples)
    width = max(int(np.flatnonzero(example.loss_mask)[-1]) for example in examples)
    assert seen == [(1, supervised) if family in GATHERED_LAST_LAYER else (4, width)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_layer_that_computes_something_else_runs_as_it_is(dtype):
    """Its parts have the known names, but it scales what the MLP adds."""
    model, examples = make_model("llama", torch.float32), make_examples(3)
    layer = model.get_base_model().model.layers[-1]

    def forward(hidden_states, **settings):
        attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), **settings)
        hidden = hidden_states + attended
        return hidden + 0.9 * layer.mlp(layer.post_attention_layernorm(hidden))

    layer.forward = forward
    found = engine_gradients(GradientEngine(model), examples)
    for index, example in enumerate(examples):
        for name, gradient in naive_gradient(model, example).items():
            assert relative_error(found[index][name], gradient) <= 1e-4, name
    assert GradientEngine(model.to(dtype))._last_layer is None


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
        ),
        llama_like(Gemma3TextConfig, use_bidirectional_attention=True),
    ],
    ids=["bert", "gemma3"],
)
def test_models_whose_tokens_see_later_ones_are_refused(config):
    with pytest.raises(UnsupportedModelError, match="lets tokens see later ones"):
        GradientEngine(make_model(config))


def test_order_padding_and_batch_size_do_not_matter():
    model, examples = make_model("llama"), make_examples(12)
    engine, sketch = GradientEngine(model, token_budget=40), Sketch(128, seed=1)
    reference = engine.feature_rows(examples, sketch=sketch)
    order = np.random.default_rng(5).permutation(len(examples))
    shuffled = engine.feature_rows([examples[i] for i in order], sketch=sketch)
    longer = make_examples(1, seed=9, longest=13)[0]
    longer = Example(
        np.tile(longer.input_ids, 4),
        np.tile(longer.loss_mask, 4) & (np.arange(4 * len(longer.input_ids)) > 0),
    )
    variants = {
        "order": (shuffled, order),
        "one at a time": (GradientEngine(model, token_budget=1).feature_rows(examples, sketch=sketch), None),
        "one batch": (GradientEngine(model, token_budget=10**6).feature_rows(examples, sketch=sketch), None),
        "long neighbour": (
            GradientEngine(model, token_budget=10**6).feature_rows([*examples, longer], sketch=sketch),
            None,
        ),
    }
    for label, (found, permutation) in variants.items():
        where = np.arange(len(examples)) if permutation is None else np.argsort(permutation)
        rows, norms = found.rows[where], found.norms[where]
        unit = rows / norms[:, None]
        expected = reference.rows / reference.norms[:, None]
        assert np.abs(unit - expected).max() <= 1e-5, label
        np.testing.assert_allclose(norms, reference.norms, rtol=1e-5, err_msg=label)
        np.testing.assert_allclose(found.mean_log_probs[where], reference.mean_log_probs, rtol=1e-5, err_msg=label)


def test_shards_featurised_apart_equal_the_whole():
    model, examples = make_model("gpt2"), make_examples(9)
    whole = GradientEngine(model).feature_rows(examples, sketch=Sketch(64, seed=4))
    for part in (slice(0, 4), slice(4, 9)):
        alone = GradientEngine(model).feature_rows(examples[part], sketch=Sketch(64, seed=4))
        assert np.abs(alone.rows - whole.rows[part]).max() <= 1e-5 * whole.norms.max()


def test_rows_are_the_preconditioned_gradients_with_exact_norms():
    model, examples = make_model("llama", torch.float64), make_examples()
    engine = GradientEngine(model, token_budget=30)
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: Moments(torch.randn(*shape, generator=generator) * 1e-3, torch.rand(*shape, generator=generator) * 1e-4)
        for name, shape in engine.parameter_shapes.items()
    }
    exact = ExactFeatures(engine.parameter_shapes)
    for kind in ("sgd", "adam", "adam_step", "adam_less"):
        preconditioner = Preconditioner.build(kind, moments, step=5)
        found = engine.feature_rows(examples, sketch=exact, preconditioner=preconditioner)
        sketched = engine.feature_rows(examples, sketch=Sketch(256, 0), preconditioner=preconditioner)
        for index, example in enumerate(examples):
            gradient = naive_gradient(model, example)
            expected = {n: preconditioner.apply(n, g[None])[0] for n, g in gradient.items()}
            flat = torch.cat([expected[name].flatten() for name in engine.parameter_names])
            np.testing.assert_allclose(found.rows[index], flat.numpy(), rtol=1e-4, atol=1e-6 * flat.norm())
            for rows in (found, sketched):
                assert rows.norms[index] == pytest.approx(float(flat.norm()), rel=1e-6)
                plain = torch.cat([g.flatten() for g in gradient.values()]).norm()
                assert rows.gradient_norms[index] == pytest.approx(float(plain), rel=1e-6)
            expected_sketch = Sketch(256, 0).sketch_vector(expected)
            np.testing.assert_allclose(sketched.rows[index], expected_sketch.numpy(), atol=1e-5 * flat.norm())
        assert found.refused == [None] * len(examples)


def test_weighted_gradient_and_directional_derivatives_equal_autograd():
    model, examples = make_model("qwen2"), make_examples(6)
    engine = GradientEngine(model, token_budget=30)
    weights = np.array([0.5, -0.25, 1e-30, 2.0, 0.0, 0.125])
    found = engine.weighted_gradient(examples, weights)
    gradients = [naive_gradient(model, example) for example in examples]
    for name in engine.parameter_names:
        expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
        assert found.gradient[name].dtype == torch.float32
        assert relative_error(found.gradient[name], expected) <= 1e-4
    np.testing.assert_allclose(found.mean_log_probs, engine.mean_log_probs(examples), rtol=1e-6)
    tiny = engine.weighted_gradient(examples, weights * 1e-30).gradient
    assert (
        relative_error(tiny[engine.parameter_names[0]].double() * 1e30, found.gradient[engine.parameter_names[0]])
        <= 1e-4
    )

    direction = {name: 7.0 * value for name, value in found.gradient.items()}
    expected = [sum(float((g[name] * direction[name]).sum()) for name in direction) for g in gradients]
    derivatives = engine.directional_derivatives(examples, direction, epsilon=3e-3)
    scale = np.abs(expected).max()
    assert np.abs(derivatives - expected).max() <= 2e-3 * scale


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_weighted_gradients_by_one_pass_equal_autograd(family):
    model, examples = make_model(family), make_examples(6)
    engine = GradientEngine(model, token_budget=30)
    weights = np.stack([[0.5, -0.25, 1e-30, 2.0, 0.0, 0.125], np.full(6, 1e-60), np.zeros(6)])
    weighted, tiny, none = engine.weighted_gradients(examples, weights)
    gradients = [naive_gradient(model, example) for example in examples]
    for name in engine.parameter_names:
        expected = sum(w * g[name] for w, g in zip(weights[0], gradients, strict=True))
        assert weighted[name].dtype == torch.float32 and weighted[name].shape == expected.shape
        assert relative_error(weighted[name], expected) <= 1e-4
        assert float(none[name].abs().max()) == 0
    # What float32 cannot hold is zero; the next smallest weights are not.
    assert all(float(value.abs().max()) == 0 for value in tiny.values())
    (small,) = engine.weighted_gradients(examples, np.full((1, 6), 1e-30))
    name = engine.parameter_names[0]
    assert relative_error(small[name].double() * 1e30, sum(g[name] for g in gradients)) <= 1e-4
    with pytest.raises(ValueError, match="6 examples need as many finite weights in each row"):
        engine.weighted_gradients(examples, weights[0])


def test_a_step_changes_the_parameters_and_leaves_no_trace():
    model, examples = make_model("llama"), make_examples(3)
    engine = GradientEngine(model)
    before = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
    direction = {name: torch.randn(shape) for name, shape in engine.parameter_shapes.items()}
    rest = engine.mean_log_probs(examples)
    with pytest.raises(RuntimeError, match="inside"):
        with engine.step(direction, 0.05):
            for name, parameter in engine.parameters.items():
                torch.testing.assert_close(parameter.detach(), before[name] + 0.05 * direction[name])
            assert np.abs(engine.mean_log_probs(examples) - rest).max() > 1e-4
            raise RuntimeError("inside")
    for name, parameter in engine.parameters.items():
        assert torch.equal(parameter, before[name])
    with pytest.raises(ValueError, match="no LoRA parameter"):
        with engine.step({"elsewhere": torch.zeros(1)}, 1.0):
            pass


def test_the_model_is_left_as_it_was():
    model, examples = make_model("llama"), make_examples(3)
    model.train()
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    engine = GradientEngine(model, recompute=True)
    engine.feature_rows(examples, sketch=Sketch(32, 0))
    stream = engine.per_example_gradients(examples)
    next(stream)  # an unfinished stream must not hold the model either
    assert all(module.training for module in model.modules())
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(bits[name], tensor) for name, tensor in model.state_dict().items())


def test_bfloat16_gradients_are_float32_and_close_to_those_of_the_same_weights():
    model, examples = make_model("llama", torch.bfloat16), make_examples(8)
    found = engine_gradients(GradientEngine(model), examples)
    wide = engine_gradients(GradientEngine(make_model("llama", torch.bfloat16).float()), examples)
    for first, second in zip(found, wide, strict=True):
        flat, expected = (torch.cat([v.flatten() for v in g.values()]) for g in (first, second))
        assert flat.dtype == torch.float32
        assert float(torch.cosine_similarity(flat, expected, dim=0)) > 0.99


def test_half_precision_base_with_a_float32_adapter():
    model, examples = make_model("llama", torch.bfloat16), make_examples(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    found = engine_gradients(GradientEngine(model), examples)
    for index, example in enumerate(examples):
        flat, expected = (
            torch.cat([v.flatten() for v in g.values()]) for g in (found[index], naive_gradient(model, example))
        )
        assert float(torch.cosine_similarity(flat, expected, dim=0)) > 0.99


def test_directional_derivatives_of_a_bfloat16_model_run_in_float32():
    model, examples = make_model("llama", torch.bfloat16), make_examples(4)
    engine = GradientEngine(model)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    direction = engine.weighted_gradient(examples, np.ones(4)).gradient
    found = engine.directional_derivatives(examples, direction, epsilon=3e-3)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == bits[name].dtype and torch.equal(tensor, bits[name])
    wide = make_model("llama", torch.bfloat16).float()
    expected = [
        sum(float((g * direction[n]).sum()) for n, g in naive_gradient(wide, example).items()) for example in examples
    ]
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_rows_whose_loss_overflows_are_refused_and_counted_not_spread():
    model, examples = make_model("llama", torch.bfloat16), make_examples(6)
    poison = 7
    examples = [
        Example(np.where(e.input_ids == poison, poison + 1, e.input_ids).astype(np.int32), e.loss_mask)
        for e in examples
    ]
    clean = GradientEngine(model).feature_rows(examples, sketch=Sketch(64, 0))
    examples[2].input_ids[0] = poison
    with torch.no_grad():  # an embedding so large that the model's activations overflow
        model.get_input_embeddings().weight[poison] = 3e38
    found = GradientEngine(model).feature_rows(examples, sketch=Sketch(64, 0))
    assert [reason is not None for reason in found.refused] == [i == 2 for i in range(6)]
    assert "not finite" in found.refused[2]
    assert np.isfinite(found.rows).all() and not found.rows[2].any()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(found.rows[others], clean.rows[others], atol=2e-2 * clean.norms.max())


def test_a_gradient_that_is_rounding_noise_is_refused():
    model, examples = make_model("llama"), make_examples(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lm_head" in name:
                parameter.zero_()  # uniform predictions whatever the layers do: no gradient at all
    found = GradientEngine(model).feature_rows(examples, sketch=Sketch(64, 0))
    assert all("below 1e-07" in reason for reason in found.refused)  # the floor that the documentation states
    assert not found.rows.any()


def test_running_out_of_memory_is_known_by_what_torch_really_says():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert type(refused.value) is RuntimeError and is_out_of_memory(refused.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(other.value)


def test_a_router_and_a_layer_in_groups_are_refused_by_name():
    class Router(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs), inputs

    class Grouped(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.reshape(-1, 7, 32))

    model = make_model("llama", targets=["q_proj"])
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj.base_layer = Grouped(32, 32, bias=False)
    with pytest.raises(UnsupportedModelError, match="q_proj: base layer Grouped .* no plain linear layer"):
        GradientEngine(model)
    attention.q_proj.base_layer = Router(32, 32, bias=False)
    with pytest.raises(UnsupportedModelError, match="q_proj: base layer Router .* no plain linear layer"):
        GradientEngine(model)


def test_out_of_memory_halves_the_batch_and_remembers(monkeypatch):
    model, examples = make_model("llama"), make_examples(12)
    expected = GradientEngine(model).feature_rows(examples, sketch=Sketch(64, 0))
    engine = GradientEngine(model, token_budget=10**6)
    engine.weighted_gradient(examples[:1], [1.0])  # what a pass keeps is measured now
    sizes = []
    original = GradientEngine._token_log_probs

    def limited(self, batch):
        sizes.append(batch.input_ids.numel())
        if sizes[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    monkeypatch.setattr(GradientEngine, "_token_log_probs", limited)
    found = engine.feature_rows(examples, sketch=Sketch(64, 0))
    np.testing.assert_allclose(found.rows, expected.rows, atol=1e-5 * expected.norms.max())
    assert max(sizes[3:]) <= 40 and sizes[0] > 100
    monkeypatch.setattr(GradientEngine, "_token_log_probs", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(
        MemoryError, match=r"example \d+ alone \(\d+ tokens\) does not fit .* lower tokenization.max_length"
    ):
        engine.feature_rows(examples, sketch=Sketch(64, 0))


def test_progress_is_told_after_every_batch():
    seen = []
    examples = make_examples(7)
    engine = GradientEngine(make_model("llama"), token_budget=26)
    engine.feature_rows(examples, sketch=Sketch(64, 0), progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen[-1] == (7, 7) and sorted(seen) == seen


def test_batches_keep_to_the_budget_and_depend_on_lengths_alone():
    lengths = [5, 9, 9, 2, 30, 4, 4]
    batches = plan_batches(lengths, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [4]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 20
    assert plan_batches(lengths, 20) == batches


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"targets": ["q_proj", "embed_tokens"]}, "embed_tokens: LoRA on Embedding"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_unsupported_adapters_are_refused_by_name(lora, message):
    with pytest.raises(UnsupportedModelError, match=message):
        GradientEngine(make_model("llama", **({"targets": ["q_proj"]} | lora)))


def test_several_active_merged_or_missing_adapters_are_refused():
    model = make_model("llama", targets=["q_proj"])
    with pytest.raises(UnsupportedModelError, match="needs a PeftModel"):
        GradientEngine(model.get_base_model())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    GradientEngine(model)  # a second, inactive adapter is no obstacle
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedModelError, match="exactly one adapter must be active"):
        GradientEngine(model)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="q_proj: the adapter is merged"):
        GradientEngine(model)


def test_stacked_experts_are_refused_by_name():
    config = llama_like(MixtralConfig, num_local_experts=2, num_experts_per_tok=1)
    model = make_model(config, targets=["q_proj"], target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)
    with pytest.raises(UnsupportedModelError, match="stacked experts"):
        GradientEngine(model)
    GradientEngine(make_model(config, targets=["q_proj"]))  # attention layers of the same model are fine


def test_bad_examples_are_named():
    engine = GradientEngine(make_model("llama"))
    good = make_examples(1)[0]
    ids = np.arange(5, dtype=np.int32)
    cases = {
        "example 1 has no supervised token": Example(ids, np.zeros(5, dtype=bool)),
        "example 1: its first token is supervised": Example(ids, np.ones(5, dtype=bool)),
        "example 1 has a token id outside": Example(ids + 1000, ids > 2),
        "example 1 has 65 tokens, the model takes 64": Example(np.ones(65, np.int32), np.arange(65) > 2),
        r"example 1: input_ids \(5,\) and loss_mask \(4,\)": Example(ids, np.ones(4, dtype=bool)),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            engine.mean_log_probs([good, bad])
    with pytest.raises(ValueError, match="larger than the adapter's"):
        engine.feature_rows([good], sketch=Sketch(10**6, 0))
    with pytest.raises(ValueError, match="as many finite weights"):
        engine.weighted_gradient([good], [1.0, 2.0])
    with pytest.raises(ValueError, match="must be finite and not zero"):
        engine.directional_derivatives([good], {engine.parameter_names[0]: torch.zeros(3, 32)})


def test_no_examples_give_no_rows():
    engine = GradientEngine(make_model("llama"))
    found = engine.feature_rows([], sketch=Sketch(16, 0))
    assert found.rows.shape == (0, 16) and found.refused == []
    assert engine.mean_log_probs([]).shape == (0,)
