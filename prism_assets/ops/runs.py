"""Runs and the processes that work on them: what the runs of killed processes hold is given back.

A step of a pool holds one of its slots while it works. Dagster gives back the slot of a run that ends, but its launcher
for one machine never notices that a run's process is gone (killed, power cut): the run would count as started, and its
slot as taken, for ever, and everything else would wait for it. So a process that works on a run says so by a locked
file in the instance's folder, and the system lets go of the lock however the process ends.

`flock` by hand, not filelock: that makes a file under its final name and locks it afterwards, so another process can
see it in between without a lock and take its maker for dead. Here a draft is locked and then renamed: the lock belongs
to the inode and goes along, so the name is never seen without it.
"""

import fcntl
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import dagster as dg

from prism_assets.compat import sleeping_while_waiting

# Which process of `prism run` works on a run. A run that Dagster's daemon started is known by its own id.
PROCESS_TAG = "prism/process"
_FOLDER = "processes"
_POLL_SECONDS = 1.0
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

# The locked file of the run that this process works on for Dagster's daemon.
_working_on: IO[str] | None = None


@contextmanager
def registered(instance: dg.DagsterInstance) -> Iterator[str]:
    """A name of this process, for PROCESS_TAG; it counts as alive for `close_orphaned_runs` until the process ends."""
    name = uuid.uuid4().hex
    with _locked(instance, name):
        try:
            yield name
        finally:
            (_folder(instance) / name).unlink(missing_ok=True)


def work_on(run: dg.DagsterRun, instance: dg.DagsterInstance) -> None:
    """Say that this process works on `run` from now on until it ends, or until it works on another run."""
    global _working_on
    if _working_on is not None:
        _working_on.close()
    _working_on = _locked(instance, run.run_id)


class _Watched(dg.Executor):
    """Dagster's in-process executor, which says what it works on before its first step waits for a slot."""

    def __init__(self, executor: dg.Executor) -> None:
        self._executor = executor

    @property
    def retries(self) -> Any:
        return self._executor.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._executor.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        work_on(plan_context.dagster_run, plan_context.instance)
        with waiting(plan_context.instance):
            yield from self._executor.execute(plan_context, execution_plan)


def _executor(context: dg.InitExecutorContext) -> dg.Executor:
    create = dg.in_process_executor.executor_creation_fn
    assert create is not None
    return _Watched(create(context))


# All steps of a run in its one process: only so does the life of the process say whether the run lives.
one_process = dg.ExecutorDefinition(
    name="in_process",
    config_schema=dg.in_process_executor.config_schema,  # pyright: ignore[reportArgumentType]
    executor_creation_fn=_executor,
    description="Execute all steps in a single process, which says that it works on the run.",
)


def close_orphaned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Close the runs whose process, on this machine, is gone, and free their slots; returns their ids.

    A run of `prism run` is closed as cancelled: its user runs the command again. One of Dagster's daemon is closed as
    failed, so that the instance's `run_retries` take it up. Runs of which nothing is known here (other machines, other
    executors, runs that are only starting) are left to Dagster's own run monitoring.
    """
    closed = []
    # Looked at once: of a process that dies meanwhile the file is all that says so, and has to stay for the next look.
    gone = _orphaned(instance)
    for run in [one.dagster_run for one in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED))]:
        ours = run.tags.get(PROCESS_TAG)
        name = ours or run.run_id
        # A process of `prism run` has its file before its first run; one of the daemon, before its first step.
        if not (name in gone or (ours and not (_folder(instance) / name).exists())):
            continue
        message = "The process of this run was killed. What it had finished is kept; a later run goes on."
        if ours or run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=message)
        else:
            instance.report_run_failed(run, message)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        closed.append(run.run_id)
    for name in gone:
        (_folder(instance) / name).unlink(missing_ok=True)
    return closed


def waiting(instance: dg.DagsterInstance) -> AbstractContextManager[None]:
    """A context in which a run that waits for a slot sleeps, and gives back what runs of killed processes hold: the one
    that it waits for may be killed meanwhile."""
    return sleeping_while_waiting(lambda: close_orphaned_runs(instance))


def wait_for_slots(instance: dg.DagsterInstance, pools: set[str], on_wait: Callable[[str], None]) -> None:
    """Return once every pool has a free slot. Says, once, which run and step hold one that has none."""
    said = False
    while holders := [one for pool in pools for one in _holders(instance, pool)]:
        if not said:
            on_wait("; ".join(f"run {run[:8]} works on {step}" for run, step in holders))
            said = True
        close_orphaned_runs(instance)
        time.sleep(_POLL_SECONDS)


def _holders(instance: dg.DagsterInstance, pool: str) -> list[tuple[str, str]]:
    """Run and step of each taken slot of a pool that has no free one."""
    found = instance.event_log_storage.get_concurrency_info(pool)
    taken = [(slot.run_id, slot.step_key) for slot in found.claimed_slots]
    return taken if taken and len(taken) >= found.slot_count else []


def _folder(instance: dg.DagsterInstance) -> Path:
    return Path(instance.root_directory) / _FOLDER


def _locked(instance: dg.DagsterInstance, name: str) -> IO[str]:
    """The open file of a process or run; closing it lets go of its lock. It has the lock before it has its name."""
    folder = _folder(instance)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}-{uuid.uuid4().hex}"
    file = open(draft, "w", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(platform.node())
    file.flush()
    os.replace(draft, folder / name)
    return file


def _is_orphaned(path: Path) -> bool:
    """Whether the process that locked this file is gone; False without such a file, or for another machine's."""
    try:
        with open(path, encoding="utf-8") as file:
            if file.read() != platform.node():
                return False
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return False
    return True


def _orphaned(instance: dg.DagsterInstance) -> set[str]:
    """The names of the files of processes of this machine that are gone."""
    folder = _folder(instance)
    files = list(folder.iterdir()) if folder.is_dir() else []
    return {path.name for path in files if not path.name.startswith(".") and _is_orphaned(path)}
