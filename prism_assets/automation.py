"""What happens without a hand: jobs, the inbox sensor, automation conditions, a nightly reconcile."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets.partitions import reconcile_shards
from prism_assets.processes import close_runs_of_the_dead
from prism_assets.settings import Settings, TargetSettings
from resources.lake import Lake, digest

C = dg.AutomationCondition

# An input moved: its data version changed, or it is made in the same run. An input that was made again with the same
# content moves nothing.
_INPUT_MOVED = C.any_deps_updated().replace(
    "newly_updated_without_root", C.data_version_changed() & ~C.executed_with_root_target()
)
# `since(newly_requested)` keeps a move that comes while the asset is being made; `eager` would lose it. A request is
# seen as new on the tick after it, and in `since` a reset beats a trigger of the same tick: without `& ~trigger` a move
# between the request and the next tick would be lost.
_TRIGGER = _INPUT_MOVED | C.code_version_changed()
_MOVED = _TRIGGER.since(C.newly_requested() & ~_TRIGGER)
# Not `on_missing`: that ignores what was missing when the daemon first looked. What failed waits for its inputs to
# move, or for a hand.
_MISSING = C.missing() & ~C.execution_failed()

_WHEN_MISSING = (_MISSING | C.code_version_changed().since(C.newly_requested())) & ~C.in_progress()
_FOLLOW = (_MISSING | _MOVED) & ~C.any_deps_missing() & ~C.any_deps_in_progress() & ~C.in_progress()
# Under steady arrival some shard is always in progress: what reads all shards must not wait for a quiet moment.
_FOLLOW_ARRIVALS = (_MISSING | _MOVED) & ~C.in_progress()
_ANY_FEATURES = C.any_deps_match(~C.missing() | C.will_be_requested()).allow(dg.AssetSelection.assets("candidate_features"))

class _Automated(dg.AutomationCondition):
    """True for every partition but those of the strategy `full`: training on the whole pool takes a hand."""

    @property
    def name(self) -> str:
        return "not_full_pool"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        keys = context.candidate_subset.expensively_compute_partition_keys()
        allowed = {key for key in keys if not key.startswith("full|")}
        return dg.AutomationResult(
            context, context.candidate_subset.compute_intersection_with_partition_keys(allowed)
        )


# None: made by hand alone.
CONDITIONS: dict[str, dg.AutomationCondition | None] = {
    "base_model": _WHEN_MISSING,
    "candidates": _WHEN_MISSING & ~C.any_deps_missing(),
    "targets": _WHEN_MISSING & ~C.any_deps_missing(),
    "live_pool": _FOLLOW_ARRIVALS & C.any_deps_match(~C.missing()).allow(dg.AssetSelection.assets("candidates")),
    "warmup_sample": _FOLLOW,
    "warmup_checkpoints": _FOLLOW,
    "candidate_features": _FOLLOW,
    "candidate_index": _FOLLOW_ARRIVALS & _ANY_FEATURES,
    "target_features": _FOLLOW,
    "target_direction": _FOLLOW,
    # Not held back by inputs in progress: a selection is made from the pool that the index shows, and again later.
    "selection": _FOLLOW_ARRIVALS & ~C.any_deps_missing() & _Automated(),
    "adapter": _FOLLOW & _Automated(),
    "evaluation": _FOLLOW & _Automated(),
    "report": _FOLLOW,
    # Short fine-tunings and hundreds of forward passes a target: by hand or by the weekly schedule, not at each arrival.
    "trust": None,
    # Many times the fine-tuning of everything else.
    "experiment_trials": None,
    "experiment": None,
}

# The sections of prism.yaml that an asset reads. They are part of its code version, so the UI shows an asset whose
# settings changed as stale, and automation makes it again.
SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "base_model": ("model",),
    "candidates": ("tokenization",),
    "targets": ("tokenization", "preference"),
    "warmup_sample": ("warmup", "lora", "model"),
    "warmup_checkpoints": ("warmup", "lora", "model"),
    "candidate_features": ("features", "model"),
    "target_features": ("features", "model"),
    "target_direction": ("preference", "strategies"),
    "selection": ("selection", "preference", "model"),
    "adapter": ("training", "seeds", "lora", "model"),
    "evaluation": ("evaluation", "seeds", "model"),
    "report": ("strategies", "seeds"),
    "trust": ("trust", "preference", "training", "features", "model"),
    "experiment_trials": (
        *("experiment", "strategies", "seeds", "model", "lora", "features", "preference", "selection", "training"),
        "evaluation",
    ),
    "experiment": ("experiment", "strategies", "seeds"),
}

JOBS: dict[str, tuple[tuple[str, ...], str]] = {
    "refresh_pool": (
        ("base_model", "live_pool", "warmup_sample", "warmup_checkpoints", "candidate_index"),
        "Everything that is one for the whole pool: manifest, warm-up, index.",
    ),
    "refresh_shards": (("candidates", "candidate_features"), "Rows and gradient features of inbox files."),
    "refresh_targets": (
        ("targets", "target_features", "target_direction", "report"),
        "Everything that is one per target.",
    ),
    "refresh_selections": (
        ("selection", "adapter", "evaluation"),
        "Selection, fine-tuning and evaluation of targets and strategies.",
    ),
    "check_trust": (
        ("trust",),
        "Whether the weights, the directions and the scores of targets hold, measured. Costly, and never automatic.",
    ),
    # Not `experiment`: a job may not be called as an asset is.
    "run_experiment": (
        ("experiment_trials", "experiment"),
        "Every strategy over several splits and seeds, and what the differences come to. Never started by itself.",
    ),
}


def conditioned(assets: Sequence[dg.AssetsDefinition], settings: Settings) -> list[dg.AssetsDefinition]:
    """The assets with their automation conditions, and with the settings they read in their code versions."""

    def finish(spec: dg.AssetSpec) -> dg.AssetSpec:
        name = spec.key.path[-1]
        sections = {section: settings.model_dump(mode="json")[section] for section in SETTINGS_OF.get(name, ())}
        version = f"{spec.code_version}-{digest(sections)[:8]}" if sections else spec.code_version
        return spec.replace_attributes(automation_condition=CONDITIONS[name], code_version=version)

    return [asset.map_asset_specs(finish) for asset in assets]


def build_jobs() -> list[Any]:
    """The jobs of `JOBS`. Dagster runs no two partitions definitions in one job."""
    return [
        dg.define_asset_job(name, selection=list(keys), description=description)
        for name, (keys, description) in JOBS.items()
    ]


def build_schedules(settings: Settings) -> list[Any]:
    """A nightly look at everything that is one for the pool, weekly ones at what was trained and whether it holds."""

    @dg.schedule(
        name="weekly_refresh",
        cron_schedule="0 4 * * 0",
        job_name="refresh_selections",
        description="Selects, fine-tunes and evaluates once a week for every target and strategy but `full`; what "
        "exists already is found, not trained again.",
    )
    def weekly_refresh(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        return [
            dg.RunRequest(run_key=f"{context.scheduled_execution_time:%Y-%m-%d}/{key}", partition_key=key)
            for key in automated_keys(settings)
        ]

    @dg.schedule(
        name="weekly_trust",
        cron_schedule="0 6 * * 0",
        job_name="check_trust",
        description="Measures once a week whether each target's scores hold; what did not change is found.",
    )
    def weekly_trust(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        return [
            dg.RunRequest(run_key=f"{context.scheduled_execution_time:%Y-%m-%d}/{target}", partition_key=target)
            for target in settings.targets
        ]

    return [
        dg.ScheduleDefinition(
            name="nightly_reconcile",
            job_name="refresh_pool",
            cron_schedule="0 3 * * *",
            tags={"prism/compact": "true"},
            description="Reconciles manifest, warm-up and index with the inbox once a night, and compacts small "
            "index segments into one.",
        ),
        weekly_refresh,
        weekly_trust,
    ]


def automated_keys(settings: Settings) -> list[str]:
    """Partitions of target × strategy that may be made without a hand: training on the whole pool may not."""
    return [f"{strategy}|{target}" for strategy in settings.strategies for target in settings.targets if strategy != "full"]


@dg.sensor(
    name="inbox",
    asset_selection=["live_pool"],
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Notices files that arrive in the inbox, change or leave it, and makes shards of them.",
)
def inbox_sensor(
    context: dg.SensorEvaluationContext, settings: dg.ResourceParam[Settings], lake: Lake
) -> dg.SensorResult | dg.SkipReason:
    """Registers settled files as shards and retires the shards of files that are gone."""
    from prism_assets.corpus.inbox import scan
    from prism_assets.pipeline import claim_home

    claim_home(Path(context.instance.root_directory), lake.folder)
    inbox = settings.candidates.inbox
    if not inbox.is_dir():
        return dg.SkipReason(f"There is no folder {inbox} yet.")
    found = scan(inbox, lake.cache / "inbox.json", settings.candidates.at_rest_seconds)
    known = set(context.instance.get_dynamic_partitions("shard"))
    # A file that is being written keeps the shard it had until it is at rest; a new one waits.
    shard_of: dict[str, str] = json.loads(context.cursor) if context.cursor else {}
    held = {str(file.path): file.key if file.settled else shard_of.get(str(file.path)) for file in found.files}
    held = {path: key for path, key in held.items() if key is not None}
    live = {*held.values(), *(file.key for file in found.files if file.key in known)}
    added, removed = reconcile_shards(context.instance, live)
    # New shards are made by the condition of `candidates`, and the manifest follows them. A retirement updates no
    # asset, so it asks for the manifest itself: as long as the manifest shows a shard that is gone, for a daemon may
    # die between the retirement and its request. The key keeps one state from being asked for twice.
    manifest, shown = _manifest_shards(lake)
    requests = []
    if shown - live:
        requests = [
            dg.RunRequest(
                run_key=f"retire:{manifest}:{digest(sorted(live))}", asset_selection=[dg.AssetKey("live_pool")]
            )
        ]
    cursor = json.dumps(held)
    if not added and not removed and not requests:
        context.update_cursor(cursor)
        return dg.SkipReason(f"{len(live)} shards, nothing new.")
    context.log.info(f"Inbox: {len(added)} new shards, {len(removed)} retired.")
    return dg.SensorResult(run_requests=requests, cursor=cursor)


def _manifest_shards(lake: Lake) -> tuple[str, set[str]]:
    """Fingerprint and shards of the manifest that was shown last; nothing where there is none."""
    last = max(lake.heads("live_pool"), key=lambda entry: entry["time"], default=None)
    manifest = lake.get("live_pool", last["fingerprint"]) if last else None
    if manifest is None:
        return "", set()
    return manifest.fingerprint, set(lake.read_table(manifest, ["shard"])["shard"].to_pylist())


@dg.sensor(
    name="target_files",
    asset_selection=["targets"],
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Notices changes of target and eval files.",
)
def target_files_sensor(
    context: dg.SensorEvaluationContext, settings: dg.ResourceParam[Settings]
) -> dg.SensorResult | dg.SkipReason:
    """Asks for the targets whose files changed since they were last looked at and are at rest now."""
    seen: dict[str, Any] = json.loads(context.cursor) if context.cursor else {}
    states = {name: _file_states(target) for name, target in settings.targets.items()}
    rest = settings.candidates.at_rest_seconds
    settled = {
        name: state
        for name, state in states.items()
        if all(one is not None and time.time() - one[1] / 1e9 >= rest for one in state)
    }
    changed = [name for name, state in settled.items() if name in seen and seen[name] != state]
    cursor = json.dumps({name: settled.get(name, seen.get(name)) for name in states if name in settled or name in seen})
    if not changed:
        context.update_cursor(cursor)
        return dg.SkipReason("No target or eval file changed.")
    requests = [
        dg.RunRequest(partition_key=name, run_key=f"{name}:{digest(settled[name])}", asset_selection=[dg.AssetKey("targets")])
        for name in changed
    ]
    return dg.SensorResult(run_requests=requests, cursor=cursor)


def _file_states(target: TargetSettings) -> list[list[int] | None]:
    """Size and modification time (ns) of the two files of a target; None for a missing one."""
    states: list[list[int] | None] = []
    for path in (target.examples, target.eval):
        try:
            status = path.stat()
        except FileNotFoundError:
            states.append(None)
        else:
            states.append([status.st_size, status.st_mtime_ns])
    return states


@dg.sensor(
    name="dead_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Closes runs whose process was killed, or everything else would wait for the model that they hold.",
)
def dead_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Closes the runs of the dead; asks for nothing, for the instance tries failed runs again and the rest is seen missing."""
    closed = close_runs_of_the_dead(context.instance)
    for run in closed:
        context.log.warning(f"The process of run {run} is gone: the run is closed.")
    return dg.SkipReason(f"{len(closed)} runs of killed processes closed.")


def build_sensors() -> list[dg.SensorDefinition]:
    """The watchers of files and of processes, and the sensor that evaluates automation conditions; all on by default."""
    return [
        inbox_sensor,
        target_files_sensor,
        dead_runs_sensor,
        dg.AutomationConditionSensorDefinition(
            "automation",
            target=dg.AssetSelection.all(),
            default_status=dg.DefaultSensorStatus.RUNNING,
            minimum_interval_seconds=10,
            use_user_code_server=True,  # for the condition of our own
        ),
    ]
