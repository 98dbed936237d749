"""The registry: one entry says all of an asset. Adding an asset is its file and its entry."""

import sys
from dataclasses import replace
from importlib import import_module

import dagster as dg
import pyarrow as pa
import pytest

from prism_assets.catalog.lineage import find_artifact, trace
from prism_assets.catalog.sql import ask, connect
from prism_assets.ops.gc import plan
from prism_assets.ops.pipeline import steps_of
from prism_assets.tables import ASSETS, JOBS, Asset, Table, asset_named, register, schema_of, tables

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
    for command in ("run", "experiment"):
        assert "lengths" in next(step for step in steps_of(command) if step.title == "Live pool and warm-up").assets
    steps = steps_of("run")[: [step.title for step in steps_of("run")].index("Live pool and warm-up") + 1]
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
    run, trust, experiment = ([step.title for step in steps_of(one)] for one in ("run", "trust", "experiment"))
    assert {*run, *trust, *experiment} == {one.step for one in ASSETS}
    shared = [one for one in run[: run.index("Index") + 1] if one != "Target directions"]  # a split has its own
    assert experiment == [*shared, "Experiment"] and trust == ["Trust"]
    assert {part.parts_of for part in tables()} - {None} <= set(names)
    assert {one.needs.asset for one in ASSETS if one.needs} - {None} <= {one.name for one in ASSETS}


def test_a_table_is_published_with_the_columns_of_its_entry():
    """Written out once more, a table of every type: another type, or name of a list's items, is another content
    hash."""
    whole, text = pa.int64(), pa.string()
    written = {"shard": text, "candidates_fingerprint": text, "rows": whole, "canonical_rows": whole}
    written |= {"completion_tokens": whole, "excluded_rows": pa.list_(pa.int32()), "excluded_reasons": pa.list_(text)}
    assert schema_of("live_pool").equals(pa.schema(written), check_metadata=True)
    assert schema_of("live_pool").field("excluded_rows").type.value_field.name == "item"
    kinds = {"value": pa.float64(), "asked": pa.bool_(), "documents": whole, "filter": text}
    assert {name: schema_of("benchmarks").field(name).type for name in kinds} == kinds
    assert schema_of("candidates").field("loss_mask").type == pa.list_(pa.bool_())
    assert Table("scores", 1, columns={"score": "FLOAT"}).schema().field("score").type == pa.float32()


def test_a_schema_that_cannot_be_told_is_refused():
    with pytest.raises(KeyError, match="no table 'nobodys'"):
        schema_of("nobodys")
    with pytest.raises(ValueError, match="no columns of the table 'base_model'"):
        schema_of("base_model")
    with pytest.raises(KeyError, match="JSON"):
        Table("notes", 1, columns={"note": "JSON"}).schema()


def test_what_an_asset_names_in_its_module_is_there():
    for one in ASSETS:
        assert one.pending is None or callable(getattr(import_module(one.module), one.pending))
        assert (one.pending is not None) == (one.partitions == "shard")
        assert one.needs is None or one.condition == "follow_arrivals"


def test_every_asset_stands_in_the_module_that_is_named_for_it():
    assert all(one.module.rpartition(".")[2] == one.name for one in ASSETS)
