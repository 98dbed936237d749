"""`prism run`: the whole graph in its order, run by run, on the Dagster instance that the UI shows."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import PipelineError, RunRefused, UserMistake, error_named
from prism_assets.identity import join_key
from prism_assets.project import MODEL_POOL, Project
from prism_assets.settings import Settings
from prism_assets.tables import ASSETS, Command, Partitions, asset_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dagster as dg

    from prism_assets.ops.estimate import Estimate
    from prism_assets.stage import Stage


_log = logging.getLogger(__name__)
_MEASURED_SECONDS = 0.5  # of each kind of pass, before the first step
_INTERRUPTS = ("KeyboardInterrupt", "DagsterExecutionInterruptedError")


class Step(NamedTuple):
    """One Dagster run: assets of one partitions definition."""

    title: str
    assets: tuple[str, ...]
    partitions: Partitions


def steps_of(command: Command) -> tuple[Step, ...]:
    """The steps that the registry names for a command, in its order: also of assets that were registered since."""
    titles = dict.fromkeys(one.step for one in ASSETS if one.step and command in one.commands)
    return tuple(_step(title) for title in titles)


def _step(title: str) -> Step:
    assets = [one for one in ASSETS if one.step == title]
    partitions: set[Partitions] = {one.partitions for one in assets}
    assert len(partitions) == 1, (title, partitions)
    return Step(title, tuple(one.name for one in assets), partitions.pop())


class StepResult(NamedTuple):
    """The result of one step."""

    step: Step
    run_ids: list[str]
    computed: int  # artefacts made; 0 where everything was found
    seconds: float
    failed_checks: list[str]  # "asset.check: facts"


def _nothing(*_: Any) -> None:
    pass


class Listener(NamedTuple):
    """What is called while a pipeline runs."""

    on_step: Callable[[Step], None] = _nothing
    on_result: Callable[[StepResult], None] = _nothing
    # Called, once for each step that must wait, with the runs of other processes that work with the model.
    on_wait: Callable[[str], None] = _nothing
    # Called before the first step with what all of them will take, where there is something to do; None: nobody asks.
    on_estimate: "Callable[[Estimate], None] | None" = None
    # Called after every run, which may have swallowed a Ctrl-C: raises KeyboardInterrupt where one did.
    on_run: Callable[[], None] = _nothing


def run_pipeline(
    project: Project,
    definitions: "dg.Definitions",
    instance: "dg.DagsterInstance",
    *,
    targets: Sequence[str] | None = None,
    steps: Sequence[Step] | None = None,
    listener: Listener = Listener(),
) -> list[StepResult]:
    """Look at the inbox, then materialise every asset in order (or these steps); what exists is found, not computed.

    A run whose process was killed is closed first, so that nothing waits for it. Raises PipelineError at the first run
    that fails, RunRefused (one of them) where the user must change something.
    """
    from prism_assets.ops.runs import PROCESS_TAG, close_orphaned_runs, registered

    with registered(instance) as process:
        close_orphaned_runs(instance)
        pipeline = Pipeline(project, definitions, instance, {PROCESS_TAG: process}, listener)
        return pipeline.run(steps_of("run") if steps is None else steps, targets)


@dataclass(frozen=True)
class Pipeline:
    """The graph of a project on an instance, run step by step."""

    project: Project
    definitions: "dg.Definitions"
    instance: "dg.DagsterInstance"
    tags: Mapping[str, str]
    listener: Listener

    def run(self, steps: Sequence[Step], targets: Sequence[str] | None) -> list[StepResult]:
        """Materialise the steps, for these targets or for all."""
        from prism_assets.catalog import sql
        from prism_assets.ops.runs import wait_for_slots

        self._register_inbox()
        _require_usable_model(self._stage())
        _check_benchmarks(self.project.settings)
        warms_up = any("warmup_checkpoints" in step.assets for step in steps)
        if warms_up and self._stage().shown_or_none("warmup_checkpoints") is None:
            wait_for_slots(self.instance, {MODEL_POOL}, self.listener.on_wait)  # two models rarely fit
            _require_usable_adapter(self._stage())
        self._announce(targets)
        everything = list(self.project.settings.targets)
        results = []
        for step in steps:
            self.listener.on_step(step)
            started = time.monotonic()
            of_all = any(asset_named(name).of_all_targets for name in step.assets)
            chosen = everything if of_all else targets or everything
            runs = []
            for partition_tags in self._partition_tags(step, chosen):
                wait_for_slots(self.instance, self._pools(step), self.listener.on_wait)
                runs.append(self._execute(step, {**self.tags, **partition_tags}))
            if "candidates" in step.assets:
                self._retire_what_went()
            computed = sum(count for _, count, _ in runs)
            failed = [check for *_, checks in runs for check in checks]
            results.append(StepResult(step, [run for run, *_ in runs], computed, time.monotonic() - started, failed))
            self.listener.on_result(results[-1])
        sql.refresh(self._stage().lake)
        return results

    def _announce(self, targets: Sequence[str] | None) -> None:
        """Say what the run will take. What the user must mend is for the steps to say: an estimate fails no run."""
        if self.listener.on_estimate is None:
            return
        from prism_assets.ops.estimate import estimate
        from prism_assets.ops.runs import wait_for_slots

        def free() -> None:
            wait_for_slots(self.instance, {MODEL_POOL}, self.listener.on_wait)  # two models rarely fit

        try:
            found = estimate(self._stage(), targets, seconds=_MEASURED_SECONDS, before_model=free)
        except UserMistake:
            return
        except Exception as error:  # a fault of the estimate alone
            _log.warning("No estimate of what the run takes: %s: %s", type(error).__name__, error)
            return
        if found.measured is not None:
            self.listener.on_estimate(found)

    def _stage(self) -> "Stage":
        from prism_assets.work import stage_without_run

        return stage_without_run(self.project, self.definitions)

    def _register_inbox(self) -> None:
        """Make shards of the inbox's files. Raises UserMistake where there are none."""
        from prism_assets.corpus.candidates import scan_inbox
        from prism_assets.corpus.files import READABLE
        from prism_assets.ops.shards import reconcile_shards

        inbox = self.project.settings.candidates.inbox
        if not inbox.is_dir():
            raise RunRefused(f"candidates.inbox: there is no folder {inbox}. Make it and put {READABLE} there.")
        found = scan_inbox(self._stage(), at_rest_seconds=0)
        if not found.files:
            ignored = "".join(f"\n  {one.path}: {one.reason}" for one in found.ignored[:5])
            raise RunRefused(f"candidates.inbox: {inbox} holds no file of records: {READABLE}.{ignored}")
        reconcile_shards(self.project, self.instance, [file.key for file in found.files])

    def _retire_what_went(self) -> None:
        """Take back the shards whose files were edited or removed after they were listed. What is new is for the next
        run: it is not at rest yet."""
        from prism_assets.corpus.candidates import scan_inbox
        from prism_assets.ops.shards import reconcile_shards

        live = {file.key for file in scan_inbox(self._stage(), at_rest_seconds=0).files}
        known = self.instance.get_dynamic_partitions(str(self.project.shards.name))
        reconcile_shards(self.project, self.instance, [key for key in known if key in live])

    def _partition_tags(self, step: Step, targets: Sequence[str]) -> Iterable[dict[str, str]]:
        """Run tags that make one run of a contiguous range of partitions; none where no shard has anything to do."""
        settings = self.project.settings
        if step.partitions is None:
            return [{}]
        if step.partitions == "shard":
            keys = self.instance.get_dynamic_partitions(str(self.project.shards.name))
            pending = self._pending_shards(step, keys)
            positions = [position for position, key in enumerate(keys) if key in pending]
            # One run, so the model is loaded once; what is finished in between is found.
            return [_range(keys[positions[0] : positions[-1] + 1])] if positions else []
        if list(targets) == list(settings.targets):
            if step.partitions == "target":
                return [_range(targets)]
            first = join_key(targets[0], settings.strategies[0])
            return [_range([first, join_key(targets[-1], settings.strategies[-1])])]
        if step.partitions == "target":
            return [{"dagster/partition": target} for target in targets]
        return [
            {"dagster/partition": join_key(target, strategy)} for target in targets for strategy in settings.strategies
        ]

    def _pending_shards(self, step: Step, keys: Sequence[str]) -> set[str]:
        """The shards that the lake has not finished, or that this Dagster instance has not seen finished."""
        found: set[str] = set()
        for name in step.assets:
            found |= set(keys) - self.instance.get_materialized_partitions(self.project.key(name))
            entry = asset_named(name)
            if entry.pending:
                found |= set(getattr(import_module(entry.module), entry.pending)(self._stage(), keys))
        return found

    def _pools(self, step: Step) -> set[str]:
        assets = [self.definitions.get_assets_def(self.project.key(name)) for name in step.assets]
        return {pool for asset in assets if (pool := asset.op.pool)}

    def _execute(self, step: Step, tags: dict[str, str]) -> tuple[str, int, list[str]]:
        from prism_assets.ops.runs import waiting

        job = self.definitions.resolve_implicit_global_asset_job_def()
        with waiting(self.instance):  # another run may take the slot that was free a moment ago
            result = job.execute_in_process(
                instance=self.instance,
                asset_selection=self.project.keys(step.assets),
                partition_key=tags.get("dagster/partition"),
                # The terminal shows progress of its own; the whole log is in the instance, for the UI.
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                tags={**tags, "prism/step": step.title},
                raise_on_error=False,
            )
        self.listener.on_run()
        if not result.success:
            if any(error.cls_name in _INTERRUPTS for error in _errors(result)):
                raise KeyboardInterrupt  # Dagster turned Ctrl-C into a failed step, or between steps into a failed run
            raise (RunRefused if _is_mistake(result) else PipelineError)(_reason(step, result))
        return result.run_id, _computed(result), list(_failed_checks(result))


def _require_usable_model(stage: "Stage") -> None:
    """Raise UserMistake for what would fail a step later, maybe after hours: no model, no GPU, too short a context."""
    from prism_assets.corpus.encoding import require_context
    from prism_assets.errors import ModelError

    try:
        stage.model.torch_device()
        require_context(stage)
    except ModelError as error:
        raise RunRefused(str(error)) from error


def _require_usable_adapter(stage: "Stage") -> None:
    """Raise RunRefused where gradients or training do not work with the model and its adapter."""
    from prism_assets.reference.rehearsal import rehearse

    try:
        rehearse(stage)
    except UserMistake as error:
        raise RunRefused(str(error)) from error


def _check_benchmarks(settings: Settings) -> None:
    """Benchmarks come last: an error in their names is reported now, not after hours of work."""
    from prism_assets.errors import UnusableBenchmark
    from prism_assets.evaluation.benchmark_scores import benchmark_tasks

    try:
        benchmark_tasks(settings)
    except UnusableBenchmark as error:
        raise RunRefused(str(error)) from error


def _range(keys: Sequence[str]) -> dict[str, str]:
    if len(set(keys)) == 1:
        return {"dagster/partition": keys[0]}
    return {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}


def _errors(result: Any) -> "Iterator[Any]":
    """Every error of a failed run, wrapped ones included."""
    for event in result.all_events:
        error = _error_of(event)
        while error is not None:
            yield error
            error = error.cause


def _error_of(event: Any) -> Any:
    """The error of a step that failed, or of a run that failed outside of its steps; None of any other event."""
    if event.is_step_failure:
        return event.step_failure_data.error
    return event.job_failure_data.error if event.is_job_failure else None


def _is_mistake(result: Any) -> bool:
    found = (error_named(error.cls_name) for error in _errors(result))
    return any(one is not None and issubclass(one, UserMistake) for one in found)


def _reason(step: Step, result: Any) -> str:
    """What a failed step itself said, without Dagster's wrapping and without the traceback that the UI shows."""
    for event in result.all_events:
        error = _error_of(event)
        if error is not None:
            # Not further down: what the step raised says more than what made it do so.
            while error.cause is not None and str(error.cls_name).startswith("Dagster"):
                error = error.cause
            what = event.step_key or "the run"
            return f"{step.title}: {what} failed: {_message(error)}\n(run {result.run_id})"
    return f"{step.title}: the run {result.run_id} failed."


def _message(error: Any) -> str:
    """What an error says, without the name of its class that Dagster writes before it."""
    return re.sub(rf"\A(?:\w+\.)*{re.escape(error.cls_name or '')}: ", "", error.message.strip())


def _failed_checks(result: Any) -> "Iterator[str]":
    """The checks of a run that did not pass, with their facts, a line each."""
    for event in result.all_events:
        if event.event_type_value != "ASSET_CHECK_EVALUATION" or event.asset_check_evaluation_data.passed:
            continue
        check = event.asset_check_evaluation_data
        name = f"{check.asset_key.to_user_string()}.{check.check_name}"
        facts = {key: value.value for key, value in check.metadata.items()}
        # Of a run over several partitions, those that did not pass.
        by_partition = {key: one for key, one in facts.items() if isinstance(one, dict) and "passed" in one}
        for key, one in by_partition.items():
            if not one["passed"]:
                yield f"{name} [{key}]: {_facts_text(one)}"
        if not by_partition:
            yield f"{name}: {_facts_text(facts)}"


def _facts_text(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if name != "passed")


def _computed(result: Any) -> int:
    total = 0
    for event in result.all_events:
        if event.is_step_materialization:
            entry = event.step_materialization_data.materialization.metadata.get("computed")
            total += int(entry.value) if entry is not None else 0
    return total
