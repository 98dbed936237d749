"""Bases quantised by bitsandbytes: which are recognised, what they compute, and that they are told apart."""

import json
import shutil

import bitsandbytes
import numpy as np
import pytest
import torch
from four_bits import as_plain_layers, looked_up
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prism_assets.errors import ModelError, SettingsError
from prism_assets.identity import hidden_state_identity, warmup_scope
from prism_assets.quantized import dequantized, is_quantized, settle, state_bytes
from prism_assets.resources.model import LanguageModel, quantization

LORA = {"rank": 2, "alpha": 4, "target_modules": "all-linear"}
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
KINDS = list(CONFIGS)


def of(folder, **options):
    return LanguageModel(name=str(folder), device="cpu", **options)


def as_bitsandbytes_loads_it(folder, **config):
    """Through transformers alone."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**config)
    )


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """A checkpoint that is quantised already: `checkpoint(kind, **config)` is its folder."""
    made = {}

    def save(kind, **more):
        key = (kind, *sorted(map(str, more.items())))
        if key not in made:
            folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("quantised") / "model")
            (folder / "model.safetensors").unlink()
            as_bitsandbytes_loads_it(tiny_model, **CONFIGS[kind], **more).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return save


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(4, 14)[None]).logits


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def as_a_float_model(model, folder):
    """The model of float32 weights that are those which the codes stand for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in quantized_layers(model).items():
            plain.get_submodule(name).weight.copy_(dequantized(layer, torch.float32))
    return plain


# -- what is computed --------------------------------------------------------------------------------------------


def test_the_weights_of_4_bits_are_looked_up_code_by_code(tiny_model):
    layer = of(tiny_model, quantization="nf4").base().get_submodule("model.layers.0.mlp.up_proj")
    found = dequantized(layer, torch.float32)
    assert found.shape == (32, 16) and len(np.unique(layer.weight.quant_state.code)) == 16
    np.testing.assert_allclose(found.numpy(), looked_up(layer), rtol=1e-6)


@pytest.mark.parametrize("shape", [(32, 16), (64, 96), (7, 9), (3, 50), (8, 64)])
def test_rows_that_are_no_multiple_of_a_block_are_dequantised_right(shape):
    """bitsandbytes 0.50 counts blocks from the start of each row on CPUs with AVX512, and quantises across rows."""
    layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=True)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(0.2 * torch.randn(shape))
    original = layer.weight.detach().clone()
    layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight._quantize(torch.device("cpu"))
    found = dequantized(layer, torch.float32)
    np.testing.assert_allclose(found.numpy(), looked_up(layer), rtol=1e-6)
    largest = original.abs().max().item()
    assert (found - original).abs().max().item() < 0.16 * largest  # half of the widest gap between codes


def test_the_weights_of_8_bits_are_codes_times_the_scale_of_their_row(tiny_model):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    layer = of(tiny_model, quantization="int8").base().get_submodule("model.layers.0.mlp.up_proj")
    half = plain.half().float()  # bitsandbytes goes by float16
    scale = half.abs().amax(1, keepdim=True)
    expected = torch.round(half / scale * 127) * scale / 127
    torch.testing.assert_close(dequantized(layer, torch.float32), expected, rtol=1e-5, atol=2e-3 * float(scale.max()))
    assert (dequantized(layer, torch.float32) - plain).abs().max() <= float(scale.max()) / 127


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_the_float_model_of_its_weights(tiny_model, kind):
    base = of(tiny_model, quantization=kind).base()
    layers = quantized_layers(base)
    assert len(layers) == 7 and "lm_head" not in layers
    expected = logits(as_a_float_model(base, tiny_model))
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)
    assert (logits(of(tiny_model).base()) - expected).abs().max() > 1e-3  # another model than the float one


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_gets_the_gradient_of_the_float_model_of_the_weights(tiny_model, kind):
    base = of(tiny_model, quantization=kind).base()
    plain = as_a_float_model(base, tiny_model)
    found = []
    for model in (base, plain):
        inputs = model.get_input_embeddings()(torch.arange(4, 14)[None]).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.logsumexp(-1).sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_no_row_of_an_int8_product_depends_on_its_neighbours_as_bitsandbytes_own_do(tiny_model):
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    beside_a_large_one = inputs.clone()
    beside_a_large_one[2, 5] = 50.0  # an outlier: bitsandbytes takes its column out of every row
    theirs = as_bitsandbytes_loads_it(tiny_model, load_in_8bit=True).eval().get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        alone, changed = theirs(inputs)[0], theirs(beside_a_large_one)[0]
    assert (alone - changed).abs().max() > 1e-4  # what is avoided
    ours = of(tiny_model, quantization="int8").base().get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        assert torch.equal(ours(inputs)[:2], ours(beside_a_large_one)[:2])
        torch.testing.assert_close(ours(inputs)[0], ours(inputs[:1])[0], rtol=1e-5, atol=1e-6)


def test_half_precision_of_a_quantised_base(tiny_model):
    base = of(tiny_model, quantization="nf4", dtype="bfloat16").base()
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    found = logits(base)
    assert found.dtype == torch.bfloat16
    single = as_a_float_model(base, tiny_model)
    assert (found.float() - logits(single)).norm() / logits(single).norm() < 0.02


# -- which checkpoints are recognised -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("nf4", {}),
        ("nf4", {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.bfloat16}),
        ("int8", {}),
    ],
    ids=["nf4", "nf4_stored_as_bfloat16", "int8"],
)
def test_a_checkpoint_that_is_quantised_already_is_the_same_model_by_another_name(tiny_model, checkpoint, kind, more):
    folder = checkpoint(kind, **more)
    model = of(folder)
    assert model.identify().quantized == kind
    assert model.identify().fingerprint != of(tiny_model).identify().fingerprint
    found = logits(model.base())
    assert torch.equal(found, logits(of(tiny_model, quantization=kind).base()))
    assert of(folder, quantization=kind).identify() == model.identify()


def test_setting_and_checkpoint_may_not_be_at_odds(checkpoint, tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"model.quantization: nf4 was asked for, but the weights in .* are int8 alre"):
        of(checkpoint("int8"), quantization="nf4").identify()
    other = shutil.copytree(tiny_model, tmp_path / "other")
    edit_json(other / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"int8 was asked for, but .* is quantised already \(quant_method 'gptq'"):
        of(other, quantization="int8").identify()
    mixed = shutil.copytree(checkpoint("int8"), tmp_path / "mixed")
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    edit_json(mixed / "config.json", quantization_config={**config, "llm_int8_has_fp16_weight": True})
    with pytest.raises(ModelError, match="llm_int8_has_fp16_weight"):
        of(mixed).identify()


def test_without_bitsandbytes_it_is_said_how_to_install_it(checkpoint, tiny_model, make_project, tmp_path, monkeypatch):
    project = make_project(tmp_path / "project").configure(model={"quantization": "nf4"})
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    for model, reason in (
        (of(checkpoint("nf4")), r"the weights in .* are nf4, which takes bitsandbytes"),
        (of(tiny_model, quantization="int8"), "model.quantization is int8"),
    ):
        with pytest.raises(ModelError, match=reason) as found:
            model.identify()
        assert "pip install 'prism-assets[quantized]'" in str(found.value)
    monkeypatch.setattr("prism_assets.settings.schema.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"model.quantization: bitsandbytes is not installed.*\[quantized\]"):
        project.settings  # noqa: B018


def test_a_layer_without_codes_is_named(tiny_model):
    model = as_bitsandbytes_loads_it(tiny_model, load_in_4bit=True)
    model.model.layers[0].mlp.up_proj.weight.quant_state = None
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj .* is a Linear4bit without quantised weights"):
        settle(model)


# -- what is told apart -------------------------------------------------------------------------------------------


def test_features_and_hidden_states_of_differently_quantised_bases_are_kept_apart(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    scopes, states = [], []
    for kind in ("none", "nf4", "int8"):
        stage = project.configure(model={"quantization": kind}).stage
        scopes.append(stage.warmup_scope)
        states.append(json.dumps(hidden_state_identity(stage.model_identity, stage.dtype)))
        if kind == "none":  # no name of a lake that there is changes
            assert stage.dtype == "torch.float32"
            assert stage.warmup_scope == warmup_scope(stage.settings, stage.model_identity, "torch.float32")
            assert "quantization" not in stage.settings.model.model_dump()
    assert len(set(scopes)) == len(set(states)) == 3


# -- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_qlora_training_is_started_from(tiny_model, kind, tmp_path):
    trained = get_peft_model(
        as_bitsandbytes_loads_it(tiny_model, **CONFIGS[kind]),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    ).train()
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.3)
    trained.save_pretrained(tmp_path / "adapter")
    model = of(tiny_model, quantization=kind, adapter=str(tmp_path / "adapter"))
    assert model.identify().adapter
    with model.adapted(**LORA) as found:
        assert isinstance(found, PeftModel)
        theirs = as_plain_layers(trained) if kind == "nf4" else trained
        torch.testing.assert_close(logits(found), logits(theirs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="was trained on 'other/base'"):
        edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="other/base")
        model.identify()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_given_back_as_it_was(tiny_model, kind):
    model = of(tiny_model, quantization=kind)
    before, codes = logits(model.base()), model.base().model.layers[0].mlp.up_proj.weight.data.clone()
    with model.adapted(**LORA) as adapted:
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.fill_(0.5)
        assert not torch.allclose(logits(adapted), before)
    assert torch.equal(logits(model.base()), before)
    assert torch.equal(model.base().model.layers[0].mlp.up_proj.weight.data, codes)
    assert not any("lora" in name for name, _ in model.base().named_modules())


def test_scales_are_counted_as_memory(tiny_model):
    base = of(tiny_model, quantization="int8").base()
    assert state_bytes(base) == 4 * sum(layer.out_features for layer in quantized_layers(base).values())
    base = of(tiny_model, quantization="nf4").base()
    elements = sum(layer.in_features * layer.out_features for layer in quantized_layers(base).values())
    assert elements / 64 <= state_bytes(base) <= elements / 64 + 4 * 7  # a byte a block, float32 for 256 blocks
