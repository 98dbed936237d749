"""Attention in blocks against torch's own, and where the engine uses it."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prism_assets.features import attention as module
from prism_assets.features.attention import attention_in_blocks, causal_attention
from prism_assets.features.gradients import GradientEngine

CPU = torch.device("cpu")


class Example(NamedTuple):
    input_ids: np.ndarray
    loss_mask: np.ndarray


def heads(batch, count, length, size, dtype):
    """As models make them: a transposed view of [b, T, h, d]."""
    return torch.randn(batch, length, count, size, dtype=dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 200])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_outputs_and_gradients_equal_those_of_the_whole_score_matrix(
    batch, length, query_heads, key_heads, dtype, bound
):
    torch.manual_seed(length)
    query = heads(batch, query_heads, length, 16, dtype)
    key, value = (heads(batch, key_heads, length, 16, dtype) for _ in range(2))
    upstream = torch.randn(batch, query_heads, length, 16, dtype=dtype)
    found = causal_attention(query, key, value, 0.3)
    copies = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    wide_key, wide_value = (one.repeat_interleave(query_heads // key_heads, dim=1) for one in copies[1:])
    scores = 0.3 * copies[0] @ wide_key.transpose(2, 3)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ wide_value
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, copies, upstream.double()),
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def make_model(config_class, implementation="sdpa", **settings):
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    if config_class is not GPT2Config:
        shape |= dict(intermediate_size=40, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    config = config_class(**shape, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


@pytest.fixture
def lengths(monkeypatch):
    """The lengths that went through blocks, and through torch's kernel."""
    seen = {"blocks": [], "kernel": []}

    def counted(name, function):
        def run(query, *args, **settings):
            seen[name].append(query.shape[2])
            return function(query, *args, **settings)

        return run

    monkeypatch.setattr(module, "causal_attention", counted("blocks", causal_attention))
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted("kernel", kernel))
    return seen


def run(model, length, **settings):
    """Logits without and with the context."""
    ids = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = model(ids, use_cache=False, **settings).logits
        with attention_in_blocks(CPU):
            found = model(ids, use_cache=False, **settings).logits
    return found, expected


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, GPT2Config, MistralConfig])
def test_models_give_the_same_logits_in_blocks(config_class, lengths):
    found, expected = run(make_model(config_class), 70)
    assert lengths == {"blocks": [70, 70], "kernel": [70, 70]}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config_class", "options", "settings"),
    [
        (MistralConfig, {"sliding_window": 4}, {}),
        (
            LlamaConfig,
            {},
            {"attention_mask": torch.tensor([[1] * 10, [1] * 7 + [0] * 3])},
        ),
        (
            LlamaConfig,
            {},
            {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])},
        ),
    ],
    ids=["sliding window", "padding mask", "packed"],
)
def test_what_is_more_than_causal_goes_to_torchs_kernel(config_class, options, settings, lengths):
    found, expected = run(make_model(config_class, **options), 10, **settings)
    assert lengths == {"blocks": [], "kernel": [10] * 4}
    assert torch.equal(found, expected)


def test_long_examples_go_to_torchs_kernel(lengths, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 9)
    model = make_model(LlamaConfig)
    assert torch.equal(*run(model, 10))
    assert lengths["blocks"] == []
    run(model, 9)
    assert lengths["blocks"] == [9, 9]


def test_half_precision_goes_to_torchs_kernel(lengths):
    assert torch.equal(*run(make_model(LlamaConfig).bfloat16(), 10))
    assert lengths["blocks"] == []


def test_a_cap_on_scores_is_not_lost():
    """Torch's kernel cannot do it and transformers says so; blocks must not pass over it in silence."""
    query = states(1, 4, 5, 8)
    with pytest.raises(ValueError, match="softcap"), attention_in_blocks(CPU):
        module.attention(torch.nn.Module(), query, query, query, None, softcap=50.0)


def test_the_gradient_engine_attends_in_blocks(lengths):
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    engine = GradientEngine(get_peft_model(make_model(LlamaConfig), adapter))
    lengths["blocks"].clear()  # of its probe
    engine.mean_log_probs([Example(np.arange(30), np.arange(30) >= 20)])
    assert lengths == {"blocks": [29, 29], "kernel": []}


def test_eager_attention_and_other_devices_are_left_alone(lengths):
    assert torch.equal(*run(make_model(LlamaConfig, "eager"), 10))
    assert lengths == {"blocks": [], "kernel": []}
    with attention_in_blocks(torch.device("cuda")):
        make_model(LlamaConfig)(torch.zeros(1, 10, dtype=torch.int64), use_cache=False)
    assert lengths == {"blocks": [], "kernel": [10, 10]}


def test_an_attention_function_of_the_users_own_is_left_alone(monkeypatch):
    seen = []

    def own(*args, **settings):
        seen.append(len(args))
        return sdpa_attention_forward(*args, **settings)

    model, ids = make_model(LlamaConfig), torch.zeros(1, 10, dtype=torch.int64)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", own)
    model(ids, use_cache=False)  # outside of the context, wherever ours is in place already
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", own)
    with attention_in_blocks(CPU):
        model(ids, use_cache=False)
    assert len(seen) == 4


def test_torchs_kernel_is_back_afterwards(lengths):
    model, ids = make_model(LlamaConfig), torch.zeros(1, 10, dtype=torch.int64)
    with pytest.raises(KeyError), attention_in_blocks(CPU):
        with attention_in_blocks(CPU):  # nested, and left before the outer one
            pass
        model(ids, use_cache=False)
        raise KeyError
    assert lengths == {"blocks": [10, 10], "kernel": []}
    model(ids, use_cache=False)
    assert lengths == {"blocks": [10, 10], "kernel": [10, 10]}


def test_another_threads_models_are_left_alone(lengths):
    model, ids = make_model(LlamaConfig), torch.zeros(1, 10, dtype=torch.int64)
    with attention_in_blocks(CPU), ThreadPoolExecutor(1) as threads:
        threads.submit(lambda: model(ids, use_cache=False)).result()
        assert lengths == {"blocks": [], "kernel": [10, 10]}
        model(ids, use_cache=False)
    assert lengths["blocks"] == [10, 10]


def states(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("key_shape", "value_size", "settings"),
    [
        ((2, 4, 6, 8), 8, {"is_causal": False}),
        ((2, 4, 6, 8), 8, {"position_bias": states(1, 4, 6, 6)}),
        ((2, 4, 9, 8), 8, {}),
        ((2, 4, 6, 8), 16, {}),
        ((1, 4, 6, 8), 8, {}),
    ],
    ids=["not causal", "bias", "more keys", "wider values", "one batch of keys for all"],
)
def test_what_blocks_cannot_do_is_left_to_torch(key_shape, value_size, settings, lengths):
    query, key, value = states(2, 4, 6, 8), states(*key_shape), states(*key_shape[:3], value_size)
    expected, _ = sdpa_attention_forward(torch.nn.Module(), query, key, value, None, **settings)
    with attention_in_blocks(CPU):
        found, _ = module.attention(torch.nn.Module(), query, key, value, None, **settings)
    assert torch.equal(found, expected)
    assert lengths["blocks"] == []


def test_dropout_is_left_to_torch(lengths):
    query = states(2, 4, 6, 8)
    with attention_in_blocks(CPU):
        found, _ = module.attention(torch.nn.Module(), query, query, query, None, dropout=1.0)
    assert not found.any() and lengths["blocks"] == []


def test_without_gradients_no_probabilities_are_kept():
    query = torch.randn(1, 4, 256, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        causal_attention(query, query, query, 0.3)
        assert kept == []
        causal_attention(query.clone().requires_grad_(), query, query, 0.3)
    assert (4, 64, 256) in kept  # of the last block


def test_second_derivatives_are_refused():
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    loss = causal_attention(query, query, query, 0.3).square().sum()
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
