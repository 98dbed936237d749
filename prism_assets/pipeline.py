"""`prism run`: the whole graph in its order, run by run, on the Dagster instance that the UI shows."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dagster as dg


class PipelineError(Exception):
    """A run failed; the message carries the step's own reason."""


class UserMistake(PipelineError):
    """A run failed for a reason that the user must change something about: settings, model, target or inbox files."""


# By name: what Dagster keeps of a step's error is text.
_MISTAKES = {
    "SettingsError",
    "ModelError",
    "UnsupportedModelError",
    "UnusableTokenizer",
    "UnreadableFile",
    "MixedTargets",
    "UnusableTargets",
    "UnusableBenchmark",
}


class Step(NamedTuple):
    """One Dagster run: assets of one partitions definition."""

    title: str
    assets: tuple[str, ...]
    partitions: str | None  # "shard", "target", "target_strategy" or None


STEPS: tuple[Step, ...] = (
    Step("Base model", ("base_model",), None),
    Step("Candidates", ("candidates",), "shard"),
    Step("Targets", ("targets",), "target"),
    Step("Live pool and warm-up", ("live_pool", "warmup_sample", "warmup_checkpoints"), None),
    Step("Candidate features", ("candidate_features",), "shard"),
    Step("Index", ("candidate_index",), None),
    Step("Target directions", ("target_features", "target_direction"), "target"),
    Step("Selection, fine-tuning, evaluation", ("selection", "adapter", "evaluation"), "target_strategy"),
    Step("Report", ("report",), "target"),
)
# Not among the steps of `prism run`: it would cost every run minutes.
TRUST = Step("Trust", ("trust",), "target")


# What `prism experiment` walks: what all trials share, then the trials.
EXPERIMENT_STEPS: tuple[Step, ...] = (
    *STEPS[: [step.title for step in STEPS].index("Index") + 1],
    Step("Experiment", ("experiment_trials", "experiment"), "target"),
)


class StepResult(NamedTuple):
    """What one step came to."""

    step: Step
    run_ids: list[str]
    computed: int  # artefacts made; 0 where everything was found
    seconds: float
    failed_checks: list[str]  # "asset.check: facts"


# Names, in a DAGSTER_HOME outside of the lake, the lake that it serves.
_OWNER_FILE = "prism-lake"


def dagster_home(settings: Settings) -> Path:
    """DAGSTER_HOME where it is set, else a folder in the lake; made, with the project's dagster.yaml, when missing.

    Raises UserMistake where the one that is set serves another lake.
    """
    given = os.environ.get("DAGSTER_HOME")
    home = Path(given) if given else settings.storage.root / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    claim_home(home, settings.storage.root)
    instance_file = home / "dagster.yaml"
    if not instance_file.exists():
        shutil.copyfile(project_file("dagster.yaml"), instance_file)
    return home


def claim_home(home: Path, root: Path) -> None:
    """Tie a Dagster instance to the lake at `root`. Raises UserMistake where it is tied to another lake.

    An instance has one set of shards: of two projects on it, each would retire the shards of the other. A home inside of
    the lake goes where the lake goes and needs no mark.
    """
    home, root = home.resolve(), root.resolve()
    if home.is_relative_to(root):
        return
    mark = home / _OWNER_FILE
    try:
        with open(mark, "x", encoding="utf-8") as file:
            file.write(str(root))
    except FileExistsError:
        owner = mark.read_text(encoding="utf-8").strip()
        if owner and Path(owner) != root:
            raise UserMistake(
                f"DAGSTER_HOME {home} serves the lake {owner}, and this project's lake is {root}: on one Dagster instance "
                f"two projects would retire each other's shards. Set another DAGSTER_HOME, or none. If the lake was moved, "
                f"delete {mark}."
            ) from None


def project_file(name: str) -> Path:
    """A file at the top of the project: definitions.py, workspace.yaml, dagster.yaml."""
    return Path(__file__).resolve().parent.parent / name


@contextmanager
def instance_of(settings: Settings) -> "Iterator[dg.DagsterInstance]":
    """The Dagster instance of these settings, which leaves stdout and stderr of the steps to the terminal.

    Dagster would redirect both to files for the UI, and print them by processes of its own: no progress on the terminal,
    and tracebacks of these processes at Ctrl-C.
    """
    import dagster as dg
    from dagster._core.instance.ref import InstanceRef

    no_capture = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    reference = InstanceRef.from_dir(str(dagster_home(settings)), overrides={"compute_logs": no_capture})
    with dg.DagsterInstance.from_ref(reference) as instance:
        yield instance


def run_pipeline(
    settings: Settings,
    definitions: "dg.Definitions",
    instance: "dg.DagsterInstance",
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_result: Callable[[StepResult], None] = lambda result: None,
    on_wait: Callable[[str], None] = lambda holders: None,
    targets: Sequence[str] | None = None,
    steps: Sequence[Step] = STEPS,
    tags: Mapping[str, str] | None = None,
) -> list[StepResult]:
    """Look at the inbox, then materialise every asset in order; what exists is found, not computed.

    `tags` are laid on every run: `{"prism/compact": "true"}` compacts index segments.
    A run whose process was killed is closed first, so that nothing waits for it. `on_wait` is told, once for each step
    that must wait, which run of another process works with the model. Raises PipelineError at the first run that fails.
    """
    from prism_assets.processes import PROCESS_TAG, close_runs_of_the_dead, registered

    with registered(instance) as process:
        close_runs_of_the_dead(instance)
        tags = {**(tags or {}), PROCESS_TAG: process}
        return _run_steps(settings, definitions, instance, tags, on_step, on_result, on_wait, targets, steps)


def _run_steps(
    settings: Settings,
    definitions: "dg.Definitions",
    instance: "dg.DagsterInstance",
    tags: Mapping[str, str],
    on_step: Callable[[Step], None],
    on_result: Callable[[StepResult], None],
    on_wait: Callable[[str], None],
    targets: Sequence[str] | None,
    steps: Sequence[Step],
) -> list[StepResult]:
    from prism_assets import catalog
    from prism_assets.corpus.inbox import scan
    from prism_assets.partitions import reconcile_shards
    from prism_assets.processes import wait_for_slots

    lake = definitions.resources["lake"]
    inbox = settings.candidates.inbox
    if not inbox.is_dir():
        raise UserMistake(f"candidates.inbox: there is no folder {inbox}. Make it and put JSON Lines or Parquet there.")
    found = scan(inbox, lake.cache / "inbox.json", at_rest_seconds=0)
    if not found.files:
        ignored = "".join(f"\n  {one.path}: {one.reason}" for one in found.ignored[:5])
        raise UserMistake(f"candidates.inbox: {inbox} holds no JSON Lines and no Parquet file.{ignored}")
    _require_usable_model(settings, definitions.resources["language_model"])
    _check_benchmarks(settings)
    reconcile_shards(instance, [file.key for file in found.files])
    results = []
    for step in steps:
        on_step(step)
        started = time.monotonic()
        # The records of every target are read in any case: the pool keeps them all out of every ranking.
        chosen = list(settings.targets) if "targets" in step.assets else targets or list(settings.targets)
        runs = []
        for partition_tags in _partition_tags(settings, definitions, instance, step, chosen):
            wait_for_slots(instance, _pools(definitions, step), on_wait)
            runs.append(_execute(definitions, instance, step, {**tags, **partition_tags}))
        computed = sum(count for _, count, _ in runs)
        failed = [check for *_, checks in runs for check in checks]
        results.append(StepResult(step, [run for run, *_ in runs], computed, time.monotonic() - started, failed))
        on_result(results[-1])
    catalog.refresh(lake)
    return results


def _require_usable_model(settings: Settings, model: Any) -> None:
    """Raise UserMistake for what a step would refuse later, perhaps hours later: no model, no GPU, too short a context."""
    from prism_assets.corpus.assets import require_context
    from resources.language_model import ModelError

    try:
        model.torch_device()
        require_context(settings, model)
    except ModelError as error:
        raise UserMistake(str(error)) from error


def _check_benchmarks(settings: Settings) -> None:
    """Benchmarks come last: what is wrong with their names is better said now than after hours of work."""
    from prism_assets.evaluation.assets import benchmark_tasks
    from prism_assets.evaluation.benchmarks import UnusableBenchmark

    try:
        benchmark_tasks(settings)
    except UnusableBenchmark as error:
        raise UserMistake(str(error)) from error


def _partition_tags(
    settings: Settings,
    definitions: "dg.Definitions",
    instance: "dg.DagsterInstance",
    step: Step,
    targets: Sequence[str],
) -> Iterable[dict[str, str]]:
    """Run tags that make one run of a contiguous range of partitions; none where no shard has anything to do."""
    if step.partitions is None:
        return [{}]
    if step.partitions == "shard":
        keys = instance.get_dynamic_partitions("shard")
        pending = _pending_shards(settings, definitions, instance, step, keys)
        positions = [position for position, key in enumerate(keys) if key in pending]
        # One run, so the model is loaded once; what is finished in between is found.
        return [_range(keys[positions[0] : positions[-1] + 1])] if positions else []
    if list(targets) == list(settings.targets):
        if step.partitions == "target":
            return [_range(targets)]
        first, last = (settings.strategies[0], targets[0]), (settings.strategies[-1], targets[-1])
        return [_range([f"{strategy}|{target}" for strategy, target in (first, last)])]
    if step.partitions == "target":
        return [{"dagster/partition": target} for target in targets]
    return [
        {"dagster/partition": f"{strategy}|{target}"} for target in targets for strategy in settings.strategies
    ]


def _pending_shards(
    settings: Settings, definitions: "dg.Definitions", instance: "dg.DagsterInstance", step: Step, keys: Sequence[str]
) -> set[str]:
    """The shards that the lake has not finished, or that this Dagster instance has not seen finished."""
    import dagster as dg

    from prism_assets.corpus.assets import pending_candidates
    from prism_assets.features.assets import pending_features

    pending = {"candidates": pending_candidates, "candidate_features": pending_features}
    lake, model = definitions.resources["lake"], definitions.resources["language_model"]
    found: set[str] = set()
    for asset in step.assets:
        found |= set(keys) - instance.get_materialized_partitions(dg.AssetKey(asset))
        found |= set(pending[asset](settings, lake, model, keys))
    return found


def _range(keys: Sequence[str]) -> dict[str, str]:
    if len(set(keys)) == 1:
        return {"dagster/partition": keys[0]}
    return {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}


def _pools(definitions: "dg.Definitions", step: Step) -> set[str]:
    return {pool for name in step.assets if (pool := definitions.get_assets_def(name).op.pool)}


def _execute(
    definitions: "dg.Definitions", instance: "dg.DagsterInstance", step: Step, tags: dict[str, str]
) -> tuple[str, int, list[str]]:
    import dagster as dg

    job = definitions.resolve_implicit_global_asset_job_def()
    selection = [dg.AssetKey(name) for name in step.assets]
    partition = tags.get("dagster/partition")
    result = job.execute_in_process(
        instance=instance,
        asset_selection=selection,
        partition_key=partition,
        # The terminal shows progress of its own; the whole log is in the instance, for the UI.
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        tags={**tags, "prism/step": step.title},
        raise_on_error=False,
    )
    if not result.success:
        if any(error.cls_name == "DagsterExecutionInterruptedError" for error in _errors(result)):
            raise KeyboardInterrupt  # Dagster turned Ctrl-C into a failed step
        raise (UserMistake if _is_mistake(result) else PipelineError)(_reason(step, result))
    return result.run_id, _computed(result), list(_failed_checks(result))


def _errors(result: Any) -> "Iterator[Any]":
    """Every error of a failed run, wrapped ones included."""
    for event in result.all_events:
        error = event.step_failure_data.error if event.is_step_failure else None
        while error is not None:
            yield error
            error = error.cause


def _is_mistake(result: Any) -> bool:
    return any(str(error.cls_name) in _MISTAKES for error in _errors(result))


def _reason(step: Step, result: Any) -> str:
    """What a failed step itself said, without Dagster's wrapping and without the traceback that the UI shows."""
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            # Not further down: what the step raised says more than what made it do so.
            while error is not None and error.cause is not None and str(error.cls_name).startswith("Dagster"):
                error = error.cause
            message = error.message.strip() if error else "no reason was given"
            message = re.sub(r"\A(?:\w+\.)*[A-Z]\w*(?:Error|Failure|File|Targets|Mistake|Tokenizer): ", "", message)
            return f"{step.title}: {event.step_key} failed: {message}\n(run {result.run_id})"
    return f"{step.title}: the run {result.run_id} failed."


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
                yield f"{name} [{key}]: {_listed(one)}"
        if not by_partition:
            yield f"{name}: {_listed(facts)}"


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if name != "passed")


def _computed(result: Any) -> int:
    total = 0
    for event in result.all_events:
        if event.is_step_materialization:
            entry = event.step_materialization_data.materialization.metadata.get("computed")
            total += int(entry.value) if entry is not None else 0
    return total
