"""What `benchmarks.fuzz` found: files and records that once ended the process, or passed for something else."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_assets.corpus.files import read_examples
from prism_assets.corpus.records import Message
from prism_assets.errors import UnreadableFile

TURNS = (Message("user", "a"), Message("assistant", "b"))
GOOD = {"prompt": "a", "completion": "b"}


def read_lines(folder, *records, kind="candidate"):
    """The examples and rejects of JSON Lines; a str is written as it is."""
    path = folder / "a.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return read_examples(path, kind)


@pytest.mark.parametrize("rows_of_a_group", [1, 2, 3, 1000])
def test_conversations_of_parquet_are_read_whatever_the_size_of_a_row_group(tmp_path, rows_of_a_group):
    """`datasets` writes 1,000 rows a group: a batch of 1,024 begins in one and ends in the next."""
    count = 3000 if rows_of_a_group == 1000 else 7
    rows = [
        {"messages": [{"role": "user", "content": f"{n % 5}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=rows_of_a_group)
    examples, rejects = read_examples(tmp_path / "a.parquet", "candidate")
    assert [one.completion_text for one in examples] == [str(number) for number in range(count)] and rejects == []
    assert [one.line for one in examples] == list(range(1, count + 1))


def test_two_styles_of_turns_in_one_column_of_a_table(tmp_path):
    """There each turn has the fields of all: a null `role` beside `from` is no role."""
    styles = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}],
        [{"role": "user", "content": [{"text": "e"}, {"type": "text", "text": "f"}]}, {"from": "gpt", "value": "g"}],
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": one} for one in styles[:2]]), tmp_path / "a.parquet")
    examples, rejects = read_examples(tmp_path / "a.parquet", "candidate")
    assert [one.messages for one in examples] == [TURNS, (Message("user", "c"), Message("assistant", "d"))]
    assert rejects == []
    parts = [{"role": "user", "content": [{"text": "e"}, {"type": "text", "text": "f"}]}]
    pq.write_table(pa.Table.from_pylist([{"prompt": parts, "completion": "g"}]), tmp_path / "b.parquet")
    (example,), rejects = read_examples(tmp_path / "b.parquet", "candidate")
    assert example.prompt_text == "ef"


@pytest.mark.parametrize("kind", ["candidate", "target"])
def test_rows_of_a_table_without_a_known_column_are_counted(tmp_path, kind):
    pq.write_table(pa.table({"score": [1, 2]}), tmp_path / "a.parquet")
    examples, rejects = read_examples(tmp_path / "a.parquet", kind)
    assert examples == [] and [one.line for one in rejects] == [1, 2]


def test_half_a_character_in_a_name_or_a_tool_costs_the_record_and_no_more(tmp_path):
    call = {"name": "f", "arguments": {"x": "\ud800"}}
    bad = [
        '{"prompt": "a", "completion": "b", "\\ud800": 1, "\\ud800": 2}',
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]},
        {**GOOD, "tools": [{"name": "\ud800"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "\ud800", "content": "b"}]},
    ]
    examples, rejects = read_lines(tmp_path, *bad, GOOD)
    assert [one.messages for one in examples] == [TURNS] and len(rejects) == len(bad)
    pa.array([text for one in rejects for text in one[1:]]).validate(full=True)  # they can be stored


@pytest.mark.parametrize("depth", [65, 300, 600, 990, 5000])
@pytest.mark.parametrize("name", ["tools", "history", "messages"])
def test_depth_counts_inside_of_a_json_text_too(tmp_path, name, depth):
    inner = "[" * depth + "]" * depth
    record = GOOD if name != "messages" else {}
    tools = f'[{{"name": "f", "parameters": {inner}}}]'
    _, rejects = read_lines(tmp_path, {**record, name: tools if name == "tools" else inner})
    assert len(rejects) == 1 and ("within each other" in rejects[0].reason or "too deeply" in rejects[0].reason)


def test_a_name_given_twice_inside_of_a_json_text_costs_the_record(tmp_path):
    turns = '[{"role": "user", "role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]'
    _, rejects = read_lines(tmp_path, {"messages": turns})
    assert [(one.field, one.reason[:11]) for one in rejects] == [("role", "given twice")]
    column = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array([turns]))
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    _, rejects = read_examples(tmp_path / "a.parquet", "candidate")
    assert [(one.field, one.reason[:11]) for one in rejects] == [("role", "given twice")]


def test_a_number_of_very_many_digits_costs_its_record_in_an_array_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"prompt": "a", "completion": {"9" * 5000}}}, {json.dumps(GOOD)}]')
    examples, rejects = read_examples(path, "candidate")
    assert [one.line for one in examples] == [2] and "4300 digits" in rejects[0].reason


@pytest.mark.parametrize(("name", "cell"), [("weight", "0"), ("kto_tag", "0.0"), ("weight", " 0 ")])
def test_a_weight_of_zero_counts_in_a_table_of_texts(tmp_path, name, cell):
    (tmp_path / "a.csv").write_text(f"prompt,completion,{name}\na,b,{cell}\nc,d,1\n")
    examples, rejects = read_examples(tmp_path / "a.csv", "candidate")
    assert [one.prompt_text for one in examples] == ["c"] and [one.field for one in rejects] == [name]


def test_an_array_over_several_lines_is_no_json_lines_however_it_begins(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff [ " + ",\n ".join(json.dumps(one) for one in [GOOD, {**GOOD, "prompt": "c"}, GOOD]) + "]")
    with pytest.raises(UnreadableFile, match="JSON array over several lines"):
        read_examples(path, "candidate")


@pytest.mark.parametrize("level", [0, 9])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_compressed_file_without_its_extension_gives_no_rows(tmp_path, name, level):
    """What compression leaves as it is looks like lines."""
    content = gzip.compress(f"{json.dumps(GOOD)}\n".encode() * 3, level)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UnreadableFile, match="compressed by gzip"):
        read_examples(tmp_path / name, "candidate")


# -- Arrow, which takes lengths from a file as they are ------------------------------------------------------------

READER = """
import sys
from prism_assets.corpus.files import read_examples
from prism_assets.errors import UnreadableFile
try:
    print(len(read_examples(sys.argv[1], "candidate")[0]))
except UnreadableFile as error:
    print(error.reason)
"""


def arrow_bytes(rows, new=pa.ipc.new_stream):
    table, out = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("record", [GOOD, {"messages": [turn.as_turn() for turn in TURNS]}])
def test_a_damaged_offset_of_an_arrow_file_refuses_it_and_ends_no_process(tmp_path, new, record):
    content = bytearray(arrow_bytes([record] * 3, new))
    at = content.index(b"\x01\0\0\0\x02\0\0\0\x03\0\0\0")
    content[at + 3] = 0x7F  # the first text ends far behind the buffer
    (tmp_path / "a.arrow").write_bytes(content)
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path / "a.arrow")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("is not a whole Arrow file")


def test_rows_of_an_arrow_file_that_are_not_utf_8_still_cost_themselves_alone(tmp_path):
    content = arrow_bytes([GOOD, {"prompt": "QQ", "completion": "x"}]).replace(b"aQQ", b"a\xffQ")
    (tmp_path / "a.arrow").write_bytes(content)
    examples, rejects = read_examples(tmp_path / "a.arrow", "candidate")
    assert [one.line for one in examples] == [1] and "invalid UTF-8" in rejects[0].reason


def test_arrow_columns_without_values_inside_of_lists_are_sound(tmp_path):
    turns = [{**turn.as_turn(), "name": None} for turn in TURNS]
    content = arrow_bytes([{"messages": turns}, {"messages": turns[:1] * 3 + turns[1:]}])
    (tmp_path / "a.arrow").write_bytes(content)
    assert len(read_examples(tmp_path / "a.arrow", "candidate")[0]) == 2


def test_a_length_beyond_the_end_of_an_arrow_file_asks_for_no_memory(tmp_path):
    """Of a message of 64 TiB as of one whose name of a column is no text."""
    content = arrow_bytes([GOOD])
    batch = content.index(b"\xff\xff\xff\xff", 4)
    body = len(content) - 8 - batch - 8 - int.from_bytes(content[batch + 4 : batch + 8], "little")
    at = content.index(body.to_bytes(8, "little"), batch)
    (tmp_path / "a.arrow").write_bytes(content[:at] + (2**46).to_bytes(8, "little") + content[at + 8 :])
    (tmp_path / "b.arrow").write_bytes(content.replace(b"prompt", b"pro\xffpt"))
    for name in ("a.arrow", "b.arrow"):
        with pytest.raises(UnreadableFile, match="not a whole Arrow file"):
            read_examples(tmp_path / name, "candidate")


# -- anything at all ----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["prompt", "completion", "messages", "instruction", "output", "input", "text", "system"])
NAMES |= st.sampled_from(["tools", "history", "weight", "id", "source", "chosen", "rejected", "answers", "choices"])
NAMES |= st.sampled_from(["role", "content", "from", "value", "tool_calls", "type", "name", "arguments"]) | st.text()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20)
SCALARS |= st.sampled_from(["user", "assistant", "system", "human", "gpt", "text", "a", "[", '[{"role": "user"}]'])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=6), min_size=1, max_size=6), st.sampled_from([*"ct"]))
def test_every_record_is_accepted_or_rejected_and_can_be_stored(tmp_path_factory, records, kind):
    found = tmp_path_factory.mktemp("any") / "a.jsonl"
    found.write_text("".join(json.dumps(one) + "\n" for one in records))
    examples, rejects = read_examples(found, {"c": "candidate", "t": "target"}[kind], mixed=True)
    lines = sorted([one.line for one in examples] + [one.line for one in rejects])
    assert lines == list(range(1, len(records) + 1))
    texts = [text for one in rejects for text in one[1:]]
    texts += [turn.content + turn.extra for one in examples for turn in one.messages]
    assert "".join(texts).encode() is not None and all(one.reason for one in rejects)
