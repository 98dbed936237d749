"""Fine-tuning: against a plain PyTorch loop, reproducible, captured by parameter name, nothing left behind."""

import json
import math
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prism_assets.errors import StageError
from prism_assets.gradients.engine import GradientEngine
from prism_assets.sft import trainer as sft
from prism_assets.sft.adapter_files import save_adapter
from prism_assets.sft.checkpoints import trainable_lora_names

VOCABULARY = 23


class Tokens(NamedTuple):
    input_ids: np.ndarray
    loss_mask: np.ndarray


def number_tokenizer():
    """A tokenizer of numbers: one word a token, 0 for padding."""
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1")


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )


def make_model(dropout: float = 0.0, **lora) -> PeftModel:
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        **lora,
    )
    base = make_base()
    torch.manual_seed(1)
    return get_peft_model(base, config)


def with_random_b(model: PeftModel) -> PeftModel:
    """B is zero at the start, and then A's gradients are."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_examples(number: int = 13) -> list[Tokens]:
    """Of different lengths and different shares of supervised tokens."""
    rng = np.random.default_rng(5)
    examples = []
    for i in range(number):
        length = 6 + 3 * (i % 5)
        mask = np.zeros(length, bool)
        mask[2 + i % 3 :] = True
        mask[4] = i % 2 == 0
        examples.append(Tokens(rng.integers(1, VOCABULARY, length).astype(np.int32), mask))
    return examples


def fine_tune(model, examples, *, seed=0, checkpoints=1, tracking=None, progress=None, engine=None, **training):
    """`sft.fine_tune` of a model, with the fields of `Training` by name."""
    engine = engine or GradientEngine(model)
    return sft.fine_tune(
        engine,
        examples,
        sft.Training(**training),
        seed=seed,
        checkpoints=checkpoints,
        tracking=tracking,
        progress=progress,
    )


def plain_loop(model, examples, *, seed, steps, batch_size, accumulation, learning_rate, warmup, weight_decay, clip):
    """AdamW and a linear schedule, written out; one example at a time, no padding."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / (warmup + 1) if t < warmup else max(0.0, (steps - t) / (steps - warmup))
    )
    per_epoch = math.ceil(math.ceil(len(examples) / batch_size) / accumulation)
    model.train()
    losses, rates = [], []
    for step in range(steps):
        order = sft.epoch_order(len(examples), seed, step // per_epoch)
        start = (step % per_epoch) * batch_size * accumulation
        chosen = [examples[i] for i in order[start : start + batch_size * accumulation]]
        total = torch.zeros(())
        for example in chosen:
            tokens = torch.from_numpy(example.input_ids.astype(np.int64))
            log_probs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
            for t in np.flatnonzero(example.loss_mask):
                total = total - log_probs[t - 1, tokens[t]]
        loss = total / sum(int(example.loss_mask.sum()) for example in chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    moments = {name.replace(".default", ""): optimizer.state[p] for name, p in parameters.items()}
    return losses, rates, moments


@pytest.mark.parametrize("accumulation", [1, 2])
def test_equals_a_plain_loop_with_adamw_and_a_linear_schedule(accumulation):
    examples, settings = make_examples(), dict(learning_rate=5e-3, weight_decay=0.1)
    trained, reference = make_model(), make_model()
    result = fine_tune(
        trained,
        examples,
        seed=7,
        epochs=3,
        batch_size=4,
        gradient_accumulation=accumulation,
        warmup_ratio=0.2,
        max_grad_norm=0.5,
        **settings,
    )
    steps = 12 if accumulation == 1 else 6
    losses, rates, moments = plain_loop(
        reference,
        examples,
        seed=7,
        steps=steps,
        batch_size=4,
        clip=0.5,
        accumulation=accumulation,
        warmup=math.ceil(0.2 * steps),
        **settings,
    )
    assert result.steps == steps
    np.testing.assert_allclose(result.losses, losses, atol=1e-5)
    np.testing.assert_allclose(result.learning_rates, rates, rtol=1e-12)
    assert result.completion_tokens == 3 * sum(int(example.loss_mask.sum()) for example in examples)
    last = result.checkpoints[-1]
    expected = get_peft_model_state_dict(reference)
    assert list(last.lora_state) == list(get_peft_model_state_dict(trained)) == list(last.exp_avg)
    for name, parameter in expected.items():
        torch.testing.assert_close(last.lora_state[name], parameter, atol=1e-5, rtol=0)
        torch.testing.assert_close(last.exp_avg[name], moments[name]["exp_avg"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(last.exp_avg_sq[name], moments[name]["exp_avg_sq"], atol=1e-7, rtol=1e-4)
    assert (last.optimizer_step, last.betas, last.eps) == (steps, (0.9, 0.999), 1e-8)
    start = get_peft_model_state_dict(make_model())  # what is compared has moved by far more than the tolerance
    assert max(float((last.lora_state[name] - start[name]).abs().max()) for name in start) > 5e-3


def test_checkpoints_are_snapshots_at_even_steps_with_their_own_learning_rates(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, seen = make_model(), []
    result = fine_tune(
        model,
        make_examples(),
        seed=3,
        steps=7,
        batch_size=5,
        learning_rate=1e-2,
        checkpoints=3,
        progress=lambda *report: seen.append(report),
    )
    assert [checkpoint.step for checkpoint in result.checkpoints] == [3, 5, 7]
    assert seen == [(i + 1, 7, loss) for i, loss in enumerate(result.losses)]
    assert capfd.readouterr().out == "" and list(tmp_path.iterdir()) == []  # silent, and nothing stays on disk
    bounds = [0, 3, 5, 7]
    for i, checkpoint in enumerate(result.checkpoints):
        expected = np.mean(result.learning_rates[bounds[i] : bounds[i + 1]])
        assert checkpoint.mean_learning_rate == pytest.approx(expected, rel=1e-12)
        assert checkpoint.optimizer_step == bounds[i + 1]
    first, last = result.checkpoints[0], result.checkpoints[-1]
    assert any(not torch.equal(first.lora_state[name], last.lora_state[name]) for name in first.lora_state)
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(last.lora_state[name], tensor)


def test_a_rerun_is_bitwise_equal_and_the_seed_and_the_order_matter():
    examples = make_examples()

    def state(seed, examples, disturb):
        torch.manual_seed(disturb)
        model = make_model(dropout=0.2)
        torch.manual_seed(disturb)  # whatever random state the caller is in
        return fine_tune(model, examples, seed=seed, steps=5, batch_size=4).checkpoints[-1]

    one, again = state(1, examples, 10), state(1, examples, 11)
    for name in one.lora_state:
        assert torch.equal(one.lora_state[name], again.lora_state[name])
        assert torch.equal(one.exp_avg_sq[name], again.exp_avg_sq[name])
    for other in (state(2, examples, 10), state(1, examples[::-1], 10)):
        assert any(not torch.equal(one.exp_avg[name], other.exp_avg[name]) for name in one.exp_avg)


def test_the_model_s_mode_and_its_forward_are_as_before():
    model = make_model().eval()
    forward = model.forward
    fine_tune(model, make_examples(), seed=1, steps=2, batch_size=4)
    assert model.forward == forward and not model.training and model.config.use_cache


@pytest.mark.parametrize("budget", [{"token_budget": 16}, {"token_budget": 10**6}, {"recompute": True}])
def test_micro_batches_and_recomputation_change_an_update_by_rounding_only(budget):
    """Against one padded batch through transformers' own loss, which averages over all supervised tokens."""
    examples, settings = make_examples(), dict(steps=1, batch_size=13, learning_rate=1e-2, scheduler="constant")
    trained, reference, untouched = (with_random_b(make_model()) for _ in range(3))
    fine_tune(trained, examples, warmup_ratio=0, engine=GradientEngine(trained, **budget), **settings)

    width = max(len(example.input_ids) for example in examples)
    ids, labels = torch.zeros(13, width, dtype=torch.int64), torch.full((13, width), -100)
    for row, (tokens, mask) in enumerate(examples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        labels[row, : len(tokens)] = torch.from_numpy(np.where(mask, tokens, -100))
    parameters = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    reference(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0).step()
    start, expected = get_peft_model_state_dict(untouched), get_peft_model_state_dict(reference)
    for name, value in get_peft_model_state_dict(trained).items():
        # AdamW's first step is about the sign of a gradient: where that is rounding noise, so is the step.
        moved = (expected[name] - start[name]).abs() > 5e-3
        torch.testing.assert_close(value[moved], expected[name][moved], atol=1e-5, rtol=0)
        assert moved.float().mean() > 0.9


def test_the_first_step_has_a_learning_rate_and_the_warm_up_rises_to_the_full_one():
    rates = fine_tune(make_model(), make_examples(), steps=8, learning_rate=1.0, warmup_ratio=0.3).learning_rates
    np.testing.assert_allclose(rates, [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5], rtol=1e-12)
    model = make_model()
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    fine_tune(model, make_examples(), steps=1)  # of one step, all of it warm-up
    assert any(not torch.equal(before[name], value) for name, value in get_peft_model_state_dict(model).items())


def test_a_training_that_changes_nothing_is_an_error():
    with pytest.raises(StageError, match=r"changed nothing: after 2 steps with learning rates up to 0 .* Raise"):
        fine_tune(make_model(), make_examples(), steps=2, learning_rate=0.0)


def test_dropout_in_front_of_a_is_drawn_as_peft_draws_it():
    """The same random numbers make the same gradient as autograd through PEFT's own layers."""
    example = make_examples()[4]
    # Not the last layer, which draws for supervised positions only.
    model = make_model(dropout=0.4, layers_to_transform=[0]).train()
    engine = GradientEngine(with_random_b(model))
    torch.manual_seed(3)
    found = engine.weighted_gradient([example], [1.0], training=True)
    plain = engine.weighted_gradient([example], [1.0])
    torch.manual_seed(3)
    tokens = torch.from_numpy(example.input_ids[: np.flatnonzero(example.loss_mask)[-1]].astype(np.int64))
    log_probs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    where = np.flatnonzero(example.loss_mask)
    (log_probs[where - 1, example.input_ids[where]].mean()).backward()
    name = next(iter(engine.parameters))
    assert relative_difference(found.gradient[name], engine.parameters[name].grad) < 1e-5
    assert relative_difference(plain.gradient[name], engine.parameters[name].grad) > 0.05


def relative_difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    orders = [sft.epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    model = make_model()

    def poison(done, total, loss):
        if done == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))

    with pytest.raises(FloatingPointError, match=r"loss of step 3 of 6 is nan.*lower the learning rate"):
        fine_tune(model, make_examples(), seed=0, steps=6, progress=poison)


def test_parameters_that_are_not_finite_at_the_end_are_refused():
    with pytest.raises(FloatingPointError, match="after step 1 of 1"):
        fine_tune(
            make_model(),
            make_examples(),
            seed=0,
            steps=1,
            learning_rate=float("inf"),
            warmup_ratio=0,
        )


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "no examples"),
        (
            [Tokens(np.arange(3), np.array([0, 0, 1], bool)), Tokens(np.arange(3), np.zeros(3, bool))],
            "example 1 has no supervised token",
        ),
        ([Tokens(np.arange(3), np.array([1, 0, 1], bool))], "example 0: its first token is supervised"),
        ([Tokens(np.arange(3), np.ones(2, bool))], "example 0: 3 tokens but 2"),
    ],
)
def test_examples_that_cannot_be_trained_on_are_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(make_model(), examples, seed=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(steps=3, checkpoints=4), "4 checkpoints of 3 training steps"),
        (dict(steps=3, checkpoints=0), "0 checkpoints of 3 training steps"),
        (dict(epochs=0), "nothing to train"),
        (dict(batch_size=0), "batch_size .0."),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(make_model(), make_examples(), seed=0, **arguments)


def test_models_that_train_anything_but_lora_weights_are_refused():
    with pytest.raises(ValueError, match="no LoRA weights: .*lm_head"):
        trainable_lora_names(make_model(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="not LlamaForCausalLM"):
        trainable_lora_names(make_base())
    frozen = make_model()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen: .*q_proj.lora_A.weight.*is_trainable"):
        trainable_lora_names(frozen)


def test_a_saved_adapter_loads_and_its_bytes_are_deterministic(tmp_path):
    model = make_model()
    fine_tune(model, make_examples(), seed=0, steps=3, learning_rate=1e-2)
    for folder in ("one", "two"):
        save_adapter(model, tmp_path / folder, {"strategy": "prism", "seed": 3}, base_model="some/model")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert "strategy: prism" in (tmp_path / "one" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(make_base(), str(tmp_path / "one"))
    tokens = torch.arange(1, 12)[None]
    model.eval()
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert not torch.equal(make_base()(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_tensorboard_gets_every_step_where_it_was_told_to_write(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    model, examples = make_model(), make_examples()
    result = fine_tune(model, examples, seed=0, steps=4, tracking=sft.Tracking(["tensorboard"], tmp_path / "events"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    # The Trainer rounds what it logs to four digits.
    np.testing.assert_allclose(losses, result.losses, atol=1e-4)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    quiet = make_model()
    plain = fine_tune(quiet, examples, seed=0, steps=4)
    assert plain.losses == result.losses
