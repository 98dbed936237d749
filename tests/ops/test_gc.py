"""`prism gc`: what goes, what stays, and that everything still works afterwards."""

import json
import os
import time

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from prism_assets.catalog.lineage import find_artifact, trace
from prism_assets.errors import DamagedArtifact
from prism_assets.identity import feature_versions
from prism_assets.ops.gc import collect, plan, runs_in_progress, what_is_current
from prism_assets.resources.lake.lake import Lake
from prism_assets.resources.lake.recipe import Recipe, references
from prism_assets.selection.query import query_index

HOUR = 3600.0


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    """Drawing is half of the time of a run."""
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


@pytest.fixture
def project(two_versions, tmp_path):
    return two_versions.copy(tmp_path / "project")


def planned(project, **options):
    today = what_is_current(project.stage)
    return plan(project.lake, **{**today._asdict(), "min_age": 0.0, **options})


def ask(project, version=None):
    return query_index(project.stage, target="plain", k=5, version=version)


def names(removals):
    return {(one.table, one.fingerprint) for one in removals}


def everything(lake):
    return {(one.table, one.fingerprint) for one in lake.artifacts()}


def missing_above_heads(lake):
    """Inputs of heads, and of what these were made from, that are not in the lake. What was only looked at is to be
    there, but not what that was made from."""
    missing, seen = [], set()
    waiting = [(head["table"], head["fingerprint"]) for head in lake.heads()]
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        for one in references(lake.get(*key)):
            if one.table is None:
                continue
            above = (one.table, one.fingerprint)
            if lake.get(*above) is None:
                missing.append((key, one))
            elif one.defines:
                waiting.append(above)
    return missing


# -- a finished project ------------------------------------------------------------------------------------------


def test_versions_are_listed_by_use(project):
    current, old = (one.name for one in feature_versions(project.lake))
    assert current == what_is_current(project.stage).current_version
    assert old != current
    # What was used last counts, not what was made last.
    index = project.lake.head("candidate_index", None, old)
    project.lake.point(index, None, old)
    assert [one.name for one in feature_versions(project.lake)] == [old, current]


def test_the_old_version_goes_and_everything_still_works(project):
    lake = project.lake
    old = feature_versions(lake)[1].name
    before, asked = everything(lake), ask(project)
    found = planned(project, keep=0)
    assert found.dropped_versions == [old]
    assert {one.version for one in found.artifacts if one.table == "feature_blocks"} == {old}
    size = sum(file.stat().st_size for file in lake.folder.rglob("*") if file.is_file())
    removed = collect(lake, found)
    freed = size - sum(file.stat().st_size for file in lake.folder.rglob("*") if file.is_file())
    heads = sum(len(json.dumps(head, indent=1)) for head in found.heads)
    assert freed - heads == found.bytes == sum(one for _, one in removed.values()) > 0
    assert everything(lake) == before - names(found.artifacts)
    assert [one.name for one in feature_versions(lake)] != [old] and len(feature_versions(lake)) == 1
    assert not [one for one in lake.artifacts() if one.header.get("version") == old and one.table != "selection"]
    assert not [head for head in lake.heads() if head["scope"].startswith(old)]
    assert missing_above_heads(lake) == []
    assert ask(project) == asked
    assert set(project.run().values()) == {0}
    assert names(planned(project, keep=0).artifacts) == set()


def test_a_kept_older_version_can_still_be_queried(project):
    lake = project.lake
    old = feature_versions(lake)[1].name
    asked = ask(project, old)
    assert asked != ask(project)
    found = planned(project, keep=1)
    assert found.dropped_versions == [] and not found.heads
    collect(lake, found)
    assert ask(project, old) == asked
    kept = [one for one in lake.artifacts("selection") if one.header["version"] == old]
    strategies = ("prism", "uniform", "less")
    assert {one.partition for one in kept} == {f"{one}|{target}" for one in strategies for target in ("plain", "pairs")}
    assert missing_above_heads(lake) == []


def test_nothing_young_goes(project):
    found = planned(project, keep=0, min_age=HOUR)
    assert found.artifacts == [] and found.heads == []
    assert found.spared_for_age == len(planned(project, keep=0).artifacts) > 0
    late = planned(project, keep=0, min_age=HOUR, now=time.time() + 2 * HOUR)
    assert names(late.artifacts) == names(planned(project, keep=0).artifacts)


def test_a_run_in_progress_spares_what_it_may_work_from(project):
    lake = project.lake
    later = time.time() + 2 * HOUR
    assert planned(project, keep=0, min_age=HOUR, now=later).artifacts
    # It began before the current version was made: all that was there then may be in its hands.
    began = min(one.used for one in feature_versions(lake)) - 1
    assert planned(project, keep=0, min_age=HOUR, now=later, running_since=began).artifacts == []
    # Heads that moved since it began: it may have read what they showed before, and that is the old version.
    moved = max(head["time"] for head in lake.heads())
    found = planned(project, keep=0, min_age=HOUR, now=later, running_since=moved - 0.001)
    assert found.artifacts == [] and found.heads == []
    assert planned(project, keep=0, min_age=HOUR, now=later, running_since=moved + 1).artifacts


def test_a_run_that_has_not_ended_is_seen(project):
    import dagster as dg

    instance = dg.DagsterInstance.ephemeral()
    assert runs_in_progress(instance) == []
    began = time.time()
    run = instance.create_run_for_job(dg.job(name="nothing")(lambda: None))
    instance.report_engine_event("x", run)
    instance.handle_new_event(_started(run))
    [found] = runs_in_progress(instance)
    assert found.run_id == run.run_id and abs(found.since - began) < 60


def _started(run):
    from dagster._core.events import DagsterEvent, DagsterEventType
    from dagster._core.events.log import EventLogEntry

    event = DagsterEvent(DagsterEventType.RUN_START.value, run.job_name)
    return EventLogEntry(None, "info", "", run.run_id, time.time(), None, run.job_name, event)


def test_a_selection_that_an_adapter_looked_at_stays_but_not_its_inputs(project):
    lake = project.lake
    adapter = lake.require("adapters", "prism|plain/seed-0")
    looked_at = adapter.header["lineage"]["selection"]["fingerprint"]
    for head in lake.heads("selection"):
        lake.retire("selection", head["partition"], head["scope"])
    for table in ("evaluations", "report", "candidate_index"):
        for head in lake.heads(table):
            lake.retire(table, head["partition"], head["scope"])
    collect(lake, planned(project, keep=0))
    selection = lake.get("selection", looked_at)
    assert selection is not None and project.lake.local(selection, suffix=".jsonl").exists()
    assert lake.get("candidate_index", selection.header["inputs"]["index"]["fingerprint"]) is None
    edges = trace(lake, adapter)["artifacts"][1]["inputs"]
    assert {edge["role"] for edge in edges if edge["missing"]} == {"index"}


def test_the_heads_of_a_retired_shard_go_and_what_is_needed_of_it_stays(project):
    lake = project.lake
    shard = next(head["partition"] for head in lake.heads("candidates") if head["partition"].startswith("shard1"))
    next(project.inbox.glob("shard1*")).unlink()
    assert not planned(project).heads  # the live pool still has it
    project.run()
    collect(lake, planned(project, keep=0))
    version = feature_versions(lake)[0].name
    assert lake.head("candidate_features", shard, version) is None
    assert [head["partition"] for head in lake.heads("rejects")] == [h["partition"] for h in lake.heads("candidates")]
    # The pinned warm-up sample was drawn from it.
    assert {one.partition for one in lake.artifacts("candidates")} >= {shard}
    assert missing_above_heads(lake) == []


def test_without_an_inbox_no_shard_counts_as_retired(project):
    for path in project.inbox.glob("*"):
        path.unlink()
    project.inbox.rmdir()
    assert what_is_current(project.stage).inbox_shards is None
    assert not [head for head in planned(project, keep=0).heads if head["table"] == "candidates"]


def test_without_a_usable_model_the_version_used_last_stays(project):
    lake = project.lake
    current, old = (one.name for one in feature_versions(lake))
    for path in (project.folder / "model").glob("*.safetensors"):
        path.unlink()
    today = what_is_current(project.stage)
    assert today.current_version is None and today.current_scopes == ()
    found = planned(project, keep=0)
    assert found.kept_versions == [current] and found.dropped_versions == [old]
    assert {head["table"] for head in found.heads} <= {h["table"] for h in lake.heads() if h["scope"].startswith(old)}


def test_a_damaged_head_is_no_reason_to_forget_what_it_needs(project):
    lake = project.lake
    index = lake.head("candidate_index", None, feature_versions(lake)[0].name)
    with open(project.lake.local(index), "rb+") as file:
        file.truncate(project.lake.local(index).stat().st_size // 2)
    with pytest.raises(DamagedArtifact, match="prism run"):
        planned(project, keep=0)


# -- small lakes -------------------------------------------------------------------------------------------------


@pytest.fixture
def lake(tmp_path):
    return Lake(root=str(tmp_path / "lake"))


def index_columns(shards=("s",)):
    return {"shard": list(shards), "segment": [""] * len(shards), "features": [""] * len(shards)}


def table(lake, name, number=0, version=None, inputs=None, partition=None, columns=None):
    recipe = Recipe(name, 1, {"n": number}, inputs or {}, version=version, partition=partition)
    return lake.publish_table(recipe, pa.table(columns or {"x": [number]}))


def test_the_blocks_of_an_unfinished_shard_stay(lake):
    rows = table(lake, "candidates")
    lake.point(rows, "s1", "corpus")
    lake.point(rows, "s2", "corpus")
    listed, loose = (table(lake, "feature_blocks", n, "v2") for n in range(2))
    old = table(lake, "feature_blocks", 2, "v1")
    lake.point(listed, listed.fingerprint, "v2")
    features = table(lake, "candidate_features", columns={"block": [listed.fingerprint]}, version="v2")
    lake.point(features, "s1", "v2")
    options = {"current_version": "v2", "keep": 0, "min_age": 0.0, "inbox_shards": ["s1", "s2"]}
    assert names(plan(lake, **options).artifacts) == {("feature_blocks", old.fingerprint)}
    lake.point(features, "s2", "v2")  # now nothing is unfinished
    assert names(plan(lake, **options).artifacts) == {("feature_blocks", one.fingerprint) for one in (old, loose)}


def test_any_table_kept_under_a_version_goes_and_stays_with_it(lake):
    for version in ("v1", "v2"):
        lake.point(table(lake, "candidate_index", 1, version, columns=index_columns()), None, version)
        lake.point(table(lake, "something_new", version, version), "t", f"{version}/prism")
    found = plan(lake, current_version="v2", current_scopes=["corpus"], keep=0, min_age=0.0)
    assert {(head["table"], head["scope"]) for head in found.heads} == {
        ("candidate_index", "v1"), ("something_new", "v1/prism")
    }  # fmt: skip
    assert [one.version for one in found.artifacts if one.table == "something_new"] == ["v1"]


def test_a_scope_of_the_corpus_goes_when_nothing_kept_came_from_it(lake):
    for number, (scope, version) in enumerate((("old", "v1"), ("new", "v2"))):
        rows = table(lake, "candidates", number)
        lake.point(rows, "s", scope)
        lake.point(table(lake, "rejects", number), "s", scope)
        index = table(lake, "candidate_index", number, version, {"rows": rows}, columns=index_columns())
        lake.point(index, None, version)
    options = {"current_version": "v2", "current_scopes": ["new"], "min_age": 0.0}
    assert plan(lake, **options, keep=1).heads == []
    gone = plan(lake, **options, keep=0)
    assert {(head["table"], head["scope"]) for head in gone.heads} == {
        ("candidates", "old"), ("rejects", "old"), ("candidate_index", "v1")
    }  # fmt: skip
    assert len(gone.artifacts) == 3
    unsure = plan(lake, current_version="v2", current_scopes=[], keep=0, min_age=0.0)
    assert {head["scope"] for head in unsure.heads} == {"v1"}


def test_the_newest_older_versions_stay(lake, monkeypatch):
    for second, version in enumerate(("a", "b", "c", "d")):
        monkeypatch.setattr(time, "time", lambda second=second: 1_000_000.0 + second)
        lake.point(table(lake, "candidate_index", version, version, columns=index_columns()), None, version)
    monkeypatch.undo()
    cases = (("a", 1), ("d", 2), (None, 1))
    kept = [plan(lake, current_version=now, keep=keep, min_age=0.0).kept_versions for now, keep in cases]
    assert kept == [["a", "d"], ["d", "c", "b"], ["d", "c"]]


def test_leftovers_go_when_they_are_old_and_damaged_files_always(lake):
    kept = table(lake, "kept")
    lake.point(kept)
    folder = lake.folder
    paths = {
        "draft": folder / "unpublished" / "abc.parquet",
        "head": folder / "heads" / "kept" / "_" / "._.json.abc",
        "alone": folder / "artifacts" / "kept" / f"{'0' * 32}.jsonl",
        "remembered": folder / "cache" / "scores" / "query" / ("1" * 32),
        "damaged": folder / "artifacts" / "kept" / "x.parquet.1234.damaged",
    }
    stays = [folder / "cache" / "scores" / "query" / kept.fingerprint, folder / "cache" / "inbox.json"]
    for path in (*paths.values(), *stays):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    nested = folder / "unpublished" / "folder" / "below"
    nested.mkdir(parents=True)
    (nested / "file").write_bytes(b"1")
    os.utime(nested.parent, (0, 0))  # the folder is old, what lies in it is not
    young = plan(lake, min_age=HOUR)
    assert [[lake.store.local(key) for key in one.keys] for one in young.leftovers] == [[paths["damaged"]]]
    old = plan(lake, min_age=HOUR, now=time.time() + 2 * HOUR)
    assert {lake.store.local(one.keys[0]) for one in old.leftovers} == {*paths.values(), nested.parent}
    assert old.artifacts == [] and old.by_table() == {"leftovers": (6, 26)}
    assert collect(lake, old) == {"leftovers": (6, 26)}
    assert not any(path.exists() for path in (*paths.values(), nested))
    assert all(path.exists() for path in stays) and lake.head("kept") is not None


def test_a_table_and_its_attachment_go_together(lake):
    artifact = lake.publish_table(
        Recipe("selection", 1), pa.table({"x": [1]}), attachments={".jsonl": lambda path: path.write_text("{}")}
    )
    found = plan(lake, min_age=0.0)
    assert [one.keys for one in found.artifacts] == [(artifact.key, artifact.key.replace(".parquet", ".jsonl"))]
    collect(lake, found)
    assert not any((lake.folder / "artifacts" / "selection").iterdir())
    assert not any((lake.folder / "unpublished").iterdir())


def test_what_lies_beside_a_table_goes_with_it_whatever_its_kind(lake):
    attachments = {suffix: lambda path: path.write_text("x") for suffix in (".csv", ".html")}
    artifact = lake.publish_table(Recipe("somebodys", 1), pa.table({"x": [1]}), attachments=attachments)
    strange = lake.folder / "artifacts" / "somebodys" / "notes.txt"  # by hand, and no artefact's
    strange.write_text("x")
    for one in plan(lake, min_age=0.0).artifacts:
        assert one.keys[0] == artifact.key and len(one.keys) == 3
    lake.local(artifact).unlink()
    collect(lake, plan(lake, min_age=0.0))
    assert [path.name for path in strange.parent.iterdir()] == ["notes.txt"]


def test_what_a_head_came_to_show_after_the_plan_stays(lake):
    shown, other = table(lake, "selection", 0), table(lake, "selection", 1)
    found = plan(lake, min_age=0.0)
    assert len(found.artifacts) == 2
    lake.point(shown, "prism|t")
    assert collect(lake, found)["selection"][0] == 1
    assert lake.head("selection", "prism|t").fingerprint == shown.fingerprint
    assert lake.get("selection", other.fingerprint) is None


def test_a_head_that_moved_after_the_plan_stays(lake):
    lake.point(table(lake, "candidate_index", 1, "v1", columns=index_columns()), None, "v1")
    lake.point(table(lake, "candidate_index", 2, "v2", columns=index_columns()), None, "v2")
    found = plan(lake, current_version="v2", keep=0, min_age=0.0)
    assert [head["scope"] for head in found.heads] == ["v1"]
    again = lake.point(lake.head("candidate_index", None, "v1"), None, "v1")
    collect(lake, found)
    assert lake.head("candidate_index", None, "v1").fingerprint == again.fingerprint


def test_an_empty_lake_has_nothing_to_remove(lake):
    found = plan(lake, min_age=0.0)
    assert (found.artifacts, found.leftovers, found.heads, found.kept_versions) == ([], [], [], [])


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def prism(project, monkeypatch):
    from prism_assets.cli import app

    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("PRISM_CONFIG", str(project.config))
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--config", str(project.config)])


def test_the_command_shows_and_removes_only_when_told(project, prism):
    lake = project.lake
    before = everything(lake)
    shown = prism("gc", "--keep", "0", "--min-age", "0s", "--json")
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert said["removed"] is False and everything(lake) == before
    done = prism("gc", "--keep", "0", "--min-age", "0s", "--yes", "--json")
    assert done.exit_code == 0, done.output
    did = json.loads(done.stdout)
    assert did["removed"] is True and did["bytes"] == said["bytes"] and did["tables"] == said["tables"]
    assert before - everything(lake) == {
        (one["table"], one["fingerprint"]) for one in said["artifacts"] if one["table"]
    }
    asked = prism("sql", "SELECT count(*) AS n FROM features", "--json")  # the catalogue names no removed file
    assert json.loads(asked.stdout) == [{"n": 40}]


def test_the_command_refuses_an_age_that_is_none(prism):
    assert prism("gc", "--min-age", "soon").exit_code == 2


def test_query_takes_an_older_version_by_its_beginning(project, prism):
    current, old = (one.name for one in feature_versions(project.lake))
    answers = {}
    for name, arguments in {"now": [], "current": ["--version", current], "old": ["--version", old[:6]]}.items():
        result = prism("query", "plain", "-k", "3", "--json", *arguments)
        assert result.exit_code == 0, result.output
        answers[name] = json.loads(result.stdout)
    assert answers["now"] == answers["current"] != answers["old"]
    assert answers["old"] == ask(project, old)[:3]
    unknown = prism("query", "plain", "--version", "nowhere")
    assert unknown.exit_code == 2 and old in unknown.output


def test_lineage_of_a_missing_thing_is_the_users_to_mend(project, prism):
    assert prism("lineage", "selection[prism|nobody]").exit_code == 2
    found = prism("lineage", "selection[prism|plain]", "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["thing"] == find_artifact(project.lake, "selection[prism|plain]").fingerprint
