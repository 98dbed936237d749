"""`warmup.optimizer_state`: a project whose moments are those of the user's own fine-tuning, from doctor to report."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prism_assets.catalog.lineage import trace
from prism_assets.corpus.token_tables import from_table
from prism_assets.errors import SettingsError, UnreadableFile
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.ops.doctor import examine
from prism_assets.ops.estimate import estimate
from prism_assets.reference.checkpoints import read_checkpoints

STEPS = 3
SETTINGS = {
    "model": {"adapter": "./run/checkpoint-3", "adapter_base": "./model"},
    "warmup": {"optimizer_state": "./run/checkpoint-3", "share": 1},
    "strategies": ["prism", "random"],
    "seeds": [0],
    "evaluation": {"max_new_tokens": 2},
    "features": {"optimizer": "adam", "sketch_dim": 64},
}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """The folder of a Trainer's checkpoint, and what its optimiser holds by name."""
    folder = tmp_path_factory.mktemp("own") / "run"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "./model"
    rows = torch.randint(4, 40, (8, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_steps": STEPS, "save_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    held = {
        name.replace(".default", ""): optimizer.state[parameter]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return folder, held


def build(make_project, trained, folder):
    project = make_project(folder)
    shutil.copytree(trained[0], folder / "run")
    project.content["warmup"] = {}
    return project.configure(**SETTINGS)


@pytest.fixture(scope="module")
def project(make_project, trained, tmp_path_factory):
    project = build(make_project, trained, tmp_path_factory.mktemp("moments") / "project")
    project.before = {finding.what: finding for finding in examine(project.stage)}
    project.estimated = estimate(project.stage, seconds=0.01)
    project.run()
    return project


def test_doctor_reads_the_state_before_any_work(project):
    found = project.before["optimizer_state"]
    assert found.state == "ok"
    assert "moments of 4 parameters after 3 steps, betas (0.9, 0.999), eps 1e-08" in found.found
    (warmup,) = [one for one in project.estimated.stages if one.stage == "warm-up"]
    assert warmup.seconds == 0


def test_the_one_checkpoint_is_the_users_adapter_with_the_users_moments(project, trained):
    folder, held = trained
    warmup = project.lake.require("warmup_checkpoints", None, project.stage.warmup_scope)
    (checkpoint,) = read_checkpoints(project.lake.local(warmup))
    weights = load_file(folder / "checkpoint-3" / "adapter_model.safetensors")
    assert checkpoint.lora.keys() == weights.keys() == held.keys()
    for name, state in held.items():
        assert torch.equal(checkpoint.lora[name], weights[name])
        assert torch.equal(checkpoint.exp_avg[name], state["exp_avg"])
        assert torch.equal(checkpoint.exp_avg_sq[name], state["exp_avg_sq"])
    assert checkpoint.optimizer_step == STEPS and warmup.notes["losses"] == []
    assert warmup.notes["optimizer_state"]["path"] == str(project.folder / "run" / "checkpoint-3")
    assert warmup.header["inputs"]["optimizer_state"]["content_hash"] == project.stage.optimizer_state


def test_the_features_are_gradients_at_that_adapter_over_the_roots_of_these_moments(project, trained):
    _, held = trained
    stage = project.stage
    key = project.lake.read_table(stage.shown("live_pool"), ["shard"])["shard"].to_pylist()[0]
    example = from_table(project.lake.read_table(stage.shown("candidates", key)))[0]
    with gradient_pass(stage) as work:
        (checkpoint,) = work.checkpoints
        engine = work.at(checkpoint)
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        parameters = {
            name.replace(".default", ""): one for name, one in engine.model.named_parameters() if "lora_" in name
        }
        log_probs = engine.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mean = log_probs[torch.from_numpy(example.loss_mask[1:])].mean()
        gradients = dict(zip(parameters, torch.autograd.grad(mean, list(parameters.values())), strict=True))
        expected = {
            name: gradient / ((held[name]["exp_avg_sq"] / (1 - 0.999**STEPS)).sqrt() + 1e-8)
            for name, gradient in gradients.items()
        }
        row = work.projection(engine).sketch_vector(expected).numpy()
        found = work.candidate_rows([example])[0].rows[0]
    np.testing.assert_allclose(found, row, rtol=1e-3, atol=1e-4 * np.abs(row).max())


def test_lineage_leads_from_a_selection_to_the_state(project):
    found = trace(project.lake, project.selection("prism"))["artifacts"]
    (warmup,) = [one for one in found if one["table"] == "warmup_checkpoints"]
    header = project.lake.require("warmup_checkpoints", None, project.stage.warmup_scope).header
    assert warmup["fingerprint"] == header["fingerprint"] and "optimizer_state" in header["inputs"]


def test_another_state_is_another_scope_and_another_place_is_not(project, tmp_path):
    version, scope = project.stage.feature_version, project.stage.warmup_scope
    moved = project.copy(tmp_path / "moved")
    shutil.copytree(moved.folder / "run" / "checkpoint-3", moved.folder / "elsewhere")
    moved.configure(warmup={"optimizer_state": "./elsewhere"})
    assert moved.stage.warmup_scope == scope and moved.stage.feature_version == version
    file = moved.folder / "elsewhere" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg_sq"] *= 2
    torch.save(state, file)
    assert moved.stage.warmup_scope != scope
    assert moved.run()["Candidate features"] == 2
    assert moved.stage.feature_version != version


def test_doctor_and_run_stop_at_a_state_that_does_not_fit(make_project, trained, tmp_path):
    project = build(make_project, trained, tmp_path / "project")
    file = project.folder / "run" / "checkpoint-3" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(2, 7)
    torch.save(state, file)
    found = {finding.what: finding for finding in examine(project.stage)}["optimizer_state"]
    assert found.state == "problem" and "has exp_avg of base_model" in found.found and "(2, 7)" in found.found
    with pytest.raises(Exception, match=r"exp_avg of base_model.*\(2, 7\), the parameter has \(2, ") as error:
        project.run()
    assert getattr(error.value, "exit_status", None) == 2
    file.unlink()
    assert {f.what: f for f in examine(project.stage)}["optimizer_state"].state == "problem"
    with pytest.raises(UnreadableFile, match="holds no optimizer.pt"):
        project.stage.warmup_scope  # noqa: B018


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"warmup": {"optimizer_state": "x"}}, "is of the run that made model.adapter, which is not set"),
        ({"model": {"adapter": "a"}, "warmup": {"optimizer_state": "x", "epochs": 4}}, "warmup.epochs has no effect"),
        (
            {"model": {"adapter": "a"}, "warmup": {"optimizer_state": "x", "checkpoints": 2}},
            "warmup.checkpoints has",
        ),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(make_project, tmp_path, sections, reason):
    project = make_project(tmp_path / "project")
    project.content["warmup"] = {}
    with pytest.raises(SettingsError, match=reason):
        project.configure(**sections).settings  # noqa: B018


def test_without_it_no_scope_changes(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    assert "optimizer_state" not in json.dumps(project.settings.warmup.model_dump(mode="json"))
    assert project.stage.optimizer_state is None
