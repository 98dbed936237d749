"""The asset `candidates` on files that must not be read, beside others that are."""

import gzip
import json

import pytest

from prism_assets.ops.pipeline import steps_of


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    """Two sound files, a compressed one of blank lines, one with a long record, and a link to a file elsewhere."""
    folder = tmp_path_factory.mktemp("candidates")
    project = make_project(folder / "project", limits={"blank_lines": 1000, "record": 2000})
    with gzip.open(project.inbox / "blank.jsonl.gz", "wb") as file:
        file.write(b"\n" * 5000)
    project.add("long", [{"prompt": "a" * 3000, "completion": "b"}, {"prompt": "copy: abc=", "completion": "abc"}])
    (folder / "secret.jsonl").write_text("the secret\n")
    (project.inbox / "link.jsonl").symlink_to(folder / "secret.jsonl")
    ingest = next(step for step in steps_of("run") if "candidates" in step.assets)
    return project, ingest, project.run_steps([ingest])


def shards(project):
    return {entry["partition"].rsplit("-", 1)[0]: entry["partition"] for entry in project.lake.heads("candidates")}


def rejects_of(project, name):
    return project.lake.read_table(project.stage.shown("rejects", shards(project)[name])).to_pylist()


def test_a_file_beyond_a_limit_fails_its_check_and_the_others_are_read(project):
    project, _, (result,) = project
    assert set(shards(project)) == {"shard0", "shard1", "blank", "long"}
    rows = {name: project.stage.shown("candidates", key).notes["rows"] for name, key in shards(project).items()}
    assert rows == {"shard0": 20, "shard1": 20, "blank": 0, "long": 1}
    (whole,) = rejects_of(project, "blank")
    assert whole["field"] == "file" and "more than the 1,000 blank lines that limits.blank_lines" in whole["reason"]
    (record,) = rejects_of(project, "long")
    assert (record["line"], record["reason"]) == (1, "3,033 bytes, and limits.record allows 2,000")
    assert any("file_readable" in check for check in result.failed_checks)


def test_nothing_of_a_file_outside_of_the_inbox_comes_into_the_lake(project):
    project, _, _ = project
    ignored = dict((path.name, why) for path, why in _scan(project).ignored)
    assert "candidates.follow_links" in ignored["link.jsonl"]
    for file in project.settings.storage.root.rglob("*"):
        if file.is_file():
            assert b"the secret" not in file.read_bytes()


def _scan(project):
    from prism_assets.corpus.candidates import scan_inbox

    return scan_inbox(project.stage)


def test_a_raised_limit_has_the_file_read_again(project):
    project, ingest, _ = project
    before = {name: project.stage.shown("candidates", key).content_hash for name, key in shards(project).items()}
    project.configure(limits={"blank_lines": 1000, "record": 5000})
    project.run_steps([ingest])
    after = {name: project.stage.shown("candidates", key).content_hash for name, key in shards(project).items()}
    assert project.stage.shown("candidates", shards(project)["long"]).notes["rows"] == 2
    assert not any("limits.record" in one["reason"] for one in rejects_of(project, "long"))
    assert before["shard0"] == after["shard0"]


def test_links_are_followed_where_the_settings_say_so(project):
    project, ingest, _ = project
    project.configure(candidates={"follow_links": True, "at_rest_seconds": 0})
    project.run_steps([ingest])
    (reject,) = rejects_of(project, "link")
    assert json.dumps(reject).count("the secret") == 1
