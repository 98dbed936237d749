"""What became of the records given: every one is used, or is counted under a reason."""

import json
import re

import pytest
from typer.testing import CliRunner

from prism_assets.cli import app
from prism_assets.corpus.candidates import scan_inbox
from prism_assets.corpus.intake import DUPLICATE, OTHER_REASONS, Part, ReasonCounts, intake
from prism_assets.ops.pipeline import steps_of
from tests.conftest import Project, make_rows, write_lines


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory) -> Project:
    """A pool with something of everything, run as far as `live_pool`."""
    project = make_project(tmp_path_factory.mktemp("intake") / "project")
    rows = make_rows(10, 3)
    long = {"prompt": "reverse: " + "ab " * 30, "completion": "ba"}
    too_long = {"prompt": "copy: a=", "completion": "a" * 99}
    project.add("shard0", [*make_rows(20, 10), "{", '{"prompt": "x"}', rows[0], rows[0], long, too_long])
    held_out = json.loads((project.folder / "plain" / "eval.jsonl").read_text().splitlines()[0])
    project.add("shard1", [*rows, {**held_out, "rating": 5}])
    (project.inbox / "broken.parquet").write_bytes(b"PAR1 no parquet at all")
    (project.inbox / "notes.docx").write_text("no data")
    target = project.folder / "plain" / "target.jsonl"
    write_lines(target, [*map(json.loads, target.read_text().splitlines()), {"prompt": "no completion"}])
    wanted = ("candidates", "targets", "live_pool", "base_model")
    project.run_steps([step for step in steps_of("run") if set(step.assets) & set(wanted)])
    return project


def figures(part: Part) -> tuple[int, ...]:
    return part.given, part.used, part.rejected, part.duplicates, part.contaminated, part.cut


def test_every_record_is_used_or_counted_under_a_reason(project: Project):
    found = intake(project.stage, scan_inbox(project.stage, at_rest_seconds=0).ignored)
    pool, target, held_out = found.parts
    for part in found.parts:
        assert part.given == part.used + part.rejected + part.duplicates + part.contaminated
        assert sum(part.reasons.values()) == part.rejected
    lines = sum(len(file.read_text().splitlines()) for file in project.inbox.glob("*.jsonl"))
    # A repeat within a file and one across files; a held-out record; bad JSON, a field missing, no room.
    assert figures(pool) == (lines, lines - 6, 3, 2, 1, 1)
    assert list(pool.unreadable) == ["broken-" + next(iter(pool.unreadable))[7:]]
    assert "broken.parquet" in next(iter(pool.unreadable.values()))
    assert pool.unused_fields == ["rating"]
    assert (target.name, *figures(target)) == ("target plain", 7, 6, 1, 0, 0, 0)
    assert (held_out.name, *figures(held_out)) == ("held-out of plain", 6, 6, 0, 0, 0, 0)
    assert [(path.rpartition("/")[2], why[:17]) for path, why in found.ignored] == [("notes.docx", "unknown extension")]


def test_the_label_that_judges_a_removal_is_no_field_that_is_not_used(project: Project):
    stage = project.stage
    plain = stage.settings.targets["plain"].model_copy(update={"label": "rating"})
    labelled = stage.with_settings(targets={"plain": plain})
    assert intake(labelled).parts[0].unused_fields == []


def test_what_an_earlier_version_read_is_counted_from_its_rejects(project: Project, monkeypatch: pytest.MonkeyPatch):
    from prism_assets.resources.lake import Artifact

    now = intake(project.stage)
    notes = Artifact.notes.fget
    without = ("reasons", "unreadable")
    monkeypatch.setattr(
        Artifact, "notes", property(lambda one: {k: v for k, v in notes(one).items() if k not in without})
    )
    assert intake(project.stage) == now


def test_the_terminal_and_the_ui_say_it(project: Project):
    result = CliRunner().invoke(app, ["doctor", "--config", str(project.config)])
    text = " ".join(result.output.split())
    assert "What was given, and what became of it" in text
    assert re.search(r"candidates │ +3 │ +37 │ +31 │ +3 │ +2 │ +1 │ +1 ", text)
    assert "1 of candidates rejected: completion: missing" in text
    assert 'Which they are: prism sql "SELECT kind, name, line, field, reason FROM rejects"' in text
    assert "not read: broken-" in text and "notes.docx" in text and "fields that are not used: rating" in text
    listed = CliRunner().invoke(
        app, ["sql", "SELECT kind, name, line, field, reason FROM rejects", "--config", str(project.config), "--json"]
    )
    # Of the pool 3, the repeat within a file and the file that cannot be read; of the target 1.
    assert len(json.loads(listed.stdout)) == 6
    event = project.instance.get_latest_materialization_event(_key(project))
    metadata = event.asset_materialization.metadata
    assert [dict(record.data)["given"] for record in metadata["intake"].records] == [37, 7, 6]
    assert any("notes.docx" in record.data["note"] for record in metadata["intake_notes"].records)


def _key(project: Project):
    from prism_assets.project import Project as Named

    return Named.of(project.settings).key("live_pool")


def test_reasons_that_differ_in_figures_alone_are_counted_together_and_kinds_are_bounded():
    reasons = ReasonCounts()
    for number in range(7):
        reasons.add("completion", f"needs {number + 1_000:,} tokens")
    for kind in range(100):
        reasons.add("", f"another {'x' * kind}")
    reasons.add("", "duplicate of line 12")
    assert reasons.counts["completion: needs … tokens"] == 7
    assert reasons.counts[DUPLICATE] == 1
    assert reasons.counts[OTHER_REASONS] == 71
    assert len(reasons.counts) == 32 and reasons.counts.total() == 108


def test_before_the_pool_is_listed_and_after_a_file_is_repaired_doctor_names_the_files_of_the_inbox(
    make_project, tmp_path
):
    from prism_assets.ops.doctor import examine

    project = make_project(tmp_path / "project", strategies=["random"], seeds=[0])
    (project.inbox / "broken.jsonl").write_text("[\n")
    project.run_steps([step for step in steps_of("run") if set(step.assets) & {"candidates", "base_model"}])

    def unreadable():
        return [one.found for one in examine(project.stage) if one.what == "unreadable"]

    assert len(unreadable()) == 1 and "broken-" in unreadable()[0]
    (project.inbox / "broken.jsonl").unlink()
    assert unreadable() == []
