"""The survey of model types: five of them as they come out, and that each outcome is told from the others."""

import json

import numpy as np
import pytest
import torch

from benchmarks import families
from benchmarks.families import Found, main, make_examples, report, run, survey
from benchmarks.tiny_models import VOCABULARY, causal_lm_types, tiny_config, tiny_model
from prism_assets.gradients.engine import GradientEngine


def test_five_families_are_exact(capsys):
    """A dense model, flattened inputs, latent attention, recurrence, layers that are used several times."""
    types = ["qwen3", "opt", "minicpm3", "rwkv", "zamba2"]
    main(["--json", "--types", *types])
    result = json.loads(capsys.readouterr().out)
    assert list(result["types"]) == types
    assert result["counts"] == {"exact": 5, "refused": 0, "wrong": 0, "cannot_build": 0}, result
    assert all(found["error"] < 1e-9 and found["layers"] > 1 for found in result["types"].values())


def test_what_is_no_causal_model_is_refused_and_what_cannot_be_built_says_why():
    found = run(["xlnet", "musicgen"])
    assert found["xlnet"].outcome == "refused" and "lets tokens see later ones" in found["xlnet"].reason
    assert found["musicgen"].outcome == "cannot_build" and "dropout" in found["musicgen"].reason


def test_a_wrong_gradient_is_called_wrong(monkeypatch):
    original = GradientEngine.per_example_gradients

    def slightly_off(self, examples):
        for positions, gradients in original(self, examples):
            next(iter(gradients.values()))[0] *= 1 + 1e-5
            yield positions, gradients

    monkeypatch.setattr(GradientEngine, "per_example_gradients", slightly_off)
    monkeypatch.setattr(families, "_built", {})
    found = survey("llama")
    assert found.outcome == "wrong" and found.error == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(("end", "reason"), [("raise SystemExit(3)", "status 3"), ("sleep", "not done after 1 s")])
def test_a_type_that_ends_its_process_or_hangs_costs_that_type_alone(end, reason, monkeypatch):
    def broken(model_type):
        if model_type == "gpt2":
            if end == "sleep":
                torch.multiprocessing.Event().wait(30)
            raise SystemExit(3)
        return Found("exact", 0.0)

    monkeypatch.setattr(families, "survey", broken)
    found = run(["gpt2", "llama"], time_limit=1 if end == "sleep" else 30)
    assert found["gpt2"].outcome == "cannot_build" and reason in found["gpt2"].reason
    assert found["llama"].outcome == "exact"
    assert report(found)["counts"] == {"exact": 1, "refused": 0, "wrong": 0, "cannot_build": 1}


def test_a_type_that_transformers_does_not_have_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--types", "llama", "lama"])
    assert "--types lama: no causal LM type of transformers" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["gemma2", "granitemoehybrid", "qwen3_next"])
def test_tiny_models_are_small_and_have_layers_of_each_kind(model_type):
    config = tiny_config(model_type)
    assert len(set(config.layer_types)) == 2
    assert sum(parameter.numel() for parameter in tiny_model(model_type).parameters()) < 200_000
    assert config.vocab_size == VOCABULARY and model_type in causal_lm_types()


def test_examples_have_padding_and_supervised_tokens_of_all_sorts():
    examples = make_examples()
    assert len({len(example.input_ids) for example in examples}) > 3
    for example in examples:
        assert example.loss_mask[-1] and not example.loss_mask[0]
        assert np.all(example.input_ids < VOCABULARY)
