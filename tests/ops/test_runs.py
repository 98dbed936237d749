"""Runs whose process is gone are closed and give back what they hold; those of running processes are not."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

from prism_assets.compat import sleeping_while_waiting
from prism_assets.ops import runs
from prism_assets.ops.runs import (
    PROCESS_TAG,
    close_orphaned_runs,
    one_process,
    registered,
    wait_for_slots,
    waiting,
    work_on,
)

spawn = multiprocessing.get_context("spawn")


@dg.asset(pool="model")
def worked_on():
    """Stands for any step that loads the model."""


@pytest.fixture
def instance(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(
        "concurrency: {pools: {default_limit: 1, granularity: op}}\ntelemetry: {enabled: false}\n"
    )
    with dg.DagsterInstance.from_config(str(home)) as found:
        yield found


def started(instance: dg.DagsterInstance, tags: dict[str, str] | None = None) -> dg.DagsterRun:
    """A run that counts as started and holds the one slot of the pool, as a killed process leaves it."""
    job = dg.Definitions([worked_on]).resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(job, tags=tags)
    instance.report_dagster_event(
        dg.DagsterEvent(dg.DagsterEventType.PIPELINE_START.value, job_name=run.job_name), run_id=run.run_id
    )
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("model")
    assert storage.claim_concurrency_slot("model", run.run_id, "worked_on").is_claimed
    return run


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    return instance.get_run_by_id(run.run_id).status


def holders(instance: dg.DagsterInstance) -> list[str]:
    return [slot.run_id for slot in instance.event_log_storage.get_concurrency_info("model").claimed_slots]


def waiting_runs(instance: dg.DagsterInstance) -> set[str]:
    return {one.run_id for one in instance.event_log_storage.get_concurrency_info("model").pending_steps}


def the_job() -> dg.JobDefinition:
    definitions = dg.Definitions([worked_on], jobs=[dg.define_asset_job("work")], executor=one_process)
    return definitions.resolve_job_def("work")


def execute_as_the_daemon_does(home: str) -> None:
    with dg.DagsterInstance.from_config(home) as instance:
        dg.execute_job(dg.reconstructable(the_job), instance=instance)


def work_until_killed(home: str, run_id: str, working) -> None:
    with dg.DagsterInstance.from_config(home) as instance:
        work_on(instance.get_run_by_id(run_id), instance)
        working.set()
        time.sleep(600)


@pytest.fixture
def worker(instance):
    """Start a process that works on a run of the daemon; it is killed at the end at the latest."""
    children = []

    def start(run: dg.DagsterRun):
        working = spawn.Event()
        child = spawn.Process(target=work_until_killed, args=(instance.root_directory, run.run_id, working))
        child.start()
        children.append(child)
        assert working.wait(60)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def test_a_run_of_the_daemon_is_closed_once_its_process_is_killed(instance, worker, make_project, tmp_path):
    run = started(instance)
    child = worker(run)
    assert close_orphaned_runs(instance) == []
    assert status(instance, run) == dg.DagsterRunStatus.STARTED
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    project = make_project(tmp_path / "project")
    sensor = next(one for one in project.definitions.sensors if one.name == "dead_runs")
    tick = sensor.evaluate_tick(dg.build_sensor_context(instance=instance))
    assert tick.skip_message == "1 runs of killed processes closed."
    assert status(instance, run) == dg.DagsterRunStatus.FAILURE  # which `run_retries` take up
    assert holders(instance) == []
    assert not list((Path(instance.root_directory) / "processes").iterdir())


def test_a_run_that_was_to_be_cancelled_ends_cancelled(instance, worker):
    run = started(instance)
    child = worker(run)
    instance.report_run_canceling(run)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert close_orphaned_runs(instance) == [run.run_id]
    assert status(instance, run) == dg.DagsterRunStatus.CANCELED


def test_a_run_of_the_command_ends_cancelled_with_its_process(instance):
    with registered(instance) as name:
        run = started(instance, {PROCESS_TAG: name})
        assert close_orphaned_runs(instance) == []
    assert close_orphaned_runs(instance) == [run.run_id]
    assert status(instance, run) == dg.DagsterRunStatus.CANCELED
    assert holders(instance) == []


def test_a_run_is_known_to_live_while_it_waits_for_a_slot_and_to_be_dead_when_it_was_killed_there(instance):
    holder = started(instance)
    child = spawn.Process(target=execute_as_the_daemon_does, args=(instance.root_directory,))
    child.start()
    try:
        until = time.monotonic() + 60
        while not (others := waiting_runs(instance) - {holder.run_id}):
            assert time.monotonic() < until
            time.sleep(0.2)
        (waiting,) = others
        assert close_orphaned_runs(instance) == []
    finally:
        child.kill()
        child.join()
    assert close_orphaned_runs(instance) == [waiting]
    assert instance.get_run_by_id(waiting).status == dg.DagsterRunStatus.FAILURE
    assert status(instance, holder) == dg.DagsterRunStatus.STARTED


def test_a_run_that_ends_by_itself_leaves_nothing_to_close(instance):
    child = spawn.Process(target=execute_as_the_daemon_does, args=(instance.root_directory,))
    child.start()
    child.join()
    (run,) = instance.get_runs()
    assert run.status == dg.DagsterRunStatus.SUCCESS and close_orphaned_runs(instance) == []
    assert not list((Path(instance.root_directory) / "processes").iterdir())


def test_what_another_machine_works_on_or_nobody_has_begun_is_left_alone(instance):
    run = started(instance)
    assert close_orphaned_runs(instance) == []
    folder = Path(instance.root_directory) / "processes"
    folder.mkdir(exist_ok=True)
    (folder / run.run_id).write_text("another machine")
    assert close_orphaned_runs(instance) == []
    assert status(instance, run) == dg.DagsterRunStatus.STARTED
    assert (folder / run.run_id).exists()


def test_who_waits_is_told_for_whom_and_goes_on_when_the_slot_is_free(instance):
    run = started(instance)
    told: list[str] = []
    # The instance is used by one thread at a time: this one only opens its own.
    home = instance.root_directory

    def let_go(message: str) -> None:
        told.append(message)

        def free() -> None:
            with dg.DagsterInstance.from_config(home) as another:
                another.event_log_storage.free_concurrency_slots_for_run(run.run_id)

        threading.Thread(target=free).start()

    wait_for_slots(instance, {"model"}, let_go)
    assert told == [f"run {run.run_id[:8]} works on worked_on"]
    wait_for_slots(instance, {"model", "unheard_of"}, told.append)
    assert len(told) == 1


def test_who_waits_for_the_dead_goes_on(instance, worker):
    run = started(instance)
    child = worker(run)
    wait_for_slots(instance, {"model"}, lambda _: os.kill(child.pid, signal.SIGKILL))
    assert status(instance, run) == dg.DagsterRunStatus.FAILURE


def test_a_process_that_dies_while_others_are_closed_is_found_by_the_next_look(instance, worker, monkeypatch):
    run = started(instance)
    child = worker(run)
    real = runs._orphaned

    def and_then_it_dies(*arguments):
        found = real(*arguments)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_orphaned", and_then_it_dies)
        assert close_orphaned_runs(instance) == []
    assert close_orphaned_runs(instance) == [run.run_id]
    assert status(instance, run) == dg.DagsterRunStatus.FAILURE


def test_a_run_that_waits_inside_of_dagster_goes_on_when_the_holder_is_killed(instance):
    """Between `wait_for_slots` and the step another run took the slot, and then its process was killed."""
    with registered(instance) as name:
        run = started(instance, {PROCESS_TAG: name})
    job = dg.Definitions([worked_on]).resolve_implicit_global_asset_job_def()
    with waiting(instance):
        assert job.execute_in_process(instance=instance).success
    assert status(instance, run) == dg.DagsterRunStatus.CANCELED


def test_a_run_that_waits_for_a_slot_sleeps(instance):
    started(instance)
    job = dg.Definitions([worked_on]).resolve_implicit_global_asset_job_def()
    with InstanceConcurrencyContext(instance, instance.create_run_for_job(job)) as waiting:
        assert not waiting.claim("model", "worked_on")
        with sleeping_while_waiting():
            assert 0 < waiting.interval_to_next_pending_claim_check() <= 15
    with InstanceConcurrencyContext(instance, instance.create_run_for_job(job)) as idle:
        assert idle.interval_to_next_pending_claim_check() == 0
