"""What happens without a hand: which files become shards, what is asked for when, and what never is."""

import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.definitions.events import AssetKeyPartitionKey

from prism_assets.ops.pipeline import steps_of
from prism_assets.ops.ranges import RANGE_END, RANGE_START, joined_requests, range_tags
from prism_assets.ops.schedules import automated_keys
from prism_assets.project import Project as Named
from prism_assets.tables import ASSETS, JOBS, asset_named

HOUR_AGO = time.time() - 3600


def settle(path: Path) -> None:
    """Make a file look as if it had not changed for an hour."""
    os.utime(path, (HOUR_AGO, HOUR_AGO))


@pytest.fixture
def look(project) -> Callable[..., dg.SensorResult | dg.SkipReason]:
    """Evaluate a sensor of the project once."""

    def evaluate(name: str, cursor: str | None = None) -> dg.SensorResult | dg.SkipReason:
        definitions = project.definitions
        sensor = next(one for one in definitions.sensors if one.name == name)
        context = dg.build_sensor_context(
            instance=project.instance,
            cursor=cursor,
            resources={**definitions.resources, "lake": project.lake},
            definitions=definitions,
        )
        tick = sensor.evaluate_tick(context)  # what the daemon does, with the checks that it makes
        evaluate.cursor = tick.cursor
        if not tick.run_requests:
            return dg.SkipReason(tick.skip_message)
        return dg.SensorResult(run_requests=tick.run_requests, cursor=tick.cursor)

    return evaluate


@pytest.fixture
def project(tmp_path: Path, make_project):
    found = make_project(tmp_path / "project")
    for path in found.inbox.iterdir():
        settle(path)
    return found


def shards(project) -> set[str]:
    return {key.rpartition("-")[0] for key in project.instance.get_dynamic_partitions("shard")}


def test_settled_files_become_shards_and_the_manifest_is_not_asked_for_by_hand(project, look):
    nothing_asked = look("inbox")
    assert shards(project) == {path.stem for path in project.inbox.iterdir()}
    assert isinstance(nothing_asked, dg.SkipReason)  # the condition of `candidates` takes it from here
    assert isinstance(look("inbox"), dg.SkipReason)


def test_a_file_that_is_still_being_written_waits(project, look):
    look("inbox")
    before = shards(project)
    late = project.add("late", [{"prompt": "copy: a=", "completion": "a"}])
    assert isinstance(look("inbox"), dg.SkipReason)
    settle(late)
    look("inbox")
    assert shards(project) == before | {"late"}


def ingest(project) -> None:
    """Read what the sensor registered, and show it in a manifest."""
    execute(project, ["base_model"])
    for key in project.instance.get_dynamic_partitions("shard"):
        execute(project, ["candidates"], key)
    execute(project, ["targets"], "plain")
    execute(project, ["live_pool"])


def test_an_edited_file_is_a_new_shard_and_its_old_one_is_retired_with_a_new_manifest(project, look):
    look("inbox")
    ingest(project)
    keys = set(project.instance.get_dynamic_partitions("shard"))
    path = next(iter(sorted(project.inbox.iterdir())))
    path.write_text(path.read_text() + json.dumps({"prompt": "copy: zz=", "completion": "zz"}) + "\n")
    settle(path)
    result = look("inbox")
    now = set(project.instance.get_dynamic_partitions("shard"))
    assert len(keys - now) == len(now - keys) == 1
    assert [request.asset_selection for request in result.run_requests] == [[dg.AssetKey("live_pool")]]


def test_a_removed_file_is_retired_although_nothing_new_arrives(project, look):
    look("inbox")
    ingest(project)
    path = next(iter(sorted(project.inbox.iterdir())))
    path.unlink()
    result = look("inbox")
    assert path.stem not in shards(project)
    assert [request.asset_selection for request in result.run_requests] == [[dg.AssetKey("live_pool")]]
    # Until the manifest is made the same request stands, under the same key, so it runs once.
    again = look("inbox", result.cursor)
    assert [request.run_key for request in again.run_requests] == [request.run_key for request in result.run_requests]
    execute(project, ["live_pool"])
    assert isinstance(look("inbox", result.cursor), dg.SkipReason)


def test_a_changed_target_file_asks_for_its_target_alone_and_once(project, look):
    for target in project.settings.targets.values():
        settle(target.examples)
        settle(target.eval)
    assert isinstance(look("target_files"), dg.SkipReason)
    cursor = look.cursor
    changed = project.settings.targets["plain"].eval
    changed.write_text(changed.read_text() + json.dumps({"prompt": "copy: yy=", "completion": "yy"}) + "\n")
    assert isinstance(look("target_files", cursor), dg.SkipReason)  # not at rest yet
    settle(changed)
    os.utime(changed, (HOUR_AGO + 60, HOUR_AGO + 60))
    result = look("target_files", cursor)
    assert [request.partition_key for request in result.run_requests] == ["plain"]
    assert isinstance(look("target_files", result.cursor), dg.SkipReason)


def test_a_target_file_that_was_only_touched_costs_a_look_and_nothing_else(project, look):
    look("inbox")
    project.run()
    _, cursor = requested(project)
    _, cursor = requested(project, cursor)
    for target in project.settings.targets.values():
        settle(target.examples)
        settle(target.eval)
    look("target_files")
    os.utime(project.settings.targets["plain"].eval, (HOUR_AGO + 60, HOUR_AGO + 60))
    result = look("target_files", look.cursor)
    assert [request.partition_key for request in result.run_requests] == ["plain"]
    execute(project, ["targets"], "plain")
    made = project.instance.get_latest_materialization_event(dg.AssetKey("targets")).asset_materialization
    assert made.metadata["computed"].value == 0
    assert requested(project, cursor)[0] == {}  # the content is the same: nothing follows


def test_the_inbox_is_not_looked_at_on_the_dagster_instance_of_another_project(project, look, tmp_path):
    from prism_assets.ops.home import claim_home

    claim_home(Path(project.instance.root_directory), tmp_path / "another" / "lake")
    with pytest.raises(Exception) as failure:
        look("inbox")
    assert "retire each other's shards" in str(failure.value) + str(failure.value.__cause__)
    assert shards(project) == set()


def test_every_asset_has_a_condition_and_one_job(project):
    names = {key.path[-1] for key in project.definitions.resolve_asset_graph().get_all_asset_keys()}
    assert names == {one.name for one in ASSETS}
    assert {one.job for one in ASSETS} == set(JOBS)


def test_trust_is_never_measured_without_a_hand():
    assert asset_named("trust").condition is None
    assert [one.name for one in ASSETS if one.job == "check_trust"] == ["trust"]


def requested(project, cursor=None) -> tuple[dict[str, set[str | None]], object]:
    """What the automation sensor would request now: asset -> partitions."""
    result = dg.evaluate_automation_conditions(project.definitions, project.instance, cursor=cursor)
    keys = project.definitions.resolve_asset_graph().get_all_asset_keys()
    return {key.path[-1]: found for key in keys if (found := result.get_requested_partitions(key))}, result.cursor


def execute(project, assets: list[str], partition: str | None = None) -> None:
    job = project.definitions.resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(name) for name in assets]
    assert job.execute_in_process(instance=project.instance, asset_selection=keys, partition_key=partition).success


def test_from_nothing_the_first_thing_asked_for_is_the_model(project):
    project.instance.add_dynamic_partitions("shard", ["a-1"])
    assert requested(project)[0] == {"base_model": {None}}


def test_an_arrival_asks_for_the_new_shard_alone_and_then_for_manifest_and_index(project, look):
    look("inbox")
    project.run_steps(steps_of("select"))
    _, cursor = requested(project)
    asked, cursor = requested(project, cursor)
    assert asked == {}
    fresh = project.add("fresh", [{"prompt": f"copy: q{n}=", "completion": f"q{n}"} for n in "abcdef"])
    settle(fresh)
    look("inbox")
    new = next(key for key in project.instance.get_dynamic_partitions("shard") if key.startswith("fresh"))
    asked, cursor = requested(project, cursor)
    assert asked["candidates"] == {new}
    assert asked["candidate_features"] == {new}
    assert not {"warmup_checkpoints", "target_features", "target_direction"} & set(asked)
    execute(project, ["candidates", "candidate_features"], new)
    asked, cursor = requested(project, cursor)
    assert asked["live_pool"] == {None}
    assert asked["candidate_index"] == {None}
    assert "candidate_features" not in asked


def drop_three(project, look) -> None:
    """Three files come into the inbox, and are seen."""
    for name in ("one", "two", "three"):
        settle(project.add(name, [{"prompt": f"copy: {name}{n}=", "completion": f"{name}{n}"} for n in "abcdef"]))
    look("inbox")


def test_shards_that_land_while_the_index_is_made_are_in_the_next_index(project, look):
    look("inbox")
    project.run_steps(steps_of("select"))
    _, cursor = requested(project)
    drop_three(project, look)
    new = {key.rpartition("-")[0]: key for key in project.instance.get_dynamic_partitions("shard")}
    _, cursor = requested(project, cursor)
    execute(project, ["candidates", "candidate_features"], new["one"])
    asked, cursor = requested(project, cursor)
    assert asked["candidate_index"] == {None}
    # The request is out; before its run ends, two more shards land.
    execute(project, ["candidates", "candidate_features"], new["two"])
    execute(project, ["candidates", "candidate_features"], new["three"])
    execute(project, ["live_pool", "candidate_index"])
    asked, cursor = requested(project, cursor)
    assert asked["live_pool"] == {None}
    assert asked["candidate_index"] == {None}


def test_many_files_are_taken_together_and_none_of_them_twice(project, look):
    look("inbox")
    project.run_steps(steps_of("select"))
    _, cursor = requested(project)
    drop_three(project, look)
    sensor = next(one for one in project.definitions.sensors if one.name == "automation")
    asked, cursor = requested(project, cursor)
    new = sorted(
        key for key in project.instance.get_dynamic_partitions("shard") if key.startswith(("one", "two", "th"))
    )
    assert asked == {"candidates": set(new), "candidate_features": set(new)}
    every = list(project.instance.get_dynamic_partitions("shard"))[-3:]
    assert sorted(every) == new and sensor.sensor_type.value == "AUTOMATION"
    job = project.definitions.resolve_implicit_global_asset_job_def()
    tags = {RANGE_START: every[0], RANGE_END: every[-1]}
    keys = [dg.AssetKey(name) for name in ("candidates", "candidate_features")]
    assert job.execute_in_process(instance=project.instance, asset_selection=keys, tags=tags).success
    asked, cursor = requested(project, cursor)
    assert set(asked) == {"live_pool", "warmup_sample", "warmup_checkpoints", "candidate_index"}
    execute(project, sorted(asked))
    asked, cursor = requested(project, cursor)
    assert asked == {"selection": set(automated_keys(project.settings))}


def test_changed_settings_ask_for_what_reads_them(project, look):
    look("inbox")
    project.run_steps(steps_of("select"))
    _, cursor = requested(project)
    _, cursor = requested(project, cursor)
    project.configure(selection={"budget": 9})
    asked, _ = requested(project, cursor)
    assert asked["selection"] == set(automated_keys(project.settings))
    assert not {"candidate_features", "target_direction", "candidates"} & set(asked)


def test_an_arrival_is_trained_on_after_all_its_selections_and_only_where_that_is_said(project, look):
    """By default never; with on_arrival not in the run that selects, but in one after it."""
    from prism_assets.report.content import target_content

    def of_earlier() -> set[bool]:
        strategies = target_content(project.stage, "plain").data["strategies"]
        return {entry.get("trained_on_earlier", False) for entry in strategies.values()}

    look("inbox")
    project.run()
    assert asset_named("adapter").fine_tunes and asset_named("evaluation").fine_tunes
    for train in ("manual", "nightly", "on_arrival"):
        project.configure(train=train, selection={"budget": 9})
        _, cursor = requested(project)
        project.configure(selection={"budget": 8 if train == "manual" else 7 if train == "nightly" else 6})
        asked, cursor = requested(project, cursor)
        every = set(automated_keys(project.settings))
        assert asked == {"selection": every}, train
        for key in every:
            execute(project, ["selection"], key)
        asked, cursor = requested(project, cursor)
        assert asked == ({"adapter": every, "evaluation": every} if train == "on_arrival" else {}), train
    assert of_earlier() == {True}  # a report that is made now says so
    for key in every:
        execute(project, ["adapter", "evaluation"], key)
    assert of_earlier() == {False}
    asked, cursor = requested(project, cursor)
    assert asked == {"report": {"plain"}}
    assert requested(project, cursor)[0] == {}


def test_a_nightly_training_is_asked_for_what_changed_and_for_nothing_else(project, look):
    project.configure(train="nightly", strategies=["prism", "uniform", "random", "full"])
    look("inbox")
    project.run()
    definitions = project.definitions
    schedule = next(one for one in definitions.schedules if one.name == "nightly_training")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING

    def tonight() -> list[dg.RunRequest]:
        resources = {**project.definitions.resources, "lake": project.lake}
        context = dg.build_schedule_context(
            instance=project.instance, scheduled_execution_time=datetime(2026, 1, 1, 1), resources=resources
        )
        found = next(one for one in project.definitions.schedules if one.name == "nightly_training")
        return list(found.evaluate_tick(context).run_requests or [])

    assert tonight() == []
    project.configure(selection={"budget": 6})
    assert tonight() == []  # nothing selected yet by the new budget
    for key in ("prism|plain", "uniform|plain"):
        execute(project, ["selection"], key)
    (request,) = tonight()
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == ("prism|plain", "uniform|plain")
    job = project.definitions.resolve_job_def("refresh_selections")
    assert job.execute_in_process(instance=project.instance, tags=request.tags).success
    assert tonight() == []


@pytest.mark.parametrize(
    ("wanted", "ranges"),
    [
        ("prism|a prism|b prism|c less|a less|b less|c random|a random|b random|c", ["prism|a..random|c"]),
        ("prism|a prism|b prism|c random|a random|b random|c", ["prism|a..prism|c", "random|a..random|c"]),
        ("prism|a prism|c less|a less|c", ["prism|a..less|a", "prism|c..less|c"]),
        ("prism|b", ["prism|b..prism|b"]),
        ("prism|a less|b", ["prism|a..prism|a", "less|b..less|b"]),
        ("", []),
    ],
)
def test_partitions_become_as_few_runs_as_cover_them_and_nothing_else(project, wanted, ranges):
    target = project.settings.targets["plain"]
    named = Named.of(
        project.settings.model_copy(
            update={"targets": dict.fromkeys("abc", target), "strategies": ("prism", "less", "random")}
        )
    )
    found = range_tags(named, set(wanted.split()))
    assert [f"{tags[RANGE_START]}..{tags[RANGE_END]}" for tags in found] == ranges
    made = [
        key
        for tags in found
        for key in named.target_strategies.get_partition_keys_in_range(
            dg.PartitionKeyRange(tags[RANGE_START], tags[RANGE_END])
        )
    ]
    assert sorted(made) == sorted(wanted.split())


def test_the_selections_of_all_targets_are_one_run(project, look):
    plain = project.content["targets"]["plain"]
    project.configure(targets={"plain": plain, "other": plain, "third": plain}, strategies=["prism", "random"])
    look("inbox")
    project.run_steps(steps_of("select"))
    look("automation")
    look("automation", look.cursor)
    project.configure(selection={"budget": 9})
    found = look("automation", look.cursor)
    assert isinstance(found, dg.SensorResult) and found.run_requests is not None
    (request,) = found.run_requests
    assert list(request.asset_selection or ()) == [dg.AssetKey("selection")]
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == ("prism|plain", "random|third")
    look("automation", look.cursor)  # what was asked for is not asked for again
    assert isinstance(look("automation", look.cursor), dg.SkipReason)


def test_what_a_selection_is_made_from_is_not_torn_from_it(project, look):
    """Of a backfill that makes the index or a direction too nothing is taken out; what only follows is left to it."""
    named = Named.of(project.settings)
    parts = {"target_direction": ["plain"], "selection": ["prism|plain", "uniform|plain"], "report": ["plain"]}
    graph = project.definitions.resolve_asset_graph()

    def backfill(*names: str) -> dg.RunRequest:
        keys = {AssetKeyPartitionKey(named.key(name), key) for name in names for key in parts[name]}
        subset = AssetGraphSubset.from_asset_partition_set(keys, graph)
        return dg.RunRequest.for_asset_graph_subset(subset, {"x": "y"})

    whole = backfill("target_direction", "selection")
    assert joined_requests(named, [whole], named.key("selection")) == [whole]
    run, rest = joined_requests(named, [backfill("selection", "report")], named.key("selection"))
    assert run.tags == {"x": "y", RANGE_START: "prism|plain", RANGE_END: "uniform|plain"}
    assert rest.asset_graph_subset == backfill("report").asset_graph_subset and rest.tags == {"x": "y"}


def test_the_whole_pool_is_never_trained_on_without_a_hand(project, look):
    project.configure(train="on_arrival", strategies=["prism", "random", "full"])
    look("inbox")
    project.run_steps(steps_of("select"))
    _, cursor = requested(project)
    project.configure(selection={"budget": 9})
    asked, _ = requested(project, cursor)
    assert asked["selection"] == {"prism|plain", "random|plain"}
    assert not any(key.startswith("full|") for keys in asked.values() for key in keys if key)


def test_shards_that_another_process_added_meanwhile_do_no_harm(project, monkeypatch):
    from prism_assets.ops.shards import reconcile_shards

    with dg.DagsterInstance.ephemeral() as instance:
        add = dg.DagsterInstance.add_dynamic_partitions

        def refuse_what_is_there(self, name, keys):
            if set(keys) & set(self.get_dynamic_partitions(name)):
                raise RuntimeError("UNIQUE constraint failed")
            add(self, name, keys)

        def look_then_lose_the_race(self, name):
            monkeypatch.undo()
            seen = self.get_dynamic_partitions(name)
            add(self, name, ["b-2"])  # the other process
            monkeypatch.setattr(dg.DagsterInstance, "add_dynamic_partitions", refuse_what_is_there)
            return seen

        monkeypatch.setattr(dg.DagsterInstance, "get_dynamic_partitions", look_then_lose_the_race)
        assert reconcile_shards(Named.of(project.settings), instance, ["a-1", "b-2"]) == (["a-1", "b-2"], [])
        monkeypatch.undo()
        assert set(instance.get_dynamic_partitions("shard")) == {"a-1", "b-2"}


def test_targets_that_were_refused_for_the_kind_of_score_are_asked_for_again_when_it_changes(project):
    """A failed asset waits for its inputs or its code version to change; the settings it reads are part of that."""

    def version() -> str:
        (spec,) = [spec for asset in project.definitions.assets for spec in asset.specs if spec.key.path == ["targets"]]
        return spec.code_version

    before = version()
    assert version() == before
    project.configure(preference={"score": "sum"})
    assert version() != before
