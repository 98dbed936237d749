"""What a record holds beside its conversation is kept, a row for each candidate row, and changes nothing else."""

import base64
import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_assets.catalog.sql import ask, connect
from prism_assets.corpus import formats
from prism_assets.corpus.files import read_examples
from prism_assets.ops.pipeline import steps_of


def fields_of(path):
    examples, rejects = read_examples(path, "candidate")
    assert not rejects
    return [json.loads(one.fields) for one in examples]


@pytest.mark.parametrize(
    "conversation",
    [
        {"prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_all_but_the_conversation_is_kept_as_it_was(tmp_path, conversation):
    other = {"id": 7, "source": "web", "tags": ["x", {"é": None}], "score": 0.5, "open": True, "note": "\ud800 \u2028"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**conversation, **other, "nothing": None}) + "\n")
    assert fields_of(path) == [other]


def test_values_of_parquet_that_json_lacks_are_text(tmp_path):
    day = datetime.date(2024, 5, 17)
    columns = {
        "prompt": pa.array(["q"]),
        "completion": pa.array(["a"]),
        "day": pa.array([day]),
        "seen": pa.array([1], pa.timestamp("ns", "UTC")),
        "price": pa.array([decimal.Decimal("1.50")]),
        "file": pa.array([{"bytes": b"\x00\xff", "path": None}]),
        "loss": pa.array([float("nan")]),
        "times": pa.array([[3]], pa.list_(pa.time64("ns"))),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (found,) = fields_of(tmp_path / "a.parquet")
    assert found["day"] == day.isoformat() and found["price"] == "1.50" and found["loss"] == "nan"
    assert base64.b64decode(found["file"]["bytes"]) == b"\x00\xff"
    assert found["seen"].startswith("1970-01-01 00:00:00.000000001") and found["times"] == ["00:00:00.000000003"]


def test_each_row_has_its_own_fields_and_lakes_from_before_get_them_with_nothing_else_made(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    rows = [{"prompt": f"copy: {word}=", "completion": word, "language": word * 2} for word in ("ab", "cd", "ef")]
    path = project.add("more", [rows[0], "{", rows[0], rows[1], {**rows[2], "completion": "é"}, rows[2]])
    steps = [step for step in steps_of("run") if step.title in ("Base model", "Candidates")]
    project.run_steps(steps)
    stage = project.stage
    with connect(project.lake) as connection:
        query = """SELECT f.fields->>'language', f.line, c.line FROM candidates c
                   JOIN candidate_fields f USING (shard, row, id, version) WHERE shard LIKE 'more-%' ORDER BY row"""
        assert ask(connection, query).rows == [("abab", 1, 1), ("cdcd", 4, 4), ("efef", 6, 6)]
    before = {one.fingerprint: one.content_hash for one in stage.lake.artifacts("candidates")}
    for one in list(stage.lake.artifacts("candidate_fields")):
        stage.lake.local(one).unlink()
    made = {step.step.title: step.computed for step in project.run_steps(steps)}
    assert made["Candidates"] == 3  # a table of fields for each of the three files
    assert {one.fingerprint: one.content_hash for one in stage.lake.artifacts("candidates")} == before
    assert path.exists() and {one.notes["rows"] for one in stage.lake.artifacts("candidate_fields")} == {3, 20}
    assert project.run_steps(steps)[-1].computed == 0


def test_rows_of_an_earlier_reading_stay_where_todays_gives_the_same_and_are_read_again_elsewhere(
    make_project, tmp_path, monkeypatch
):
    project = make_project(tmp_path / "project")
    unwanted = {"prompt": "copy: xy=", "completion": "no", "label": False}
    project.add("kto", [{"prompt": "copy: ab=", "completion": "ab"}, unwanted])
    steps = [step for step in steps_of("run") if step.title in ("Base model", "Candidates")]
    with monkeypatch.context() as before:
        before.setattr(formats, "_require_wanted", lambda record: None)
        project.run_steps(steps)
    stage = project.stage
    for one in list(stage.lake.artifacts("candidate_fields")):  # there were none
        stage.lake.local(one).unlink()
    heads = {head["partition"]: head["fingerprint"] for head in stage.lake.heads("candidates")}
    project.run_steps(steps)
    now = {head["partition"]: head["fingerprint"] for head in stage.lake.heads("candidates")}
    (moved,) = [key for key in heads if heads[key] != now[key]]
    assert moved.startswith("kto-") and stage.shown("candidates", moved).notes["rows"] == 1
    (reject,) = stage.lake.read_table(stage.shown("rejects", moved)).to_pylist()
    assert (reject["line"], reject["field"]) == (2, "label")
    assert project.run_steps(steps)[-1].computed == 0
    assert {head["partition"]: head["fingerprint"] for head in stage.lake.heads("candidates")} == now


def test_rows_that_lose_a_part_of_their_prompt_and_unused_fields_are_counted(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    project.add(
        "long", [{"prompt": "x" * 100, "completion": "ab", "mood": "good"}, {"prompt": "y", "completion": "ab"}]
    )
    steps = [step for step in steps_of("run") if step.title in ("Base model", "Candidates")]
    project.run_steps(steps)
    shard = next(head["partition"] for head in project.lake.heads("candidates") if head["partition"].startswith("long"))
    notes = project.stage.shown("candidates", shard).notes
    assert notes["truncated"] == 1 and notes["unused_fields"] == ["mood"]
