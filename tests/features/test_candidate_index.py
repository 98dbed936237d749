"""Compaction of index segments: fewer files, the same answers."""

import dagster as dg
import pytest

from prism_assets.features.index_parts import indexed_shards


@pytest.fixture
def project(tmp_path, make_project):
    found = make_project(tmp_path / "project", strategies=["prism", "random"], seeds=[0])
    found.run()
    return found


def compact(project) -> None:
    """What the nightly schedule does to the index."""
    schedule = next(one for one in project.definitions.schedules if one.job_name == "refresh_pool")
    tick = schedule.evaluate_tick(dg.build_schedule_context(instance=project.instance))
    (request,) = tick.run_requests
    job = project.definitions.resolve_implicit_global_asset_job_def()
    selected = [dg.AssetKey("candidate_index")]
    assert job.execute_in_process(instance=project.instance, asset_selection=selected, tags=request.tags).success


def index_of(project):
    return project.lake.require("candidate_index", None, project.stage.feature_version)


def test_compaction_makes_one_segment_of_many_and_changes_no_selection(project):
    before = project.selection("prism")
    assert index_of(project).notes["segments"] == 2
    compact(project)
    index = index_of(project)
    assert index.notes["segments"] == 1
    assert [one.first_row for one in indexed_shards(project.lake, index)] == [0, 20]
    project.run()
    after = project.selection("prism")
    assert after.content_hash == before.content_hash
    # Not only because scores were remembered: asked anew, the compacted segment says the same.
    for path in project.lake.cache_file("scores").rglob("*"):
        path.unlink() if path.is_file() else None
    project.lake.local(project.lake.head("selection", "prism|plain")).unlink()
    project.run()
    assert project.selection("prism").content_hash == before.content_hash


def test_a_shard_that_arrives_after_compaction_gets_a_segment_of_its_own_and_a_retired_one_is_masked(project):
    compact(project)
    compacted = indexed_shards(project.lake, index_of(project))[0].segment
    path = project.add("late", [{"prompt": f"copy: {a}{b}=", "completion": a + b} for a in "qwe" for b in "rty"])
    project.run()
    placed = {one.shard.rpartition("-")[0]: one for one in indexed_shards(project.lake, index_of(project))}
    assert placed["late"].segment != compacted
    assert {placed["shard0"].segment, placed["shard1"].segment} == {compacted}
    next(project.inbox.glob("shard0*")).unlink()
    project.configure(selection={"budget": "100%"})
    project.run()
    shown = {row["shard"].rpartition("-")[0] for row in project.selected("prism")}
    assert shown == {"shard1", "late"}
    assert path.exists()
