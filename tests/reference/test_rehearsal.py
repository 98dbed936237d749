"""The rehearsal: what a model cannot do is said before any work, with settings that work."""

import numpy as np
import pytest
import torch
import yaml
from tiny_families import save_family

from prism_assets.errors import RunRefused, UnsupportedModelError
from prism_assets.ops.doctor import examine
from prism_assets.reference.rehearsal import rehearse


@pytest.fixture
def project_of(make_project, tiny_model, tmp_path):
    """A project with a tiny model of a family."""

    def build(family, **sections):
        project = make_project(tmp_path / "project", **sections)
        for file in (project.folder / "model").iterdir():
            file.unlink()
        (project.folder / "model").rmdir()
        save_family(family, tiny_model, project.folder / "model")
        return project

    return build


def state_of(stage):
    return {name: value.clone() for name, value in stage.model.base().state_dict().items()}


def assert_as_before(stage, before):
    after = stage.model.base().state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "layers", "left_out"),
    [
        ("llama", 14, ""),
        ("qwen3_moe", 8, "routed experts and their routers"),
        ("phimoe", 8, "routed experts and their routers"),
        ("jetmoe", 2, "routed experts and their routers"),
        ("gemma3", 14, "everything outside of model.language_model"),
        ("llava", 14, "everything outside of model.language_model"),
        ("qwen2_vl", 14, "everything outside of model.language_model"),
    ],
)
def test_default_settings_work_and_leave_the_model_as_it_was(project_of, family, layers, left_out):
    stage = project_of(family).stage
    before = state_of(stage)
    found = rehearse(stage)
    assert (found.layers, found.left_out) == (layers, left_out)
    assert_as_before(stage, before)


@pytest.mark.parametrize("family", ["qwen2_moe", "llama4", "deepseek_v3"])
def test_what_all_linear_gives_is_accepted_or_the_message_has_settings_that_are(project_of, family):
    project = project_of(family)
    before = state_of(project.stage)
    try:
        rehearse(project.stage)
    except UnsupportedModelError as error:
        project.configure(**lines_of(error))
        assert rehearse(project.stage).layers >= 8
    assert_as_before(project.stage, before)


def lines_of(error):
    """What a message has to paste."""
    return yaml.safe_load(str(error).partition("it works")[2].partition("\n")[2])


def test_a_refused_module_is_named_with_lines_to_paste_that_work(project_of):
    project = project_of("llama", lora={"target_modules": ["q_proj", "embed_tokens"]})
    before = state_of(project.stage)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens: LoRA on Embedding .*not supported") as caught:
        rehearse(project.stage)
    assert lines_of(caught.value) == {"lora": {"exclude_modules": ["embed_tokens"]}}
    assert_as_before(project.stage, before)
    project.configure(**lines_of(caught.value))
    assert rehearse(project.stage).layers == 2
    assert_as_before(project.stage, before)


def test_stacked_experts_that_the_settings_name_are_refused_and_all_linear_is_offered(project_of):
    project = project_of("qwen3_moe", lora={"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]})
    before = state_of(project.stage)
    with pytest.raises(UnsupportedModelError, match="target_parameters") as caught:
        rehearse(project.stage)
    assert lines_of(caught.value)["lora"]["target_modules"] == "all-linear"
    assert_as_before(project.stage, before)
    project.configure(**lines_of(caught.value))
    assert rehearse(project.stage).layers == 8


def test_doctor_and_run_say_it_before_any_work(project_of):
    project = project_of("llama", lora={"target_modules": ["q_proj", "embed_tokens"]})
    problem = {one.what: one for one in examine(project.stage)}["adapter"]
    assert problem.state == "problem" and "embed_tokens" in problem.found and "exclude_modules" in problem.found
    with pytest.raises(RunRefused, match=r"embed_tokens(.|\n)*exclude_modules"):
        project.run()
    assert not list(project.lake.artifacts("candidates"))
    project.configure(lora={"exclude_modules": ["embed_tokens"]})
    fine = {one.what: one for one in examine(project.stage)}["adapter"]
    assert fine.state == "ok" and fine.found.startswith("2 layers, ")


def test_what_fails_in_the_models_own_code_is_named(project_of, monkeypatch):
    from transformers import LlamaForCausalLM

    stage = project_of("llama", lora={"rank": 3}).stage  # none that was rehearsed in this process

    def forward(*args, **options):
        raise AttributeError("no such part")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: a gradient of .*AttributeError: no such part"):
        rehearse(stage)


def test_a_multimodal_model_goes_through_the_whole_graph(project_of):
    project = project_of("gemma3", strategies=["prism", "rds", "random"], seeds=[0])
    project.run()
    scores = [row["score"] for row in project.selected("prism")]
    assert len(scores) == 8 and np.isfinite(scores).all()
    warmup = project.stage.warmup
    assert warmup.notes["adapted"]["left_out"] == "everything outside of model.language_model"


def test_dropout_is_of_training_alone(project_of):
    """Two passes with dropout give what one without gives; the layers have it for whoever trains."""
    seen, project = [], project_of("llama")
    for dropout in (0.0, 0.5, 0.5):
        stage = project.configure(lora={"dropout": dropout}).stage
        with stage.adapted(seed=1) as model:
            layers = [module for module in model.modules() if hasattr(module, "lora_dropout")]
            assert layers and not model.training and not any(layer.training for layer in layers)
            assert {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers} == {dropout}
            with torch.no_grad():
                for layer in layers:
                    layer.lora_B["default"].weight.fill_(0.1)
                seen.append(model(torch.arange(4, 14)[None]).logits)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
