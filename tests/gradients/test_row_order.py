"""Layers whose inputs are not [batch, tokens, features]: exact where rows go by example, refused where they do not."""

import itertools

import numpy as np
import pytest
import torch
from test_engine import (
    VOCABULARY,
    engine_gradients,
    llama_like,
    make_examples,
    make_model,
    naive_gradient,
    relative_error,
    widen_float32_islands,
)
from transformers import DeepseekV3Config, LlamaConfig, MiniCPM3Config, OPTConfig, Qwen2MoeConfig

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.row_order import LARGER, SMALL, RowOrder, Runs, order_of, ordinary_ids
from prism_assets.gradients.sketch import ExactFeatures

LATENT = dict(num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=8)
# Each with the layers that are adapted, and the shape of what they see of 2 examples of 3 tokens.
FAMILIES = {
    "opt": (
        lambda: OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        ["fc1", "fc2"],
        (6,),
    ),
    "qwen2_moe": (
        lambda: llama_like(
            Qwen2MoeConfig,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
        r".*(shared_expert\.\w+_proj|shared_expert_gate)",
        (6,),
    ),
    "deepseek_v3": (
        lambda: llama_like(
            DeepseekV3Config,
            **LATENT,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        ["kv_b_proj"],
        (2, 1, 3),
    ),
    "minicpm3": (lambda: llama_like(MiniCPM3Config, **LATENT, v_head_dim=8), ["kv_b_proj"], (2, 1, 3)),
}


def make_family(family, dtype=torch.float64):
    """A model of one of the families above, with LoRA on its layers; its experts know float64."""
    config, targets, _ = FAMILIES[family]
    model = make_model(config(), dtype, targets=targets)
    model.get_base_model().set_experts_implementation("eager")
    return model


def assert_exact(model, examples, bound=1e-9, **settings):
    """Every example's gradient equals autograd's of that example alone, parameter by parameter."""
    for index, found in enumerate(engine_gradients(GradientEngine(model, **settings), examples)):
        for name, gradient in naive_gradient(model, examples[index]).items():
            assert gradient.norm() > 0, name
            assert relative_error(found[name], gradient) <= bound, (index, name)


def whole_error(found, expected):
    """Of all parameters together: where one of them has no gradient but rounding."""
    return relative_error(
        *(torch.cat([gradients[name].flatten() for name in expected]) for gradients in (found, expected))
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flattened_layers_and_those_with_an_axis_more_are_exact(family, recompute, monkeypatch):
    model, examples, shape = make_family(family), make_examples(7), FAMILIES[family][2]
    widen_float32_islands(model, monkeypatch)
    seen = []
    for layer in GradientEngine(model).layers:
        layer.module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:-1])))
    model(input_ids=torch.arange(6).view(2, 3))
    assert shape in seen
    assert_exact(model, examples, token_budget=40, recompute=recompute)


def test_supervised_positions_of_a_flattened_last_layer_are_told_apart(monkeypatch):
    """Its shared expert sees [N, H]: with as many supervised tokens as b * T, with fewer, and with one a row."""
    model = make_family("qwen2_moe")
    widen_float32_islands(model, monkeypatch)
    assert GradientEngine(model)._last_layer is not None
    everything, few, one = make_examples(4, seed=1), make_examples(4, seed=2), make_examples(4, seed=3)
    everything = [e._replace(input_ids=e.input_ids[:4], loss_mask=np.arange(4) > 0) for e in everything]
    one = [e._replace(loss_mask=np.arange(len(e.loss_mask)) == 2) for e in one]
    for examples in (everything, few, one):
        assert_exact(model, examples, token_budget=10**6)


def test_sums_and_features_of_flattened_layers_equal_those_of_single_gradients():
    model, examples = make_family("opt", torch.float32), make_examples(5)
    engine = GradientEngine(model)
    gradients = [naive_gradient(model, example) for example in examples]
    weights = np.array([1.0, -0.5, 0.25, 2.0, 0.0])
    summed = engine.weighted_gradient(examples, weights).gradient
    one_pass = engine.weighted_gradients(examples, np.stack([weights, -2 * weights]))
    rows = engine.feature_rows(examples, sketch=ExactFeatures(engine.parameter_shapes)).rows
    for name in engine.parameter_names:
        expected = sum(weight * gradient[name] for weight, gradient in zip(weights, gradients, strict=True))
        assert relative_error(summed[name], expected) <= 1e-4
        assert relative_error(one_pass[0][name], expected) <= 1e-4
        assert relative_error(one_pass[1][name], -2 * expected) <= 1e-4
    for row, gradient in zip(rows, gradients, strict=True):
        flat = torch.cat([gradient[name].flatten() for name in engine.parameter_names]).numpy()
        np.testing.assert_allclose(row, flat, atol=1e-5 * np.linalg.norm(flat))


def with_rows(rearrange, back, layer=1):
    """A Llama one of whose up_proj sees its tokens as `rearrange` gives them; `back` undoes it."""
    model = make_model("llama", torch.float64, targets=["q_proj", "up_proj"])
    mlp = model.get_base_model().model.layers[layer].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * back(mlp.up_proj(rearrange(x)), x))
    return model


def by_norm(x):
    return x.flatten(0, 1).norm(dim=-1).argsort()


REARRANGED = {
    "tokens before examples, flattened": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, x: y.view(x.shape[1], x.shape[0], -1).transpose(0, 1),
    ),
    "tokens before examples": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "examples in reverse": (lambda x: x.flip(0).flatten(0, 1), lambda y, x: y.view(*x.shape[:2], -1).flip(0)),
    "examples in reverse, by shape as usual": (lambda x: x.flip(0), lambda y, x: y.flip(0)),
    "tokens in reverse, flattened": (
        lambda x: x.flip(1).flatten(0, 1),
        lambda y, x: y.view(*x.shape[:2], -1).flip(1),
    ),
    "sorted by what is in them": (
        lambda x: x.flatten(0, 1)[by_norm(x)],
        lambda y, x: y[by_norm(x).argsort()].view(*x.shape[:2], -1),
    ),
    "every token but the last two": (
        lambda x: x.flatten(0, 1)[:-2],
        lambda y, x: torch.cat([y, y.new_ones(2, y.shape[-1])]).view(*x.shape[:2], -1),
    ),
}


@pytest.mark.parametrize("kind", REARRANGED)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_whose_rows_go_otherwise_is_refused_by_name(kind, layer):
    with pytest.raises(
        UnsupportedModelError, match=rf"layers.{layer}.mlp.up_proj gets inputs of shape .* go by exampl"
    ):
        GradientEngine(with_rows(*REARRANGED[kind], layer=layer))


ADMITTED = {
    "flattened": (lambda x: x.flatten(0, 1), lambda y, x: y.view(*x.shape[:2], -1)),
    "an axis more": (lambda x: x[:, :, None], lambda y, x: y[:, :, 0]),
    "each token twice": (
        lambda x: torch.stack([x, x.roll(1, -1)], 2).flatten(0, 2),
        lambda y, x: y.view(*x.shape[:2], 2, -1).sum(2),
    ),
    "the first token apart": (
        lambda x: torch.cat([x[:, :1], x[:, :0], x[:, 1:]], 1)[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2)[:, :-1],
        lambda y, x: torch.cat([y, y[:, -1:]], 1).unflatten(1, (-1, 2)).sum(2),
    ),
    "each example twice": (lambda x: torch.stack([x, x.roll(1, -1)], 1), lambda y, x: y.sum(1)),
    "each example twice, flattened": (
        lambda x: torch.stack([x, x.roll(1, -1)], 1).flatten(0, 2),
        lambda y, x: y.view(len(x), 2, x.shape[1], -1).sum(1),
    ),
}


@pytest.mark.parametrize("kind", ADMITTED)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_whose_rows_go_by_example_is_exact_whatever_their_shape(kind, layer, monkeypatch):
    model = with_rows(*ADMITTED[kind], layer=layer)
    widen_float32_islands(model, monkeypatch)
    assert_exact(model, make_examples(6), token_budget=45)


def test_a_layer_that_runs_several_times_is_exact(monkeypatch):
    """Gradients of its uses are added before anything that is not linear in them."""
    model = make_model("llama", torch.float64, targets=["q_proj", "up_proj"])
    widen_float32_islands(model, monkeypatch)
    decoder = model.get_base_model().model
    decoder.layers[1].mlp = decoder.layers[0].mlp
    examples = make_examples(5)
    assert_exact(model, examples, token_budget=30)
    engine = GradientEngine(model, token_budget=30)
    assert {layer.uses for layer in engine.layers} == {1, 2}
    norms = engine.feature_rows(examples, sketch=ExactFeatures(engine.parameter_shapes)).norms
    for index, example in enumerate(examples):
        flat = torch.cat([g.flatten() for g in naive_gradient(model, example).values()])
        assert norms[index] == pytest.approx(float(flat.norm()), rel=1e-9)


def test_a_layer_that_does_not_run_has_no_gradient_and_may_not_run_later(monkeypatch):
    """As those of an image encoder, of cross-attention, or of a router's experts that got no token."""
    model = make_model("llama", torch.float64, targets=["q_proj", "up_proj"])
    widen_float32_islands(model, monkeypatch)
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) if x.shape[1] < 10 else mlp.up_proj(x))
    short, long = make_examples(5, longest=9), make_examples(5, longest=13)
    engine = GradientEngine(model)
    unused = [name for name in engine.parameter_names if "layers.0.mlp.up_proj" in name]
    for index, found in enumerate(engine_gradients(engine, short)):
        assert [name for name in unused if not found[name].any()] == unused
        assert whole_error(found, naive_gradient(model, short[index], allow_unused=True)) <= 1e-9
    summed = engine.weighted_gradient(short, np.ones(5)).gradient
    assert [name for name in unused if not summed[name].any()] == unused
    assert engine.feature_rows(short, sketch=ExactFeatures(engine.parameter_shapes)).refused == [None] * 5
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.up_proj gets inputs .* other than when .* tried"):
        engine_gradients(engine, long)


def test_a_layer_whose_output_has_no_gradient_counts_as_zero(monkeypatch):
    """As in a model that picks positions by an indexer's scores."""
    model = make_model("llama", torch.float64, targets=["q_proj", "up_proj"])
    widen_float32_islands(model, monkeypatch)
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * (mlp.up_proj(x) > 0))
    examples = make_examples(4)
    for index, found in enumerate(engine_gradients(GradientEngine(model), examples)):
        assert whole_error(found, naive_gradient(model, examples[index], allow_unused=True)) <= 1e-9


def test_a_model_that_changes_a_layers_output_in_place_is_exact(monkeypatch):
    model = make_model("llama", torch.float64, targets=["q_proj", "up_proj"])
    widen_float32_islands(model, monkeypatch)
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x).mul_(2).add_(mlp.gate_proj(x)))
    assert_exact(model, make_examples(4))


def test_linear_layers_in_the_last_norm_see_supervised_positions_too(monkeypatch):
    model = make_model("llama", torch.float64, targets=["q_proj", "up_proj"])
    widen_float32_islands(model, monkeypatch)
    layer = model.get_base_model().model.layers[-1]
    layer.post_attention_layernorm = torch.nn.Sequential(layer.post_attention_layernorm, layer.self_attn.q_proj)
    layer.self_attn.q_proj = layer.self_attn.q_proj.get_base_layer()
    engine = GradientEngine(model)
    assert engine._last_layer is not None
    assert_exact(model, make_examples(5))


def test_rows_that_are_fewer_than_when_the_model_was_tried_are_refused():
    model = make_model("llama", torch.float64, targets=["up_proj"])
    mlp = model.get_base_model().model.layers[0].mlp

    def forward(x):
        rows = x.flatten(0, 1)
        if x.shape[1] > 6:
            rows = rows[1:]
        up = mlp.up_proj(rows)
        up = torch.cat([up.new_ones(x.shape[0] * x.shape[1] - len(up), up.shape[-1]), up]).view(*x.shape[:2], -1)
        return mlp.down_proj(up)

    mlp.forward = forward
    engine = GradientEngine(model)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.up_proj gets inputs of shape .* tried on a few"):
        list(engine.per_example_gradients(make_examples(4)))


@pytest.mark.parametrize("shape", [SMALL, LARGER, (4, 2)])
def test_no_two_tokens_change_in_the_same_runs(shape):
    runs = Runs.of(shape, list(range(100)), torch.device("cpu"))
    pattern = runs.expected().flatten(1).t().tolist()
    assert len({tuple(one) for one in pattern}) == shape[0] * shape[1]
    for ids, replaced in zip(runs.ids, runs.replaced, strict=True):
        assert torch.equal(ids != runs.ids[0], replaced)


def test_only_two_orders_of_all_are_taken():
    """All 720 orders of the rows of 2 x 3 tokens, their contents made from what a causal model's would be."""
    runs = Runs.of(SMALL, list(range(100)), torch.device("cpu"))
    seen = [torch.stack([ids, ids.cumsum(1)], -1).double().flatten(0, 1) for ids in runs.ids]
    taken = [
        order
        for order in itertools.permutations(range(6))
        if order_of([rows[list(order)] for rows in seen], runs) is not None
    ]
    assert taken == [(0, 1, 2, 3, 4, 5)]
    twice = [rows.repeat_interleave(2, 0) for rows in seen]
    assert order_of(twice, runs) == RowOrder(2, True, first_axis=False)
    assert order_of([rows.view(2, 3, 2).repeat(1, 2, 1).flatten(0, 1) for rows in seen], runs) == RowOrder(
        2, False, first_axis=False
    )
    assert order_of([rows.repeat(2, 1) for rows in seen], runs) is None
    assert order_of([rows[:5] for rows in seen], runs) is None


def test_ids_that_the_configuration_names_are_not_tried():
    config = {"eos_token_id": [26, 27], "vision": {"image_token_id": 28}, "id2label": {0: "a"}, "pad_token_id": None}
    assert ordinary_ids(config, 100)[:3] == [25, 29, 30]
    assert len(ordinary_ids(LlamaConfig().to_dict(), 32_000)) == 64
    assert ordinary_ids({"eos_token_id": 1, "bos_token_id": 0}, 2) == [0, 1]
