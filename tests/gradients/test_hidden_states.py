"""Representations: the position-weighted mean of last hidden states, against the model's own, one example at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import save_tiny_model
from prism_assets.corpus.encoder import TokenizedExample
from prism_assets.gradients.hidden_states import representations
from prism_assets.resources.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LanguageModel(name=str(save_tiny_model(tmp_path_factory.mktemp("hidden") / "model", seed=3)))


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [
        TokenizedExample(rng.integers(4, 40, length).astype(np.int32), np.arange(length) > 0)
        for length in rng.integers(2, 40, 23)
    ]


def slowly(model, examples):
    """One example at a time through the whole causal model, means in float64."""
    rows = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        mean = sum((i + 1) * hidden[i] for i in range(len(hidden))) / sum(range(1, len(hidden) + 1))
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


def adapted(model, **options):
    return model.adapted(rank=2, alpha=4, target_modules="all-linear", **options)


def test_representations_are_those_of_the_definition(model, examples):
    with adapted(model) as peft_model:
        found = representations(peft_model, examples)
        for budget in (1, 50, 10**6):
            np.testing.assert_allclose(representations(peft_model, examples, token_budget=budget), found, atol=1e-5)
    np.testing.assert_allclose(found, slowly(model.base(), examples), atol=1e-5)
    assert found.dtype == np.float32 and found.shape == (23, 16)


def test_later_tokens_count_more(model):
    """The same tokens in another order are another row, nearer to one that ends alike."""
    ends_alike, starts_alike = np.array([5, 6, 7, 8, 30]), np.array([30, 6, 7, 8, 5])
    mask = np.arange(5) > 0
    three = [TokenizedExample(ids, mask) for ids in (np.array([9, 9, 9, 9, 30]), ends_alike, starts_alike)]
    with adapted(model) as peft_model:
        one, end, start = representations(peft_model, three)
    assert one @ end > one @ start


def test_a_starting_adapter_counts_and_its_dropout_does_not(model, examples, tmp_path):
    with adapted(model, seed=1) as peft_model:
        peft_model.peft_config["default"].lora_dropout = 0.5
        with torch.no_grad():
            for name, value in peft_model.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        expected = slowly(peft_model.eval(), examples)
        peft_model.save_pretrained(tmp_path)
    started = replace(model, adapter=str(tmp_path))
    with adapted(started) as peft_model:
        assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in peft_model.modules())
        np.testing.assert_allclose(representations(peft_model, examples), expected, atol=1e-5)
    with adapted(model) as peft_model:
        assert np.abs(representations(peft_model, examples) - expected).max() > 0.01


def test_an_example_that_cannot_be_represented_is_named(model, examples):
    with adapted(model) as peft_model:
        with pytest.raises(ValueError, match="example 1 has 65 tokens, the model takes 64"):
            representations(peft_model, [examples[0], TokenizedExample(np.full(65, 5), np.arange(65) > 0)])
        norm = model.base().get_decoder().norm.weight
        before = norm.data.clone()
        norm.data.fill_(float("nan"))
        try:
            with pytest.raises(ValueError, match=r"hidden states of example 0 .* not finite \(23 of 23\)"):
                representations(peft_model, examples)
        finally:
            norm.data.copy_(before)
