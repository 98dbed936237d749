"""Anchors: which unwanted answer each kind gives an example, and the pairs that come of it."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import prism_assets.demo
from prism_assets.corpus.anchors import (
    ALONE,
    EMPTY,
    EQUAL,
    NO_CHOICES,
    Anchor,
    anchored,
    checked,
    other_choices,
    shuffled,
    without_anchors,
)
from prism_assets.corpus.encoder import Encoder
from prism_assets.corpus.records import Example, Message, content_id
from prism_assets.corpus.target_set import target_set
from prism_assets.corpus.token_tables import TARGET_SCHEMA, choices_of, encode_all, to_table


@pytest.fixture(scope="module")
def encoder():
    """A token for each character."""
    model = Path(prism_assets.demo.__file__).parent / "model"
    return Encoder(AutoTokenizer.from_pretrained(model), max_length=24)


def example(prompt, completion, rejected=None, **fields):
    return Example.create([Message("user", prompt), Message("assistant", completion)], rejected, **fields)


def table_of(encoder, *examples):
    tokenized, rejects = encode_all(examples, encoder)
    assert not rejects
    return to_table(examples, tokenized, TARGET_SCHEMA)


def test_shuffled_takes_the_answer_of_another_example_whatever_the_order_of_the_file():
    ids, completions = [f"id{n}" for n in range(9)], [f"answer {n}" for n in range(9)]
    found = shuffled(completions, ids)
    assert [one.position for one in found] == list(range(9))
    assert sorted(one.text for one in found) == sorted(completions)  # a permutation without a fixed point
    assert all(one.text != completions[one.position] for one in found)
    order = list(range(9))
    random.Random(0).shuffle(order)
    again = shuffled([completions[n] for n in order], [ids[n] for n in order])
    assert {ids[order[one.position]]: one.text for one in again} == {ids[one.position]: one.text for one in found}


def test_shuffled_skips_equal_answers_and_says_where_there_is_no_other():
    found = shuffled(["B", "B", "A"], ["x", "y", "z"])
    assert [one.text for one in found][:2] == ["A", "A"] and found[2].text == "B"
    assert shuffled(["B", "B"], ["x", "y"]) == [Anchor(0, why_not=ALONE), Anchor(1, why_not=ALONE)]


def test_every_other_choice_is_an_anchor():
    found = other_choices(["b", "x"], [["a", "b", "c"], []])
    assert found == [Anchor(0, "a"), Anchor(0, "c"), Anchor(1, why_not=NO_CHOICES)]


def test_empty_and_equal_answers_are_no_anchors():
    found = checked(["a b", "a", "a"], [" a  b", " ", "c"])
    assert found == [Anchor(0, why_not=EQUAL), Anchor(1, why_not=EMPTY), Anchor(2, "c")]


def test_examples_become_the_pairs_that_their_records_would_have_been(encoder):
    given = example("one", "two", "three", line=1)
    table = table_of(encoder, given, example("four", "five", line=2), example("six", "seven", line=3))
    asked = []

    def anchors(rows):
        asked.extend(rows["completion"].to_pylist())
        return [Anchor(0, "eight"), Anchor(0, "nine"), Anchor(1, why_not=EQUAL)]

    found = anchored(table, "choices", anchors, encoder)
    assert asked == ["five", "seven"]
    assert found.kinds == {"given": 1, "choices": 2} and found.left_out == {EQUAL: 1}
    assert found.table["anchor"].to_pylist() == ["given", "choices", "choices"]
    expected = table_of(encoder, given, *(example("four", "five", text, line=2) for text in ("eight", "nine")))
    assert found.table.drop_columns("anchor").to_pylist() == expected.to_pylist()
    pairs = target_set(found.table)
    assert pairs.pairs and pairs.size == 3


def test_a_prompt_is_cut_alike_for_both_answers(encoder):
    prompt = " ".join(["far"] * 40)
    found = anchored(
        table_of(encoder, example(prompt, "a")), "shuffled", lambda rows: [Anchor(0, "much longer answer")], encoder
    )
    row = found.table.to_pylist()[0]
    prompts = [
        [token for token, supervised in zip(row[f"{side}input_ids"], row[f"{side}loss_mask"], strict=True)
         if not supervised]
        for side in ("", "rejected_")
    ]  # fmt: skip
    assert prompts[0] == prompts[1] and len(row["rejected_input_ids"]) == 24


def test_an_anchor_that_does_not_fit_is_left_out_with_its_reason(encoder):
    found = anchored(table_of(encoder, example("q", "a")), "generated", lambda rows: [Anchor(0, "w " * 60)], encoder)
    (reason,) = found.left_out
    assert "max_length" in reason and found.table.num_rows == 0


def test_without_anchors_pairs_are_plain_targets(encoder):
    table = without_anchors(table_of(encoder, example("q", "a", "b"), example("r", "c", "d")))
    plain = target_set(table)
    assert not plain.pairs and plain.size == 2
    assert table["id"].to_pylist() == [
        content_id([Message("user", prompt), Message("assistant", answer)])
        for prompt, answer in (("q", "a"), ("r", "c"))
    ]


def test_choices_are_a_column_only_where_there_are_some(encoder):
    plain, chosen = example("q", "a"), example("r", "b", choices=("b", "c"))
    assert "choices" not in table_of(encoder, plain).column_names
    table = table_of(encoder, plain, chosen)
    assert choices_of(table) == [[], ["b", "c"]]
    assert choices_of(table_of(encoder, plain)) == [[]]
