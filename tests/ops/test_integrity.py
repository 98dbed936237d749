"""What the lake holds is compared with what was published; a project may be moved; files may go while they are read."""

import json
import shutil

import dagster as dg
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from conftest import make_rows
from prism_assets.cli import app
from prism_assets.errors import PipelineError
from prism_assets.ops import integrity
from prism_assets.resources.lake import Recipe, damaged_among, hashing, verification, verify

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory):
    """A finished project. Copy it before changing it."""
    project = make_project(tmp_path_factory.mktemp("integrity") / "project", strategies=["prism", "random"], seeds=[0])
    project.run()
    return project


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


KINDS = {
    "feature_blocks": "*.parquet",
    "target_directions": "*.safetensors",
    "index_segments": "*/segment.faiss",
    "adapters": "*/adapter_model.safetensors",
    "warmup_checkpoints": "*/*.safetensors",
}


@pytest.mark.parametrize("table", KINDS)
def test_a_flipped_bit_is_found_by_name_and_the_next_run_makes_the_content_again(finished, tmp_path, table):
    project = finished.copy(tmp_path / "project")
    before = {one.fingerprint: one.content_hash for one in project.lake.artifacts()}
    assert list(integrity.damaged(project.stage)) == []
    file = next(iter(sorted((project.lake.folder / "artifacts" / table).glob(KINDS[table]))))
    flip(file)
    (said,) = integrity.damaged(project.stage)
    assert table in said and "prism run" in said
    project.run()
    assert {one.fingerprint: one.content_hash for one in project.lake.artifacts()} == before
    assert list(integrity.damaged(project.stage)) == []


@pytest.mark.parametrize("place", [20, -20], ids=["header", "weights"])
def test_damaged_weights_of_the_warmup_give_no_gradient_and_are_made_again(finished, tmp_path, place):
    project = finished.copy(tmp_path / "project")
    before = {one.fingerprint: one.content_hash for one in project.lake.artifacts("warmup_checkpoints")}
    (file,) = (project.lake.folder / "artifacts" / "warmup_checkpoints").glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[place] ^= 64
    file.write_bytes(content)
    project.add("late", make_rows(3, 91))
    with pytest.raises(PipelineError, match="warmup_checkpoints.* is damaged"):
        project.run()
    project.run()
    assert {one.fingerprint: one.content_hash for one in project.lake.artifacts("warmup_checkpoints")} == before


@pytest.mark.parametrize("harm", ["lost", "emptied", "altered"])
def test_the_file_that_is_offered_for_training_is_written_again(finished, tmp_path, harm):
    project = finished.copy(tmp_path / "project")
    place = project.lake.local(project.selection("prism"), suffix=".jsonl")
    whole = place.read_bytes()
    {
        "lost": place.unlink,
        "emptied": lambda: place.write_bytes(b""),
        "altered": lambda: place.write_bytes(whole.replace(b"reverse", b"REVERSE")),
    }[harm]()
    assert set(project.run().values()) == {0}
    assert place.read_bytes() == whole


def test_an_adapter_that_was_altered_is_trained_again(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    folder = project.lake.local(project.lake.require("adapters", "prism|plain/seed-0"))
    whole = (folder / "adapter_model.safetensors").read_bytes()
    flip(folder / "adapter_model.safetensors")
    assert sum(project.run().values()) == 1
    assert (folder / "adapter_model.safetensors").read_bytes() == whole


def test_what_is_no_artefact_or_cannot_be_moved_stops_no_verification(finished, tmp_path, monkeypatch):
    project = finished.copy(tmp_path / "project")
    (project.lake.folder / "artifacts" / "selection" / "README").write_text("mine")
    assert list(integrity.damaged(project.stage)) == []
    for table in ("adapters", "feature_blocks"):
        flip(next(iter(sorted((project.lake.folder / "artifacts" / table).glob(KINDS[table])))))

    def refuse(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    found = list(integrity.damaged(project.stage))
    assert len(found) == 2 and all("cannot be moved aside" in one or "could not be read" in one for one in found)


def test_doctor_verifies_and_every_night_a_share_is_read(finished, tmp_path, monkeypatch):
    project = finished.copy(tmp_path / "project")
    result = CliRunner().invoke(app, ["doctor", "--verify", "--json", "--config", str(project.config)])
    assert {"state": "ok", "what": "integrity"}.items() <= json.loads(result.stdout)[-1].items()
    everything = [len(list(project.lake.artifacts())), 0]
    seen: list[str] = []
    monkeypatch.setattr(
        "prism_assets.resources.lake.verification.verify", lambda lake, one: seen.append(one.fingerprint)
    )
    for part in range(integrity.PARTS):
        assert list(damaged_among(project.lake, part, integrity.PARTS)) == []
    everything[1] = len(seen)
    assert everything[0] == everything[1] == len(set(seen))
    monkeypatch.undo()

    job = project.definitions.resolve_job_def("verify_lake")
    monkeypatch.setattr(integrity, "PARTS", 1)
    assert job.execute_in_process(instance=project.instance).success
    flip(next(iter((project.lake.folder / "artifacts" / "candidates").glob("*.parquet"))))
    failed = job.execute_in_process(instance=project.instance, raise_on_error=False)
    assert not failed.success
    assert "set aside" in failed.failure_data_for_node("verify_lake_share").user_failure_data.description
    names = [one.name for one in project.definitions.schedules]
    assert "nightly_verify" in names
    assert isinstance(job, dg.JobDefinition)


def test_large_tables_are_verified_in_blocks_and_those_of_before_by_their_pages(finished, tmp_path, monkeypatch):
    lake = finished.copy(tmp_path / "project").lake
    table = lake.read_table(next(lake.artifacts("candidates")))
    monkeypatch.setattr("prism_assets.resources.lake.lake._ROWS_A_GROUP", 4)
    before = lake.publish_table(Recipe("t", 1), table)
    monkeypatch.setattr(hashing, "ROWS_A_BLOCK", 6)
    monkeypatch.setattr("prism_assets.resources.lake.lake.ROWS_A_BLOCK", 6)
    monkeypatch.setattr(verification, "ROWS_A_BLOCK", 6)
    now = lake.publish_table(Recipe("t", 2), table)
    assert now.content_hash != before.content_hash
    verify(lake, now)
    verify(lake, before)
    for artifact in (now, before):
        path = lake.local(artifact)
        content = bytearray(path.read_bytes())
        pages = pq.read_metadata(path).row_group(1).column(0)
        content[pages.data_page_offset + pages.total_compressed_size - 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(Exception, match="is damaged"):
            verify(lake, artifact)


def test_a_moved_project_names_itself_alone(finished, tmp_path):
    project = finished.copy(tmp_path / "first")
    project.run()
    moved = project.copy(tmp_path / "second")
    shutil.rmtree(project.folder)
    assert set(moved.run().values()) == {0}
    for strategy, entry in moved.report["targets"]["plain"]["strategies"].items():
        for key in ("selected", "selected_jsonl", "adapter"):
            assert entry[key].startswith(str(moved.folder)), (strategy, key)
    said = [moved.folder / "report", *(moved.lake.folder / "artifacts").rglob("*.json")]
    said += [moved.folder / "prism.yaml", *(moved.lake.folder / "artifacts").rglob("*.html")]
    for path in [file for one in said for file in (one.iterdir() if one.is_dir() else [one])]:
        assert str(project.folder) not in path.read_text(encoding="utf-8"), path
        assert path.is_relative_to(moved.folder / "report") or str(finished.folder) not in path.read_text()


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_a_file_that_goes_between_listing_and_reading_fails_no_run(finished, tmp_path, monkeypatch, change):
    from prism_assets.corpus import candidates

    project = finished.copy(tmp_path / "project")
    gone = project.add("gone", make_rows(5, 77))
    project.add("stays", make_rows(5, 78))
    real = candidates.inbox_files

    def listed(*arguments, **options):
        found = real(*arguments, **options)
        if change == "edited":
            project.add("gone", make_rows(6, 79))
        else:
            gone.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(candidates, "inbox_files", listed)
        project.run()
    assert project.stage.shown("live_pool").notes["canonical_rows"] == 45
    checks = [check for result in project.results for check in result.failed_checks]
    assert any("file_readable" in one and "gone-" in one for one in checks)
    made = project.run()
    rows = project.stage.shown("live_pool").notes["canonical_rows"]
    assert rows == (51 if change == "edited" else 45) and (made["Candidates"] > 0) == (change == "edited")
