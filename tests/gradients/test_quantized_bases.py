"""The gradient engine on bases that bitsandbytes has quantised, against autograd through PEFT on the same base."""

import numpy as np
import pytest
import torch
from four_bits import as_plain_layers
from peft import LoraConfig, get_peft_model
from test_engine import (
    FAMILIES,
    engine_gradients,
    llama_like,
    make_examples,
    naive_mean_log_prob,
    relative_error,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from prism_assets.errors import UnsupportedModelError
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.hidden_states import representations
from prism_assets.gradients.sketch import Sketch
from prism_assets.quantized import dequantized, is_quantized, settle
from prism_assets.sft.generation import generate
from prism_assets.sft.trainer import Training, fine_tune

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(family)` is the folder of a random float model."""
    made = {}

    def save(family):
        if family not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(FAMILIES[family]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.15)
                    else:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            made[family] = tmp_path_factory.mktemp(family) / "model"
            model.save_pretrained(made[family])
        return made[family]

    return save


def load(folder, kind, dtype=torch.float32, targets="all-linear", lora=None, **config):
    """The quantised base as transformers and bitsandbytes make it, with a random adapter by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**KINDS[kind], **config)
    )
    base.requires_grad_(False)
    settings = {"r": 3, "lora_alpha": 8, "target_modules": targets} | (lora or {})
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if "lora_B" in name else 0.3))
    return model


def settled(model):
    settle(model.get_base_model())
    return model


def by_the_book(model, kind):
    """The model with plain layers of the weights that the codes of 4 bits stand for: bitsandbytes reads them wrong on
    CPUs with AVX512 where rows are no multiple of a block. Its int8 layers stay."""
    return model if kind == "int8" else as_plain_layers(model)


def autograd(model, example):
    """g of one example through PEFT's own layers: canonical name -> tensor.

    In training mode, without dropout: on a CPU the product of int8 weights then takes inputs as they are.
    """
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = {name.replace(".default", ""): one for name, one in model.named_parameters() if "lora_" in name}
    gradients = torch.autograd.grad(naive_mean_log_prob(model, example), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "phi"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_per_example_gradients_equal_autograd_through_peft_on_the_same_quantised_base(saved, family, kind):
    examples = make_examples()
    engine = GradientEngine(settled(load(saved(family), kind)), token_budget=26)
    found, log_probs = engine_gradients(engine, examples), engine.mean_log_probs(examples)
    theirs = by_the_book(load(saved(family), kind), kind)
    assert all(layer.quantized for layer in engine.layers)
    for index, example in enumerate(examples):
        expected = autograd(theirs, example)
        assert list(found[index]) == list(expected)
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert relative_error(found[index][name], gradient) <= 1e-4, (index, name)
        assert abs(log_probs[index] - naive_mean_log_prob(theirs, example).item()) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {"targets": ["q_proj", "v_proj"]}),
        ("int8", {"targets": ["q_proj", "v_proj"]}),
        ("fp4", {}),
        ("nf4", {"llm_int8_skip_modules": ["nothing"]}),
        ("nf4", {"llm_int8_skip_modules": ["nothing"], "targets": ["q_proj", "lm_head"]}),
        ("nf4", {"llm_int8_skip_modules": ["q_proj", "lm_head"]}),
        ("nf4", {"bnb_4bit_quant_storage": torch.bfloat16}),
        ("nf4", {"lora": {"use_rslora": True}}),
    ],
    ids=["nf4_few", "int8_few", "fp4", "nf4_head", "nf4_adapted_head", "nf4_mixed", "nf4_storage", "nf4_rslora"],
)
def test_kinds_of_quantised_bases_and_adapters(saved, kind, options):
    """Few modules: gradients go through quantised layers that are not adapted. Head: it is quantised, too."""
    examples = make_examples()
    found = engine_gradients(GradientEngine(settled(load(saved("llama"), kind, **options))), examples)
    theirs = load(saved("llama"), kind, **options)
    if "llm_int8_skip_modules" in options:
        head = theirs.get_base_model().get_output_embeddings()
        assert is_quantized(getattr(head, "base_layer", head)) == ("nothing" in options["llm_int8_skip_modules"])
    theirs = by_the_book(theirs, kind)
    for index, example in enumerate(examples):
        for name, gradient in autograd(theirs, example).items():
            assert relative_error(found[index][name], gradient) <= 1e-4, (index, name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_gradient_depends_on_what_else_is_in_the_batch(saved, kind):
    model, examples = settled(load(saved("llama"), kind, targets=["q_proj", "up_proj"])), make_examples(6)
    with torch.no_grad():  # activations beyond bitsandbytes' threshold of 6, in some rows
        model.get_input_embeddings().weight[:20] *= 60
    together = GradientEngine(model, token_budget=10_000).feature_rows(examples, sketch=Sketch(64, 0))
    alone = [GradientEngine(model).feature_rows([one], sketch=Sketch(64, 0)).rows[0] for one in examples]
    scale = np.abs(alone).max(axis=1, keepdims=True)
    assert np.abs(together.rows - alone).max() <= 1e-4 * scale.max()
    assert np.all(np.abs(together.rows - alone) <= 1e-4 * scale)


def test_recomputed_activations_and_weighted_sums_are_the_same_gradients(saved):
    model, examples = settled(load(saved("llama"), "nf4")), make_examples()
    each = engine_gradients(GradientEngine(model), examples)
    weights = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    for recompute in (False, True):
        total = GradientEngine(model, recompute=recompute).weighted_gradient(examples, weights).gradient
        for name, value in total.items():
            expected = sum(weight * one[name] for weight, one in zip(weights, each, strict=True))
            assert relative_error(value, expected) <= 1e-4


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_directional_derivatives_of_a_bfloat16_base_run_in_float32_and_leave_its_codes_alone(saved, storage):
    model = settled(load(saved("llama"), "nf4", torch.bfloat16, bnb_4bit_quant_storage=storage))
    examples, engine = make_examples(4), GradientEngine(model)
    assert engine.half_precision
    codes = {name: value.clone() for name, value in model.named_parameters() if "base_layer.weight" in name}
    assert codes and all(value.dtype == storage for value in codes.values())
    direction = engine.weighted_gradient(examples, np.ones(4)).gradient
    found = engine.directional_derivatives(examples, direction, epsilon=3e-3)
    for name, value in model.named_parameters():
        if name in codes:
            assert value.dtype == storage and torch.equal(value.view(torch.uint8), codes[name].view(torch.uint8))
    with engine.single_precision():
        each = engine_gradients(engine, examples)
    expected = [sum(float((g[name] * direction[name]).sum()) for name in g) for g in each]
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_is_that_of_the_float_model_of_the_same_weights(saved, kind):
    examples, training = make_examples(8), Training(steps=3, batch_size=4, learning_rate=1e-2)
    model = settled(load(saved("llama"), kind, lora={"lora_dropout": 0.0}))
    plain = as_a_float_model(model, saved("llama"))
    losses, states = [], []
    for one in (model, plain):
        result = fine_tune(GradientEngine(one), examples, training, seed=3)
        losses.append(result.losses)
        states.append(result.checkpoints[-1].lora_state)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for name, value in states[0].items():
        assert relative_error(value, states[1][name]) <= 1e-3, name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_hidden_states_and_generated_tokens_are_those_of_the_float_model_of_the_same_weights(saved, kind):
    model, examples = settled(load(saved("llama"), kind)).eval(), make_examples(6)
    plain = as_a_float_model(model, saved("llama")).eval()
    np.testing.assert_allclose(representations(model, examples), representations(plain, examples), atol=1e-5)
    prompts = [example.input_ids for example in examples]
    options = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
    for one, other in zip(generate(model, prompts, **options), generate(plain, prompts, **options), strict=True):
        assert one.tolist() == other.tolist()


def as_a_float_model(model, folder):
    """A model with float32 weights in place of the codes, with the same adapter."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    plain = get_peft_model(base, model.peft_config["default"])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameters[name])
        for name, layer in model.named_modules():
            if is_quantized(layer):
                plain.get_submodule(name).weight.copy_(dequantized(layer, torch.float32))
    return plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_a_pass_keeps_grows_with_tokens_alone_and_the_weight_being_made_is_planned_for(saved, kind):
    """No made weight outlives its product: kept for the backward pass, it would undo what quantisation saves."""
    model = settled(load(saved("llama"), kind, targets=["q_proj"]))
    lengths, plain = [40, 20], as_a_float_model(model, saved("llama"))
    found, expected = (GradientEngine(one).memory_need(lengths).planned for one in (model, plain))
    product = 4 * 40 * 32  # the MLP's weight in float32
    assert 0.9 * (expected + product) <= found <= 1.02 * (expected + product)
    kept, kept_plain = (GradientEngine(one)._runner._activations for one in (model, plain))
    assert kept.product == product and kept_plain.product == 0
    assert kept.per_token <= 1.02 * kept_plain.per_token


def test_a_base_whose_products_mix_rows_is_refused_by_name(saved):
    with pytest.raises(
        UnsupportedModelError, match=r"q_proj: Linear8bitLt computes by bitsandbytes' own products"
    ) as e:
        GradientEngine(load(saved("llama"), "int8"))
    assert e.value.module.endswith("layers.0.self_attn.q_proj")


def test_dora_on_a_quantised_base_is_refused_by_name(saved):
    with pytest.raises(UnsupportedModelError, match="uses DoRA"):
        GradientEngine(settled(load(saved("llama"), "nf4", lora={"use_dora": True})))


def test_a_model_of_one_block_a_row_and_of_odd_sizes(tmp_path):
    """Blocks of 64 weights run over the ends of rows of 24."""
    torch.manual_seed(0)
    config = llama_like(LlamaConfig, hidden_size=24, intermediate_size=36, num_attention_heads=3, num_key_value_heads=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    examples = make_examples(3)
    found = engine_gradients(GradientEngine(settled(load(tmp_path, "nf4"))), examples)
    theirs = load(tmp_path, "nf4")
    for index, example in enumerate(examples):
        for name, gradient in autograd(theirs, example).items():
            assert relative_error(found[index][name], gradient) <= 1e-4, (index, name)
