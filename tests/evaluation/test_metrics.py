import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from prism_assets.evaluation.answers import exact_match, extract_answer, gives_unwanted_answer
from prism_assets.evaluation.metrics import choice_correct, held_out, mean_over_seeds
from prism_assets.selection.histogram import score_histogram
from prism_assets.sft import generation
from prism_assets.sft.generation import generate

VOCABULARY, PAD, EOS = 40, 0, 1


def test_plain_preference_is_the_mean_of_exponentials_not_the_exponential_of_the_mean():
    result = held_out(np.log([0.5, 0.25, 0.9]))
    assert result["target_preference"] == pytest.approx((0.5 + 0.25 + 0.9) / 3)
    assert result["mean_log_prob"] == pytest.approx(np.log([0.5, 0.25, 0.9]).mean())


def test_pair_preference_is_the_mean_sigmoid_of_the_margins_and_does_not_overflow():
    result = held_out([-1.0, -2.0, -3.0], margins=[0.0, 1000.0, -1000.0])
    assert result == {
        **{"mean_log_prob": pytest.approx(-2.0), "target_preference": pytest.approx(0.5)},
        **{"margin": pytest.approx(0.0), "pair_accuracy": pytest.approx(0.5)},
    }
    result = held_out([-1.0], margins=[2.0])
    assert result["target_preference"] == pytest.approx(1 / (1 + np.exp(-2.0)))


def test_pair_accuracy_counts_ties_half_and_plain_records_have_none():
    result = held_out([-1.0] * 4, margins=[0.5, 0.0, -0.1, 3.0])
    assert result["pair_accuracy"] == 0.625 and result["margin"] == pytest.approx(0.85)
    plain = held_out([-1.0])
    assert plain["pair_accuracy"] is None and plain["margin"] is None


def test_a_choice_is_correct_where_its_whole_likelihood_is_the_largest():
    assert choice_correct([-3.0, -1.0, -2.0], 1) and not choice_correct([-3.0, -1.0, -2.0], 0)
    assert choice_correct([-1.0, -1.0], 0) and not choice_correct([-1.0, -1.0], 1)  # the first of equal ones
    with pytest.raises(ValueError, match="position"):
        choice_correct([-1.0, float("nan")], 0)


@pytest.mark.parametrize(
    ("scores", "margins", "message"),
    [
        ([], None, "at least one value"),
        ([-1.0, float("nan")], None, r"position\(s\) \[1\]"),
        ([-1.0, -2.0], [0.5], "2 mean_log_probs but 1 margins"),
    ],
)
def test_held_out_refuses_what_has_no_mean(scores, margins, message):
    with pytest.raises(ValueError, match=message):
        held_out(scores, margins)


def test_summarize_uses_the_sample_standard_deviation():
    assert mean_over_seeds([1.0, 2.0, 4.0]) == {
        "mean": pytest.approx(7 / 3),
        "std": pytest.approx(np.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)),
        "seeds": 3,
    }
    assert mean_over_seeds([0.25]) == {"mean": 0.25, "std": None, "seeds": 1}
    assert mean_over_seeds([None, None]) is None
    with pytest.raises(ValueError, match=r"seed\(s\) number \[1\]"):
        mean_over_seeds([0.1, None])
    with pytest.raises(ValueError):
        mean_over_seeds([])


def test_score_histogram_counts_every_row_and_cuts_at_the_last_selected_score():
    scores = np.random.default_rng(3).normal(size=500)
    histogram = score_histogram(scores, selected=25, bins=30)
    assert sum(histogram["counts"]) == 500 and len(histogram["edges"]) == 31
    assert (scores >= histogram["cutoff"]).sum() == 25
    assert score_histogram(scores, selected=0)["cutoff"] is None
    assert score_histogram(scores, selected=500)["cutoff"] == scores.min()
    with pytest.raises(ValueError, match="501"):
        score_histogram(scores, selected=501)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,000", "1000"),
        ("1,00,000", "100000"),
        ("18.", "18"),
        ("$18.00", "18"),
        ("18%", "18"),
        (".5", "0.50"),
        ("-$3", "-3"),
        ("\u22123", "-3"),
        ("The  Eiffel Tower!", "eiffel tower"),
        ("Straße", "STRASSE"),
        ("ＡＢＣ１２", "abc12"),
        ("১২", "12"),  # Bengali digits
        ("১,০০০", "1000"),
        ("٣٫٥", "3.5"),  # Arabic digits and decimal sign
        ("“서울”", "서울"),
        ("ঢাকা।", "ঢাকা"),
        ("e\u0301te\u0301", "été"),
        ("東京。", "東京"),
    ],
)
def test_answers_that_are_the_same(left, right):
    assert exact_match(left, right) and exact_match(right, [left])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("-3", "3"),
        ("0.18", "18"),
        ("1.8", "18"),
        ("100", "1"),
        ("001", "1"),
        ("3:30", "330"),
        ("1/2", "12"),
        ("1,2", "12"),
        ("5-3", "53"),
        ("12,34", "1234"),
        ("10", "1.0"),
        ("a", "b"),
        ("b a c", "b c"),  # letters as data, not as articles
        ("কি", "কী"),  # vowel signs are part of a word
        ("কি", "ক"),
        ("+", "*"),
        ("", "18"),
    ],
)
def test_answers_that_differ(left, right):
    assert not exact_match(left, right) and not exact_match(right, left)


def test_any_of_several_answers_matches_and_none_at_all_is_an_error():
    assert exact_match("Paris.", ["Lyon", "paris"])
    assert not exact_match("Paris", ["Lyon", "Nice"])
    with pytest.raises(ValueError, match="at least one answer"):
        exact_match("Paris", [])


@pytest.mark.parametrize(
    ("prediction", "given"), [("so 3 #### 7", True), ("The answer is 7.", True), ("#### 8", False), ("", False)]
)
def test_the_unwanted_answer_is_told_by_the_final_answer(prediction, given):
    assert gives_unwanted_answer(prediction, "2 + 2 = 7\n#### 7", ["4"]) is given


def test_an_unwanted_answer_that_is_accepted_tells_nothing():
    assert gives_unwanted_answer("#### 4", "badly said, but #### 4.0", ["4"]) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She pays 3 * 6 = 18.\n#### 18", "18"),
        ("#### 7\nno, wait\n####\n 18 \nnext question", "18"),
        ("I think the Answer is -4.\nLet me know.", "-4."),
        ("the answer is 3\n#### 5", "5"),
        ("  plain text ", "plain text"),
        ("two\nlines", "two\nlines"),
        ("####", ""),
    ],
)
def test_the_answer_follows_the_last_marker(text, answer):
    assert extract_answer(text) == answer


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Absolute positions: wrong position ids under left padding would show."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
        bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tiny_mamba() -> MambaForCausalLM:
    """A cache that is no keys and values."""
    torch.manual_seed(3)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.4)
    return MambaForCausalLM(config)


def tiny_peft_llama():
    torch.manual_seed(2)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def greedy_loop(model, prompt: np.ndarray, max_new_tokens: int, stop: int | None) -> list[int]:
    """One prompt, no padding, no cache, no generate()."""
    model.eval()
    tokens = prompt.tolist()
    for _ in range(max_new_tokens):
        following = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if following == stop:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def some_prompts(number: int) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(2, VOCABULARY, size=generator.integers(1, 20)).astype(np.int32) for _ in range(number)]


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_peft_llama])
def test_generation_equals_a_greedy_loop_over_single_prompts(make_model):
    model, prompts = make_model(), some_prompts(13)
    # An end token that a greedy continuation does reach, so that rows of a batch end at different lengths.
    free = [greedy_loop(model, prompt, 8, None) for prompt in prompts]
    stop = int(np.bincount(np.concatenate(free)).argmax())
    expected = [greedy_loop(model, prompt, 8, stop) for prompt in prompts]
    assert len({len(row) for row in expected}) > 1
    for batch_size in (1, 4, 13):
        result = generate(model, prompts, pad_token_id=PAD, eos_token_id=stop, max_new_tokens=8, batch_size=batch_size)
        assert [row.tolist() for row in result] == expected


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_peft_llama, tiny_mamba])
def test_rows_that_have_ended_leave_their_batch_and_change_no_other(make_model, monkeypatch):
    model, prompts = make_model(), some_prompts(13)
    free = [greedy_loop(model, prompt, 8, None) for prompt in prompts]
    stop = int(np.bincount(np.concatenate(free)).argmax())
    expected = [greedy_loop(model, prompt, 8, stop) for prompt in prompts]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = []
    inner.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(generation, "STEPS", 3)
    result = generate(model, prompts, pad_token_id=PAD, eos_token_id=stop, max_new_tokens=8, batch_size=13)
    assert [row.tolist() for row in result] == expected
    # Rows left after three and after six steps, where the cache is one of keys and values.
    left = [13 - sum(len(row) < steps for row in expected) for steps in (0, 3, 6)]
    if make_model is tiny_mamba:
        assert rows == [13] * (3 + max(min(len(row) + 1, 8) for row in expected))
    else:
        assert left[2] < left[0]
        assert rows == [left[0]] * 3 + [left[1]] * 3 + [left[2]] * 2


def test_a_lora_adapter_changes_what_is_generated():
    model, prompts = tiny_peft_llama(), some_prompts(6)
    settings = {"pad_token_id": PAD, "eos_token_id": EOS, "max_new_tokens": 8}
    adapted = generate(model, prompts, **settings)
    with model.disable_adapter():
        plain = generate(model, prompts, **settings)
    assert any(left.tolist() != right.tolist() for left, right in zip(adapted, plain, strict=True))


def test_decoding_settings_of_the_checkpoint_are_put_aside_and_given_back():
    model, prompts = tiny_llama(), some_prompts(6)
    expected = [greedy_loop(model, prompt, 8, EOS) for prompt in prompts]
    model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=8,
        suppress_tokens=sorted({token for row in expected for token in row}),
    )  # fmt: skip
    model.train()
    result = generate(model, prompts, pad_token_id=PAD, eos_token_id=EOS, max_new_tokens=8)
    assert [row.tolist() for row in result] == expected
    assert model.generation_config is own and model.training


def test_a_long_prompt_loses_its_start():
    model = tiny_llama()
    prompt = np.random.default_rng(0).integers(2, VOCABULARY, size=100)
    settings = {"pad_token_id": PAD, "eos_token_id": None, "max_new_tokens": 10}
    result = generate(model, [prompt], **settings)
    assert result[0].tolist() == greedy_loop(model, prompt[-54:], 10, None)
    model.config.max_position_embeddings = 30
    result = generate(model, [prompt], **settings)
    assert result[0].tolist() == greedy_loop(model, prompt[-20:], 10, None)


def test_generation_names_what_it_cannot_do():
    model, settings = tiny_llama(), {"pad_token_id": PAD, "eos_token_id": EOS}
    assert generate(model, [], max_new_tokens=4, **settings) == []
    with pytest.raises(ValueError, match=r"number \[1\] have no tokens"):
        generate(model, [np.array([3]), np.array([], dtype=np.int32)], max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="the context has 64 tokens"):
        generate(model, [np.array([3])], max_new_tokens=64, **settings)
