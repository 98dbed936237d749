"""Compaction of index segments: fewer files, the same answers."""

import numpy as np
import pytest

from prism_assets.features.assets import indexed_shards
from prism_assets.pipeline import STEPS, run_pipeline
from resources.vector_store import SegmentPart, VectorStore


@pytest.fixture
def project(tmp_path, make_project):
    found = make_project(tmp_path / "project", strategies=["prism", "random"], seeds=[0])
    found.run()
    return found


def compact(project) -> None:
    """What the nightly schedule does to the index."""
    step = next(step for step in STEPS if step.assets == ("candidate_index",))
    run_pipeline(project.settings, project.definitions, project.instance, steps=[step], tags={"prism/compact": "true"})


def index_of(project):
    from prism_assets.features.assets import feature_version

    return project.lake.require("candidate_index", None, feature_version(project.settings, project.lake, project.model))


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
    for path in (project.lake.cache / "scores").rglob("*"):
        path.unlink() if path.is_file() else None
    project.lake.head("selection", "prism|plain").path.unlink()
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


def test_parts_of_a_segment_score_like_the_rows_they_are(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 16)).astype(np.float16)
    for storage in ("float16", "float32"):
        store = VectorStore(device="cpu", storage=storage)
        path = tmp_path / f"{storage}.faiss"
        store.write_segment(path, vectors)
        query = rng.standard_normal(16).astype(np.float32)
        index = store.open([SegmentPart(path, 30, 20), SegmentPart(path, 0, 7)])
        expected = vectors.astype(np.float64) @ query.astype(np.float64)
        first, second = index.scores(query)
        np.testing.assert_allclose(first, expected[30:], atol=1e-5)
        np.testing.assert_allclose(second, expected[:7], atol=1e-5)
        top = index.top_k(query, 3)
        rows = np.concatenate([np.arange(30, 50), np.arange(7)])
        best = rows[np.argsort(-expected[rows], kind="stable")[:3]]
        assert [(30 + row if segment == 0 else row) for segment, row in zip(top.segment, top.row, strict=True)] == best.tolist()
        with pytest.raises(ValueError, match="no part of 21"):
            store.open([SegmentPart(path, 30, 21)])
