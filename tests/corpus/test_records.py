import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_assets.corpus.files import data_extension, read_examples
from prism_assets.corpus.records import (
    Example,
    Message,
    messages_to_json,
)
from prism_assets.errors import MixedTargets, UnreadableFile


def write(path, *records):
    """JSON Lines; a str or bytes record is written as it is."""
    lines = [
        record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
        for record in records
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def only_reject(path, kind="candidate"):
    examples, rejects = read_examples(path, kind)
    assert [example.prompt_text for example in examples] == ["kept"]
    assert len(rejects) == 1
    return rejects[0]


KEPT = {"prompt": "kept", "completion": "fine"}


def test_prompt_and_completion_become_one_exchange_with_the_record_s_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": 7, "source": "s/x", "prompt": "2+2", "completion": " 4 ", "rejected": 3})
    (example,), rejects = read_examples(path, "candidate")
    assert rejects == []  # a candidate's `rejected` is a field like any other
    assert example.messages == (Message("user", "2+2"), Message("assistant", " 4 "))
    assert (example.record_id, example.source, example.line, example.rejected) == ("7", "s/x", 1, None)
    assert (example.prompt_text, example.completion_text) == ("2+2", " 4 ")


def test_the_four_layouts_of_one_exchange_have_one_id_and_parquet_agrees(tmp_path):
    turns = [("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    layouts = [
        {"prompt": "Add.\n\n1 and 2", "completion": "3"},
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"conversations": [{"from": "human", "value": turns[0][1]}, {"from": "gpt", "value": "3"}]},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add.\n\n1 and 2", "input": "", "output": "3"},
    ]
    canonical = json.dumps({"messages": [list(turn) for turn in turns]}, separators=(",", ":"))
    expected = hashlib.sha256(canonical.encode()).hexdigest()[:32]
    for number, record in enumerate(layouts):
        (line,), _ = read_examples(write(tmp_path / f"{number}.jsonl", record), "candidate")
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / f"{number}.parquet")
        (row,), _ = read_examples(tmp_path / f"{number}.parquet", "candidate")
        assert line.id == row.id == expected


def test_an_id_ignores_labels_but_not_roles_boundaries_or_rejected():
    base = Example.create([Message("user", "a"), Message("assistant", "bc")])
    assert base.id == Example.create(base.messages, source="s", record_id="r", line=9, group="g").id
    others = [
        Example.create([Message("user", "ab"), Message("assistant", "c")]),
        Example.create([Message("system", "a"), Message("assistant", "bc")]),
        Example.create([Message("user", 'a"],["assistant","b'), Message("assistant", "c")]),
        Example.create(base.messages, rejected="x"),
    ]
    assert len({base.id, *(other.id for other in others)}) == 5
    assert others[-1].conversation_id == base.id


def test_conversations_keep_their_turns(tmp_path):
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    (example,), _ = read_examples(write(tmp_path / "a.jsonl", {"prompt": "id", "messages": messages}), "candidate")
    assert list(example.messages) == [Message(m["role"], m["content"]) for m in messages]
    assert example.completion_text == "4"
    assert "assistant: hello" in example.prompt_text and "user: 2+2?" in example.prompt_text
    turns = [{name: message[name] for name in ("role", "content")} for message in messages]
    assert json.loads(messages_to_json(example.messages)) == turns


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL.GZ", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    records = [{"prompt": f"p{i}\u2028é", "completion": f"c{i}"} for i in range(3000)]
    path = tmp_path / name
    raw = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode("utf-8-sig")
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    elif name.endswith("zst"):
        path.write_bytes(pa.compress(raw, "zstd", asbytes=True))
    else:  # two gzip members, as `cat a.gz b.gz` makes
        # And zeros at the end, as tapes and some object stores pad.
        members = gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]) + bytes(512)
        path.write_bytes(members if name.endswith("GZ") else raw)
    examples, rejects = read_examples(path, "candidate")
    assert rejects == []
    assert [(e.prompt_text, e.completion_text) for e in examples] == [(r["prompt"], r["completion"]) for r in records]
    assert [example.line for example in examples] == list(range(1, 3001))


def test_blank_lines_count_as_lines_but_not_as_records(tmp_path):
    examples, rejects = read_examples(write(tmp_path / "a.jsonl", "", "  \t", KEPT, ""), "candidate")
    assert [example.line for example in examples] == [3] and rejects == []


BAD_RECORDS = [
    ('{"prompt": "a", "completion": }', "", "invalid JSON at column 31"),
    ('["a", "b"]', "", "an array, not an object"),
    ("3", "", "a number, not an object"),
    (b'{"prompt": "a", "completion": "\xff"}', "", "invalid UTF-8 at byte 32"),
    ('{"prompt": "a", "prompt": "b", "completion": "c"}', "prompt", "given twice"),
    ("[" * 100_000, "", "invalid JSON"),
    ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}", "", "invalid JSON"),
    ({"prompt": "a"}, "completion", "missing; a record with 'prompt' needs it"),
    ({"prompt": "a", "completion": None}, "completion", "missing"),
    ({"prompt": "a", "completions": "b"}, "completion", "the record has 'completions'"),
    ({"Prompt": "a", "Completion": "b"}, "prompt", "the record has 'Prompt'"),
    ({"instruction": "a", "ouput": "b"}, "output", "the record has 'ouput'"),
    ({"mesages": []}, "messages", "the record has 'mesages'"),
    ({"question": "a", "reply": "b"}, "prompt", "'question', 'reply'"),
    ({}, "prompt", "this one has nothing"),
    ({"prompt": "a", "safe": "b", "unsafe": "c"}, "completion", "missing"),  # pairs are for targets
    ({"prompt": "a", "completion": ""}, "completion", "empty"),
    ({"prompt": "a", "completion": " \n\u3000"}, "completion", "white space"),
    ({"prompt": "  ", "completion": "b"}, "prompt", "white space"),
    ({"instruction": "a", "output": ""}, "output", "empty"),
    ({"prompt": ["a"], "completion": "b"}, "prompt", "an array, not a string"),
    ({"prompt": "a", "completion": 4}, "completion", "a number, not a string"),
    ({"prompt": "a", "completion": True}, "completion", "a boolean, not a string"),
    ('{"prompt": "a", "completion": "b\\ud83d"}', "completion", "a lone surrogate at character 2"),
    ({"messages": "a"}, "messages", "a string, not an array"),
    ({"messages": []}, "messages", "an empty conversation"),
    ({"messages": ["a"]}, "messages[0]", "a string, not an object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].content", "the turn has 'contents'"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "unknown role 'bot'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages", "ends in a user turn"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "no user turn before"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
        "messages[1].content",
        "white space",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "tool_calls": [{}]},
            ]
        },
        "messages[1].tool_calls",
        "without its name",
    ),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations[0].from", "known are human, gpt"),
]


@pytest.mark.parametrize(("record", "field", "reason"), BAD_RECORDS)
def test_a_bad_record_is_rejected_with_line_field_and_reason(tmp_path, record, field, reason):
    reject = only_reject(write(tmp_path / "a.jsonl", "", record, KEPT))
    assert (reject.line, reject.field) == (2, field)
    assert reason in reject.reason
    start = record if isinstance(record, str) else json.dumps(record) if isinstance(record, dict) else "{"
    assert reject.excerpt[:100] == start[:100] if not isinstance(record, bytes) else reject.excerpt.startswith(start)
    assert len(reject.excerpt.encode("utf-8")) < 1000


@pytest.mark.parametrize(
    ("added", "field", "reason"),
    [
        ({"rejected": ""}, "rejected", "empty"),
        ({"rejected": ["x"]}, "rejected", "an array"),
        ({"rejected": "b"}, "rejected", "equals the completion"),
        ({"answer": True}, "answer", "a boolean"),
        ({"answers": {"text": "x"}}, "answers", "an object"),
        ({"answers": ["x", " "]}, "answers", "white space"),
        ({"group": []}, "group", "an array"),
    ],
)
def test_target_fields_are_validated_for_targets_and_ignored_for_candidates(tmp_path, added, field, reason):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"} | added, KEPT)
    reject = only_reject(path, "target")
    assert (reject.line, reject.field) == (1, field) and reason in reject.reason
    assert len(read_examples(path, "candidate")[0]) == 2


def test_mixed_targets_name_the_first_line_of_each_kind(tmp_path):
    pair = {"prompt": "q", "completion": "a", "rejected": "b"}
    path = write(tmp_path / "t.jsonl", {"x": 1}, KEPT | {"rejected": None}, KEPT, pair)
    with pytest.raises(MixedTargets, match=r"t\.jsonl: line 2 is a plain record and line 4 a pair") as caught:
        read_examples(path, "target")
    assert (caught.value.plain_line, caught.value.pair_line) == (2, 4)
    assert len(read_examples(path, "candidate")[0]) == 2
    mixed, _ = read_examples(path, "target", mixed=True)
    assert [example.rejected for example in mixed] == [None, "b"]


USER = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "ab")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "completion": "a", "rejected": "b"},
        {"prompt": "q", "safe": "a", "unsafe": "b"},
    ],
)
def test_preferences_in_every_layout_of_trl_are_one_pair(tmp_path, record):
    (example,), rejects = read_examples(write(tmp_path / "t.jsonl", record), "target")
    assert not rejects
    assert example == Example.create([Message("user", "q"), Message("assistant", "a")], "b", line=1)


def test_what_is_chosen_may_follow_a_whole_conversation(tmp_path):
    turns = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "first"}, USER]
    record = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    (example,), _ = read_examples(write(tmp_path / "t.jsonl", record), "eval")
    assert [message.role for message in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (example.completion_text, example.rejected) == ("a", "b")


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "prompt", "missing"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "rejected", "write both alike"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "prefers nothing"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "chosen", "white space"),
        ({"prompt": "q", "chosen": [], "rejected": []}, "chosen", "empty conversation"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "rejected", "before its last turn"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen", "ends in a user turn"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "chosen", "no user turn"),
        ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, "prompt[0].content", "missing"),
    ],
)
def test_a_preference_that_is_none_names_the_field(tmp_path, record, field, reason):
    reject = only_reject(write(tmp_path / "t.jsonl", record, KEPT), "target")
    assert reject.field == field and reason in reject.reason


def test_choices_are_kept_with_the_completion_among_them(tmp_path):
    record = {"prompt": "q", "completion": "7", "choices": [5, "6", "7"]}
    (example,), rejects = read_examples(write(tmp_path / "t.jsonl", record), "eval")
    assert not rejects and example.choices == ("5", "6", "7")


@pytest.mark.parametrize(
    ("choices", "reason"),
    [("abc", "not an array"), (["a", "a", "7"], "twice"), (["5", "6"], "lacks the completion '7'"), (["7"], "alone"),
     (["7", " "], "white space"), (["7", ["x"]], "not a string")],
)  # fmt: skip
def test_choices_that_offer_no_choice_are_refused(tmp_path, choices, reason):
    record = {"prompt": "q", "completion": "7", "choices": choices}
    reject = only_reject(write(tmp_path / "t.jsonl", record, KEPT), "target")
    assert reject.field == "choices" and reason in reject.reason


def test_pairs_and_answers(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "safe": "yes", "unsafe": "no", "group": 3, "answer": 18.0},
        {"prompt": "p", "completion": "yes", "rejected": "never", "answers": ["x", 0.5, "x"], "answer": "y"},
    )
    for kind in ("target", "eval"):
        examples, rejects = read_examples(path, kind)
        assert rejects == []
        assert [(e.completion_text, e.rejected) for e in examples] == [("yes", "no"), ("yes", "never")]
        assert [e.group for e in examples] == ["3", None]
        assert [e.answers for e in examples] == [("18",), ("y", "x", "0.5")]
        assert examples[0].id != examples[1].id and examples[0].conversation_id == examples[1].conversation_id


def test_the_first_of_equal_records_is_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", KEPT | {"id": "1"}, {"instruction": "kept", "output": "fine"}, 5, KEPT)
    examples, rejects = read_examples(path, "candidate")
    assert [example.record_id for example in examples] == ["1"]
    assert [(r.line, r.reason.split(",")[0]) for r in rejects] == [
        (2, "duplicate of line 1"),
        (3, "a number"),
        (4, "duplicate of line 1"),
    ]


def test_a_parquet_row_is_rejected_by_its_number_and_other_columns_do_not_matter(tmp_path):
    table = pa.table(
        {
            "prompt": ["kept"] + ["q"] * 4,
            "completion": pa.array(["fine", None, "", "bad", "é" * 200], pa.large_string()),
            "embedding": pa.array([[1.0]] * 5),
        }
    )
    # Arrow trusts that strings are UTF-8: change a byte of the row "bad".
    buffers = table["completion"].chunk(0).buffers()
    data = bytearray(buffers[2].to_pybytes())
    data[data.index(b"bad")] = 0xFF
    column = pa.Array.from_buffers(pa.large_string(), 5, [buffers[0], buffers[1], pa.py_buffer(bytes(data))])
    pq.write_table(table.set_column(1, "completion", column), tmp_path / "a.parquet")
    examples, rejects = read_examples(tmp_path / "a.parquet", "candidate")
    assert [example.line for example in examples] == [1, 5]
    assert [(r.line, r.field) for r in rejects] == [(2, "completion"), (3, "completion"), (4, "")]
    assert "UTF-8" in rejects[2].reason
    assert json.loads(rejects[1].excerpt) == {"prompt": "q", "completion": ""}


def test_parquet_without_known_columns_says_which_it_has(tmp_path):
    pq.write_table(pa.table({"promt": ["a", "b"], "completion": ["x", "y"]}), tmp_path / "a.parquet")
    examples, rejects = read_examples(tmp_path / "a.parquet", "candidate")
    assert examples == [] and [r.line for r in rejects] == [1, 2]
    assert "the record has 'promt'" in rejects[0].reason
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "b.parquet")
    examples, rejects = read_examples(tmp_path / "b.parquet", "candidate")
    assert examples == [] and len(rejects) == 2 and "'x'" in rejects[0].reason


GOOD_LINES = b"".join(b'{"prompt": "%d", "completion": "x"}\n' % i for i in range(2000))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "no records"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no records"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", b"plain text", "gzip"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINES, mtime=0) + b"\0\0more", "gzip"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINES, mtime=0)[:-2000], "gzip"),
        ("a.jsonl.zst", pa.compress(GOOD_LINES, "zstd", asbytes=True)[:-10], "zstd"),
        ("a.parquet", b"PAR1 this is none PAR1", "Parquet"),
        ("a.txt", b"a,b", "unknown extension; known are .jsonl"),
        ("a.json", b"[]", "no records"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_advice(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        read_examples(path, "candidate")
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_a_directory_an_absent_file_and_an_empty_table_cannot_be_read(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "d.jsonl").mkdir()
    for name, reason in (
        ("empty.parquet", "no records"),
        ("d.jsonl", "directory"),
        ("none.jsonl", "does not exist"),
    ):
        with pytest.raises(UnreadableFile, match=reason):
            read_examples(tmp_path / name, "eval")


def test_extensions():
    assert data_extension("x.Jsonl.ZST") == ".jsonl.zst" and data_extension("x.parquet") == ".parquet"
    assert data_extension("x.gz") is None and data_extension("jsonl") is None


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=8, unique=True), st.booleans())
def test_any_text_survives_reading(tmp_path_factory, records, ascii_only):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=ascii_only) for p, c in records]
    path.write_bytes("\n".join(lines).encode())
    examples, rejects = read_examples(path, "candidate")
    assert [(e.prompt_text, e.completion_text) for e in examples] == records and rejects == []
    assert len({example.id for example in examples}) == len(records)
