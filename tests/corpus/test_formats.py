"""What the fields of records mean, in the words of the tools that write them: nothing is dropped without a word."""

import csv
import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from prism_assets.corpus.files import read_examples
from prism_assets.corpus.formats import KNOWN_FIELDS
from prism_assets.corpus.formats_page import formats_page
from prism_assets.corpus.records import Message, content_id, messages_from_json, messages_to_json

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = {"prompt": "q", "completion": "a"}


def read(tmp_path, *records, kind="candidate", **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_examples(path, kind, **options)


def only(tmp_path, record, kind="candidate", **options):
    examples, rejects = read(tmp_path, record, kind=kind, **options)
    assert not rejects
    return examples[0]


def refusal(tmp_path, record, kind="candidate"):
    examples, rejects = read(tmp_path, record, kind=kind)
    assert not examples and len(rejects) == 1
    return rejects[0]


def turns(example):
    return [(message.role, message.content, message.learn) for message in example.messages]


# -- do not learn this --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signal",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"trainable": False}, {"learn": False},
     {"loss": False}, {"masked": True}, {"train": "false"}],
)  # fmt: skip
def test_a_turn_that_is_not_to_be_learned_gets_no_loss_and_is_part_of_the_identity(tmp_path, signal):
    messages = [USER, {**ANSWER, **signal}, {"role": "user", "content": "and"}, ANSWER]
    example = only(tmp_path, {"messages": messages})
    assert [message.learn for message in example.messages] == [True, False, True, True]
    assert example.id != only(tmp_path, {"messages": [USER, ANSWER, messages[2], ANSWER]}).id
    assert messages_from_json(messages_to_json(example.messages)) == example.messages


def test_what_follows_the_last_learned_turn_is_in_no_loss_and_goes(tmp_path):
    messages = [USER, ANSWER, {"role": "user", "content": "bye"}, {**ANSWER, "content": "x", "weight": 0}]
    assert turns(only(tmp_path, {"messages": messages})) == [("user", "q", True), ("assistant", "a", True)]
    assert turns(only(tmp_path, {"messages": messages[:3]})) == [("user", "q", True), ("assistant", "a", True)]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight"),
        ({"messages": [USER, {**ANSWER, "mask": 1}]}, "messages[1].mask"),
        ({"messages": [USER, {**ANSWER, "train": True, "weight": 0}]}, "messages[1]"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, "messages[0].train"),
        ({**PLAIN, "label": False}, "label"),
        ({**PLAIN, "label": "False"}, "label"),
        ({**PLAIN, "kto_tag": 0}, "kto_tag"),
        ({**PLAIN, "train": False}, "train"),
        ({**PLAIN, "weight": 0}, "weight"),
        ({"messages": [USER, ANSWER], "mask": "Assistant"}, "mask"),
    ],
)
@pytest.mark.parametrize("kind", ["candidate", "target"])
def test_what_is_not_wanted_is_refused_by_name(tmp_path, record, field, kind):
    assert refusal(tmp_path, record, kind).field == field


@pytest.mark.parametrize("other", [{"label": True}, {"label": 0}, {"kto_tag": 1}, {"weight": 0.3}, {"mask": "User"}])
def test_wanted_rows_and_labels_of_other_kinds_are_taken(tmp_path, other):
    assert only(tmp_path, {**PLAIN, **other}).id == only(tmp_path, PLAIN).id


# -- fields that change the meaning -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_field_is_the_system_turn(tmp_path, name):
    for record in ({"instruction": "q", "output": "a"}, PLAIN, {"messages": [USER, ANSWER]}):
        example = only(tmp_path, {**record, name: "Be brief."})
        assert turns(example)[0] == ("system", "Be brief.", True) and len(example.messages) == 3
        assert name not in json.loads(example.fields)
    other = {"messages": [{"role": "system", "content": "other"}, USER, ANSWER], name: "Be brief."}
    assert refusal(tmp_path, other).field == name


def test_alpacas_history_and_context_are_turns_and_input(tmp_path):
    example = only(tmp_path, {"instruction": "q", "input": "", "output": "a", "history": [["one", "two"]]})
    assert [message.content for message in example.messages] == ["one", "two", "q", "a"]
    dolly = only(tmp_path, {"instruction": "q", "context": "text", "output": "a"})
    assert dolly.id == only(tmp_path, {"instruction": "q", "input": "text", "output": "a"}).id
    assert refusal(tmp_path, {"instruction": "q", "output": "a", "history": ["x"]}).field == "history[0]"


@pytest.mark.parametrize("name", ["context", "documents", "images", "chat_template_kwargs"])
def test_what_is_known_and_not_supported_is_refused_by_name(tmp_path, name):
    assert refusal(tmp_path, {**PLAIN, name: ["x"]}).field == name
    assert only(tmp_path, {**PLAIN, name: [] if name == "images" else ""}).id == only(tmp_path, PLAIN).id


def test_tools_calls_thoughts_and_results_are_part_of_the_conversation(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "sum"},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"},
        ANSWER,
    ]
    example = only(tmp_path, {"messages": messages, "tools": [tool]})
    assert [message.role for message in example.messages] == ["tools", "user", "assistant", "tool", "assistant"]
    assert json.loads(example.messages[0].content) == [tool]
    called = json.loads(example.messages[2].extra)
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert called["reasoning_content"] == "sum"
    assert messages_from_json(messages_to_json(example.messages)) == example.messages
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    other = only(tmp_path, {"conversations": sharegpt, "tools": json.dumps([tool])})
    assert [message.role for message in other.messages] == [message.role for message in example.messages]
    assert len({example.id, other.id, only(tmp_path, {"messages": messages}).id}) == 3


def test_a_conversation_of_plain_turns_keeps_the_identity_that_it_had():
    content = '{"messages":[["user","q"],["assistant","a"]]}'
    messages = [Message("user", "q"), Message("assistant", "a")]
    assert content_id(messages) == hashlib.sha256(content.encode()).hexdigest()[:32]


def test_unknown_fields_are_named_and_known_ones_are_not(tmp_path):
    record = {"messages": [{**USER, "name": "ann"}, ANSWER], "language": "en", "id": 3, "source": "x", "label": True}
    assert only(tmp_path, record).unused == ("language", "messages[].name")


# -- refused without need -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"), [({"a": 1}, '{"id": {"a": 1}}'), (7, "7"), ([1], '{"id": [1]}'), ({}, None)]
)
def test_metadata_costs_no_record(tmp_path, value, name):
    assert only(tmp_path, {**PLAIN, "id": value}).record_id == name


def test_structs_of_nulls_and_missing_inputs_say_nothing(tmp_path):
    empty = {"name": None, "arguments": {"x": None}}
    record = {"messages": [{**USER, "function_call": empty}, {**ANSWER, "function_call": empty, "tool_calls": []}]}
    assert only(tmp_path, record).id == only(tmp_path, PLAIN).id
    assert only(tmp_path, {"instruction": "q", "input": float("nan"), "output": "a"}).id == only(tmp_path, PLAIN).id


# -- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "q", "completion": [ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"instruction": "q", "output": "a"},
    ],
)
def test_every_spelling_of_one_exchange_is_the_same_example(tmp_path, record):
    assert only(tmp_path, record).id == only(tmp_path, PLAIN).id


def test_a_picture_is_refused(tmp_path):
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert refusal(tmp_path, {"messages": [picture, ANSWER]}).field == "messages[0].content[0].type"


def test_a_greeting_is_kept_and_not_learned(tmp_path):
    greeting = {"role": "assistant", "content": "Hello!"}
    assert turns(only(tmp_path, {"messages": [greeting, USER, ANSWER]}))[0] == ("assistant", "Hello!", False)


def test_columns_of_the_settings_name_the_fields(tmp_path):
    record = {"question": "q", "answer": "a", "prompt": "something else", "topic": "t"}
    columns = {"prompt": "question", "completion": "answer", "source": "topic", "id": "absent"}
    example = only(tmp_path, record, columns=columns)
    assert example.id == only(tmp_path, PLAIN).id and example.source == "t"
    assert json.loads(example.fields) == {"prompt": "something else", "topic": "t"}
    _, (reject,) = read(tmp_path, {"question": "q"}, columns=columns)
    assert reject.field == "answer" and "columns" in reject.reason


def test_pairs_of_candidates_are_refused_with_advice(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert "candidates.columns" in refusal(tmp_path, pair).reason
    assert only(tmp_path, pair, columns={"completion": "chosen"}).id == only(tmp_path, PLAIN).id


def test_a_turn_hint_never_names_the_field_itself(tmp_path):
    reject = refusal(tmp_path, {"messages": [{"role": "user", "content": None}, ANSWER]})
    assert reject.reason == "missing"


# -- files --------------------------------------------------------------------------------------------------------


def test_json_types_of_parquet_are_decoded(tmp_path):
    features = Features({"messages": List({"role": Value("string"), "content": Json()}), "meta": Json()})
    rows = {"messages": [[USER, {"role": "assistant", "content": 'say "a"'}]], "meta": [{"a": 1}]}
    data = Dataset.from_dict(rows, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "folder"))
    (arrow,) = (tmp_path / "folder").glob("*.arrow")
    for path in (tmp_path / "a.parquet", arrow):
        (example,), rejects = read_examples(path, "candidate")
        assert not rejects and example.completion_text == 'say "a"'
        assert json.loads(example.fields) == {"meta": {"a": 1}}


def test_arrays_tables_of_text_and_arrow_give_the_rows_of_json_lines(tmp_path):
    records = [{"prompt": f'p{i}, "é"\n', "completion": f"c{i}", "note": "x" * i} for i in range(300)]
    expected, _ = read(tmp_path, *records)
    (tmp_path / "one.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "two.json").write_text("\n".join(map(json.dumps, records)))
    table = pa.Table.from_pylist(records)
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("one.json", "two.json", "a.csv", "a.tsv", "file.arrow"):
        examples, rejects = read_examples(tmp_path / name, "candidate")
        assert not rejects and examples == expected or name.endswith("sv")
        assert [one.id for one in examples] == [one.id for one in expected]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '[{"prompt": "a"}', "closing bracket"),
        ("a.json", '[{"prompt": "a"} {"prompt"', "comma"),
        ("a.json", '[{"prompt": tru}]', "no valid JSON"),
        ("a.json", "3", "no JSON array"),
        ("a.jsonl", '[\n{"prompt": "a", "completion": "b"},\n{"prompt": "c", "completion": "d"}\n]', "name it .json"),
        ("a.jsonl", '{\n"prompt": "a"\n}', "several lines"),
        ("a.csv", "prompt,prompt\na,b\n", "different name"),
        ("a.csv", 'prompt,completion\na,"b\n', "well-formed"),
        ("a.arrow", "no arrow at all", "Arrow"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_with_advice(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(Exception, match=words):
        read_examples(tmp_path / name, "candidate")


def test_utf_16_without_a_mark_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(PLAIN).encode("utf-16-le"))
    with pytest.raises(Exception, match="UTF-16"):
        read_examples(tmp_path / "a.jsonl", "candidate")


def test_a_row_of_csv_with_too_many_cells_is_a_reject_with_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",c\nd,e,f\n\ng,h\n')
    examples, rejects = read_examples(tmp_path / "a.csv", "candidate")
    assert [(one.line, one.prompt_text) for one in examples] == [(2, "a\nb"), (6, "g")]
    assert [one.line for one in rejects] == [4]


def test_parquet_of_the_type_json_by_its_logical_type_alone(tmp_path):
    table = pa.table({"messages": pa.array([json.dumps([USER, ANSWER])], pa.json_())})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    (example,), _ = read_examples(tmp_path / "a.parquet", "candidate")
    assert example.completion_text == "a"


def test_the_page_of_formats_is_made_from_the_code_and_names_every_field():
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    assert page.read_text(encoding="utf-8") == formats_page(), "python -m prism_assets.corpus.formats_page writes it"
    named = set(re.findall(r"`([^`]+)`", formats_page()))
    assert KNOWN_FIELDS <= named


def test_a_text_is_one_turn_without_a_prompt(tmp_path):
    example = only(tmp_path, {"text": "Once upon a time.", "id": 3})
    assert example.messages == (Message("text", "Once upon a time."),)
    assert (example.prompt_text, example.completion_text) == ("", "Once upon a time.")
    assert messages_from_json(messages_to_json(example.messages)) == example.messages
    # Alpaca's rows hold the whole prompt once more as `text`, which is not what they are.
    alpaca = only(tmp_path, {"instruction": "q", "output": "a", "text": "Below is an instruction"})
    assert [one.role for one in alpaca.messages] == ["user", "assistant"] and alpaca.unused == ("text",)


@pytest.mark.parametrize(
    "beside",
    [{"prompt": "q"}, {"completion": "a"}, {"system": "s"}, {"instruction": "i"}, {"tools": [{"name": "f"}]},
     {"rejected": "r"}, {"history": [["a", "b"]]}],
)  # fmt: skip
def test_what_a_text_has_no_place_for_is_refused_beside_it(tmp_path, beside):
    reject = refusal(tmp_path, {"text": "a b c", **beside})
    assert reject.field == next(iter(beside)) and "beside 'text'" in reject.reason


def test_a_column_is_named_as_the_text(tmp_path):
    (example,), _ = read(tmp_path, {"body": "words"}, columns={"text": "body"})
    assert example.completion_text == "words"
