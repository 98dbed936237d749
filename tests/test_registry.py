"""The registry: one entry says all of an asset. Adding an asset is its file and its entry."""

import sys
from dataclasses import replace

import dagster as dg
import pytest

from prism_assets.catalog.lineage import find_artifact, trace
from prism_assets.catalog.sql import ask, connect
from prism_assets.ops.gc import plan
from prism_assets.ops.pipeline import STEPS, steps_of_run
from prism_assets.tables import ASSETS, JOBS, Asset, Table, asset_named, register, tables

ASSET_FILE = '''
"""The asset `lengths`: how long completions are, by source."""

import pyarrow as pa

from prism_assets.project import Check
from prism_assets.resources.lake import Rows
from prism_assets.work import Outcome, stage_of, the_whole

NOT_EMPTY = Check("not_empty", "Every completion has a token.")


def build(project):
    @project.asset("lengths", group="corpus", kinds={"parquet"}, deps=["live_pool"], checks=[NOT_EMPTY])
    def lengths(context):
        """How long completions are on average, by source, over all rows of the live pool."""
        stage = stage_of(project, context)
        pool = stage.shown("live_pool")
        found, computed = stage.make(stage.recipe("lengths", inputs={"pool": pool}), lambda: measure(stage, pool))
        stage.show(found)
        return the_whole(context, stage, Outcome([found], computed, {}, [NOT_EMPTY(True)]))

    return lengths


def measure(stage, pool):
    total = sum(stage.lake.read_table(pool, ["completion_tokens"])["completion_tokens"].to_pylist())
    rows = pool.notes["canonical_rows"]
    return Rows(pa.table({"mean": [total / rows], "pool": [pool.fingerprint]}))
'''


@pytest.fixture
def lengths(tmp_path, monkeypatch):
    """The entry of an asset whose file lies in a folder of its own."""
    (tmp_path / "somebodys_lengths.py").write_text(ASSET_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(ASSETS)
    table = Table("lengths", 1, "corpus", {"mean": "DOUBLE", "pool": "VARCHAR"}, rows_name={"pool": "live_pool"})
    register(
        Asset(
            "lengths",
            "somebodys_lengths",
            (table,),
            condition="follow",
            reads=("tokenization",),
            job="refresh_pool",
            step="Live pool and warm-up",
        )
    )
    yield
    ASSETS[:] = before
    sys.modules.pop("somebodys_lengths", None)


def test_a_new_asset_is_one_file_and_its_entry(lengths, make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["random"], seeds=[0])
    graph = project.definitions.resolve_asset_graph()
    node = graph.get(dg.AssetKey("lengths"))
    assert node.parent_keys == {dg.AssetKey("live_pool")} and node.automation_condition is not None
    assert "-" in node.code_version  # the settings that it reads are part of it
    (job,) = [one for one in project.definitions.resolve_all_job_defs() if one.name == "refresh_pool"]
    assert dg.AssetKey("lengths") in job.asset_layer.executable_asset_keys
    assert "lengths" in next(step for step in steps_of_run() if step.title == "Live pool and warm-up").assets
    steps = steps_of_run()[: [step.title for step in steps_of_run()].index("Live pool and warm-up") + 1]
    project.run_steps(steps)
    made = project.stage.shown("lengths")
    assert [result.computed for result in project.run_steps(steps)][-1] == 0
    with connect(project.lake) as connection:
        ((mean, pool),) = ask(connection, "SELECT mean, pool FROM lengths").rows
    assert mean > 2 and pool == project.stage.shown("live_pool").fingerprint
    above = {one["table"] for one in trace(project.lake, find_artifact(project.lake, "lengths"))["artifacts"]}
    assert {"lengths", "live_pool", "candidates"} <= above
    assert not any(one.fingerprint == made.fingerprint for one in plan(project.lake, min_age=0).artifacts)


def test_a_name_that_is_taken_is_refused(lengths):
    with pytest.raises(ValueError, match="'lengths' already"):
        register(asset_named("lengths"))
    with pytest.raises(ValueError, match="'candidates' already"):
        register(replace(asset_named("lengths"), name="other", tables=(Table("candidates", 1),)))


def test_every_table_is_named_once_and_every_reference_names_a_table():
    names = [table.name for table in tables()]
    assert len(set(names)) == len(names)
    assert {to for table in tables() for to in table.rows_name.values()} <= set(names)
    assert {one.job for one in ASSETS} == set(JOBS)
    assert [step.title for step in STEPS] == list(dict.fromkeys(one.step for one in ASSETS if one.step))


def test_every_asset_stands_in_the_module_that_is_named_for_it():
    assert all(one.module.rpartition(".")[2] == one.name for one in ASSETS)
