"""A project on a quantised base, from files to an exported adapter."""

import json

import numpy as np
import pytest
import torch
from four_bits import as_plain_layers
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prism_assets.corpus.token_tables import from_table
from prism_assets.export.export import export
from prism_assets.ops.doctor import examine
from prism_assets.ops.estimate import estimate


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(
        tmp_path_factory.mktemp("quantised") / "project",
        strategies=["prism", "random", "rds"],
        seeds=[0],
        evaluation={"max_new_tokens": 2},
    )
    project.run()
    return project


@pytest.fixture(scope="module")
def quantized(project, tmp_path_factory):
    """The same project after its base was quantised; the first run's results stay in the lake."""
    other = project.copy(tmp_path_factory.mktemp("quantised") / "other").configure(model={"quantization": "nf4"})
    before = {finding.what: finding for finding in examine(other.stage)}
    other.estimated = estimate(other.stage, seconds=0.01)
    other.before = before
    other.made = other.run()
    return other


def test_doctor_and_estimate_work_before_a_first_run(quantized):
    before = quantized.before
    assert before["model"].state == before["adapter"].state == "ok"
    assert before["model"].found.endswith("linear layers in nf4")
    assert before["bitsandbytes"].found.startswith("bitsandbytes 0.")
    assert "a gradient and a step of training were tried" in before["adapter"].found
    estimated = quantized.estimated
    assert estimated.problems == [] and estimated.seconds > 0
    assert any("warm-up" in one.stage for one in estimated.stages)


def test_everything_that_the_base_decides_is_made_again_and_nothing_else(project, quantized):
    assert quantized.made["Candidates"] == quantized.made["Targets"] == quantized.made["Base model"] == 0
    assert quantized.made["Candidate features"] == 2 and quantized.made["Report"] == 1
    stage, plain = quantized.stage, project.stage
    assert stage.model_identity.fingerprint == plain.model_identity.fingerprint
    assert stage.feature_version != plain.feature_version
    assert stage.dtype == f"{plain.dtype} nf4" == "torch.float32 nf4"
    quantized.configure(model={"quantization": "none"})
    try:
        assert set(quantized.run().values()) <= {0, 1}  # the float base's results are found; the report is written anew
    finally:
        quantized.configure(model={"quantization": "nf4"})
        quantized.run()


def test_report_and_card_name_the_quantised_base(quantized, tmp_path):
    assert quantized.report["model"]["name"].endswith("/model in nf4")
    export(quantized.stage, "plain", "prism", tmp_path / "export")
    card = (tmp_path / "export" / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    line = next(line for line in code.splitlines() if line.startswith("quantized = "))
    assert eval(line.removeprefix("quantized = ")).to_dict() == quantization.to_dict()
    assert "quantization_config=quantized)" in code


def test_a_fine_tuned_adapter_loads_in_peft_and_gives_the_log_probabilities_of_the_evaluation(quantized):
    lake, stage = quantized.lake, quantized.stage
    folder = lake.local(lake.require("adapters", "prism|plain/seed-0"))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        quantized.folder / "model", dtype=torch.float32, device_map={"": "cpu"}, quantization_config=quantization
    )
    model = PeftModel.from_pretrained(as_plain_layers(base), folder).eval()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    records = lake.read_table(stage.shown("eval_examples", "plain"))
    expected = []
    for example in from_table(records):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected.append(float(log_probs[torch.from_numpy(example.loss_mask[1:])].mean()))
    found = lake.read_table(lake.require("evaluations", "prism|plain/seed-0"))["mean_log_prob"].to_pylist()
    np.testing.assert_allclose(found, expected, atol=1e-4)
