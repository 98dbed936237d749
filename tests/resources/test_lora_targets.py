"""Which modules get LoRA: `all-linear` on mixtures of experts and multimodal models, excluded modules, layers."""

import re

import pytest
import torch
from tiny_families import tiny_family
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig

from prism_assets.errors import ModelError
from prism_assets.resources.model.lora_targets import lora_targets

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def ends(modules: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in modules}


@pytest.mark.parametrize("given", ["all-linear", ("q_proj", "v_proj"), r".*\.[qv]_proj"])
def test_a_plain_model_gets_what_the_settings_say_word_for_word(given):
    """So that adapters made before are named, drawn and written as they were."""
    found = lora_targets(tiny_family("llama"), given)
    assert found.modules == (given if isinstance(given, str) else list(given)) and found.left_out == ""


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen3_moe", ATTENTION),
        ("phimoe", ATTENTION),
        ("llama4", ATTENTION | {f"shared_expert.{name}" for name in MLP}),
        ("qwen2_moe", ATTENTION | {f"shared_expert.{name}" for name in MLP}),
        # PEFT takes gate_proj, up_proj and down_proj for the stacked experts, so the dense first layer is left out too.
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        # Experts of attention as well: keys and values alone are one product.
        ("jetmoe", {"kv_proj"}),
    ],
)
def test_all_linear_on_a_mixture_is_every_linear_layer_but_experts_and_routers(family, kinds):
    model = tiny_family(family)
    found = lora_targets(model, "all-linear")
    assert {re.sub(r".*(self_attn|self_attention|mlp|feed_forward)\.", "", name) for name in found.modules} == kinds
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in found.modules)
    assert len(found.modules) == 2 * len(kinds)  # two layers
    assert found.left_out == "routed experts and their routers"


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
@pytest.mark.parametrize("given", ["all-linear", ("q_proj", "fc1"), r".*q_proj"])
def test_of_a_multimodal_model_the_text_decoder_alone_is_adapted(family, given):
    model = tiny_family(family)
    found = lora_targets(model, given)
    decoder = set(model.get_decoder().modules())
    adapted = [model.get_submodule(name) for name in found.modules]
    assert set(adapted) <= decoder and model.get_output_embeddings() not in adapted
    assert ends(found.modules) == (ATTENTION | MLP if given == "all-linear" else {"q_proj"})
    assert len(adapted) == 2 * len(ends(found.modules))
    assert found.left_out.startswith("everything outside of")


def test_excluded_modules_are_named_as_in_peft():
    model = tiny_family("llama")
    every = set(lora_targets(model, "all-linear", ("q_proj",)).modules)
    assert ends(every) == (ATTENTION | MLP) - {"q_proj"}
    assert ends(lora_targets(model, ("q_proj", "v_proj"), ("v_proj",)).modules) == {"q_proj"}
    assert ends(lora_targets(model, "all-linear", r".*\.mlp\..*").modules) == ATTENTION
    one = lora_targets(model, "all-linear", ("model.layers.0.mlp.up_proj",)).modules
    assert "model.layers.1.mlp.up_proj" in one and "model.layers.0.mlp.up_proj" not in one


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_are_those_of_the_decoder(family):
    found = lora_targets(tiny_family(family), "all-linear", layers=(1,)).modules
    assert len(found) == len(ATTENTION | MLP) and all(".layers.1." in name for name in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_modules": ("q_porj",)}, r"lora\.exclude_modules: 'q_porj' names no module"),
        ({"exclude_modules": ("q_proj", "proj")}, r"lora\.exclude_modules: 'proj' names no module"),
        ({"layers": (0, 2)}, r"lora\.layers: .* has no decoder layer 2; its 2 layers are numbered 0 to 1"),
        ({"exclude_modules": r".*_proj"}, "leave no module"),
        ({"target_modules": ("lm_head",), "layers": (0,)}, "leave no module"),
    ],
)
def test_settings_that_name_nothing_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        lora_targets(tiny_family("llama"), **{"target_modules": "all-linear", **options})


def test_all_linear_leaves_out_what_has_no_place_for_lora():
    """Mamba's kernels read the weights of its output projection past the module; a layer in groups is no product."""
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    found = lora_targets(mamba, "all-linear")
    assert ends(found.modules) == {"in_proj", "x_proj", "dt_proj"} and len(found.modules) == 6
    assert found.left_out == "mixer.out_proj (no place for LoRA)"
    assert lora_targets(mamba, ("out_proj",)).modules == ["out_proj"]  # asked for by name it is PEFT's to refuse

    class Grouped(nn.Linear):
        def forward(self, input):
            return super().forward(input.reshape(*input.shape[:-1], 2, -1))

    llama = tiny_family("llama")
    llama.model.layers[0].self_attn.o_proj = Grouped(16, 32, bias=False)
    found = lora_targets(llama, "all-linear")
    assert "model.layers.0.self_attn.o_proj" not in found.modules and "model.layers.1.self_attn.o_proj" in found.modules
    assert found.left_out == "self_attn.o_proj (no place for LoRA)"
