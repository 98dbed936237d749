"""`prism select`: selections under names that stay, with what the user wrote, and nothing trained."""

import json
import os
from importlib.metadata import version

import datasets
import duckdb
import pytest
from trl.data_utils import is_conversational
from typer.testing import CliRunner

from conftest import make_rows, write_lines
from prism_assets.cli import app
from prism_assets.resources.lake import Recipe

pytestmark = pytest.mark.usefixtures("blank_plots")


def prism(project, *arguments):
    result = CliRunner().invoke(app, [*arguments, "--config", str(project.config)])
    assert result.exit_code == 0, result.output
    return result


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("select") / "project", strategies=["prism", "prism-cover", "random"])
    rows = make_rows(20, 10)
    for number, row in enumerate(rows):
        row |= {"id": f"mine-{number}", "rating": number / 2, "tags": ["a", str(number)], "rank": "theirs"}
    project.add("shard0", rows)
    project.shown = prism(project, "select")
    return project


def test_the_files_hold_the_selection_and_all_that_the_records_did(project):
    given = {f"mine-{number}": row for number, row in enumerate(lines(project.inbox / "shard0.jsonl"))}
    for strategy in ("prism", "prism-cover", "random"):
        selected = project.selected(strategy)
        out = lines(project.folder / "out" / "plain" / f"{strategy}.jsonl")
        assert [row["prism_id"] for row in out] == [row["id"] for row in selected]
        assert [row["rank"] for row in out] == list(range(1, len(selected) + 1))
        for row, ranked in zip(out, selected, strict=True):
            assert (row["prompt"], row["completion"]) == (ranked["prompt"], ranked["completion"])
            assert row["score"] == ranked["score"] and f"of 40 by {strategy}" in row["reason"]
            record = lines(project.inbox / f"{row['file']}.jsonl")[row["line"] - 1]
            assert record["prompt"] == row["prompt"]
            if row["file"] == "shard0":
                whole = given[row["id"]]
                assert row["fields"] == {name: whole[name] for name in ("id", "source", "rating", "tags", "rank")}
                assert row["source"] == whole["source"]


def test_nothing_is_trained_and_nothing_is_computed_again(project):
    assert not list(project.lake.artifacts("adapters")) and not list(project.lake.artifacts("evaluations"))
    assert "To fine-tune on them" in project.shown.output and "What was given" in project.shown.output
    again = json.loads(prism(project, "select", "--json", "--target", "plain").stdout)
    assert {one["computed"] for one in again["steps"]} == {0}
    assert [one["step"] for one in again["steps"]][-1] == "Selection"
    assert [one["strategy"] for one in again["files"]] == ["prism", "prism-cover", "random"]
    assert again["intake"]["parts"][0]["given"] == 40


def test_other_libraries_read_the_files_and_see_one_layout(project):
    folder = project.folder / "out" / "plain"
    loaded = datasets.load_dataset("json", data_files=str(folder / "prism.jsonl"), split="train")
    assert not is_conversational(loaded[0]) and loaded.num_rows == 8
    assert {"prompt", "completion"} <= set(loaded.column_names) and "messages" not in loaded.column_names
    table = duckdb.sql(f"SELECT rank, id, fields->>'rating' AS rating FROM '{folder / 'prism.parquet'}' ORDER BY rank")
    expected = [(row["rank"], row["id"], row["fields"].get("rating")) for row in lines(folder / "prism.jsonl")]
    assert [(rank, name, None if rating is None else float(rating)) for rank, name, rating in table.fetchall()] == [
        (rank, name, rating) for rank, name, rating in expected
    ]


def test_conversations_are_messages_in_every_row_of_their_file(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["random"], selection={"budget": 44})
    turns = [{"role": "user", "content": "copy: ab="}, {"role": "assistant", "content": "ab"}]
    project.add("more", [{"messages": [*turns, {"role": "user", "content": "and c"}, turns[1]]}])
    prism(project, "select")
    out = lines(project.folder / "out" / "plain" / "random.jsonl")
    assert len(out) == 41 and all("messages" in row and "prompt" not in row for row in out)
    assert sorted(len(row["messages"]) for row in out)[-1] == 4
    loaded = datasets.load_dataset("json", data_files=str(project.folder / "out/plain/random.jsonl"), split="train")
    assert is_conversational(loaded[0])


def test_a_removal_hands_out_what_is_kept_and_what_was_removed(make_project, tmp_path):
    project = make_project(
        tmp_path / "project",
        strategies=["prism"],
        targets={"bad": {"examples": "bad/target.jsonl", "eval": "bad/eval.jsonl", "use": "remove", "budget": 5}},
    )
    pairs = [{**row, "rejected": "zzz" + row["completion"]} for row in make_rows(6, 300, "reverse")]
    write_lines(project.folder / "bad" / "target.jsonl", pairs[:3])
    write_lines(project.folder / "bad" / "eval.jsonl", pairs[3:])
    shown = json.loads(prism(project, "select", "--json").stdout)["files"]
    assert [(one["what"], one["rows"]) for one in shown] == [("kept", 35), ("removed", 5)]
    kept, removed = (lines(project.folder / "out" / "bad" / f"prism{part}.jsonl") for part in ("", ".removed"))
    assert len({row["prism_id"] for row in [*kept, *removed]}) == 40
    assert all(row["reason"].startswith("rank ") for row in removed)


def test_the_version_is_said():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.strip() == f"prism-assets {version('prism-assets')}"


def test_half_a_surrogate_pair_beside_a_conversation_stays_an_escape(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["random"], selection={"budget": 44})
    project.add("odd", ['{"prompt": "copy: odd=", "completion": "odd", "note": "\\ud83d", "\\udc00": 1}'])
    prism(project, "select")
    out = lines(project.folder / "out" / "plain" / "random.jsonl")
    (odd,) = [row for row in out if row["prompt"] == "copy: odd="]
    assert odd["fields"] == {"note": "\ud83d", "\udc00": 1}
    table = duckdb.sql(f"SELECT fields FROM '{project.folder}/out/plain/random.parquet' WHERE prompt = 'copy: odd='")
    assert json.loads(table.fetchall()[0][0]) == odd["fields"]


def test_rows_of_another_reading_of_a_shard_are_never_put_beside_a_selection(project, tmp_path):
    from prism_assets.errors import CannotExport
    from prism_assets.selection.handed_out import hand_out

    other = project.copy(tmp_path / "project")
    shard = other.selected("random")[0]["shard"]
    shown = other.stage.shown("candidate_fields", shard)
    table = other.lake.read_table(shown)
    moved = other.lake.publish_table(Recipe("candidate_fields", 1, {"other": True}), table.slice(1))
    other.stage.show(moved, shard)
    with pytest.raises(CannotExport, match=r"made from other rows of the shard .*prism select --target plain"):
        hand_out(other.stage)
    other.stage.retire("candidate_fields", shard)
    with pytest.raises(CannotExport, match="prism select"):
        hand_out(other.stage)


def test_what_was_removed_once_does_not_stay_beside_what_is_selected_now(project, tmp_path):
    other = project.copy(tmp_path / "project")
    stale = other.folder / "out" / "plain" / "random.removed.jsonl"
    stale.write_text("{}")
    (stale.parent / ".random.jsonl.999").write_text("half")
    os.utime(stale.parent / ".random.jsonl.999", (1, 1))
    prism(other, "select")
    assert sorted(path.name for path in stale.parent.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("prism", "prism-cover", "random") for kind in ("jsonl", "parquet")
    )
