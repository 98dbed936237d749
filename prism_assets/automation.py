"""What happens without a hand: jobs, the inbox sensor, automation conditions, a nightly reconcile."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from prism_assets.partitions import reconcile_shards
from prism_assets.settings import Settings
from resources.lake import Lake

C = dg.AutomationCondition

# A partition that has never been made is made once its inputs are there. Not `on_missing`: that ignores what was
# missing when the daemon first looked.
_WHEN_MISSING = C.missing() & ~C.any_deps_missing() & ~C.execution_failed()
# `since(newly_requested)` keeps an update that lands while the asset is being made; `eager` would lose it.
_WHEN_INPUTS_MOVE = C.any_deps_match(C.newly_updated()).since(C.newly_requested()) & ~C.any_deps_missing()
_FOLLOW = (_WHEN_MISSING | _WHEN_INPUTS_MOVE) & ~C.in_progress() & ~C.any_deps_in_progress()
# Under steady arrival some shard is always in progress: what reads all shards must not wait for a quiet moment.
_FOLLOW_ARRIVALS = (C.missing() & ~C.execution_failed() | C.any_deps_match(C.newly_updated()).since(C.newly_requested())) & ~C.in_progress()

CONDITIONS: dict[str, dg.AutomationCondition] = {
    "base_model": C.missing() & ~C.in_progress() & ~C.execution_failed(),
    "candidates": C.missing() & ~C.in_progress() & ~C.execution_failed(),
    "targets": C.missing() & ~C.in_progress() & ~C.execution_failed(),
    "live_pool": _FOLLOW_ARRIVALS,
    "warmup_sample": _FOLLOW,
    "warmup_checkpoints": _FOLLOW,
    "candidate_features": _FOLLOW,
    "candidate_index": _FOLLOW_ARRIVALS,
    "target_features": _FOLLOW,
    "target_direction": _FOLLOW,
    "selection": _FOLLOW,
    "adapter": _FOLLOW,
    "evaluation": _FOLLOW,
    "report": _FOLLOW,
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
}


def conditioned(assets: Sequence[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
    """The assets with their automation conditions."""
    return [
        asset.map_asset_specs(lambda spec: spec.replace_attributes(automation_condition=CONDITIONS[spec.key.path[-1]]))
        for asset in assets
    ]


def build_jobs() -> list[Any]:
    """One job per partitions definition: Dagster runs no two in one job."""
    return [
        dg.define_asset_job(name, selection=list(keys), description=description)
        for name, (keys, description) in JOBS.items()
    ]


def build_schedules() -> list[dg.ScheduleDefinition]:
    """A nightly look at everything that is one for the pool, for what no event told."""
    return [
        dg.ScheduleDefinition(
            name="nightly_reconcile",
            job_name="refresh_pool",
            cron_schedule="0 3 * * *",
            description="Reconciles manifest, warm-up and index with the inbox once a night.",
        )
    ]


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

    inbox = settings.candidates.inbox
    if not inbox.is_dir():
        return dg.SkipReason(f"There is no folder {inbox} yet.")
    found = scan(inbox, lake.cache / "inbox.json", settings.candidates.at_rest_seconds)
    known = set(context.instance.get_dynamic_partitions("shard"))
    # A file that is still being written keeps the shard it had; a new one waits until it is at rest.
    live = [file.key for file in found.files if file.settled or file.key in known]
    added, removed = reconcile_shards(context.instance, live)
    if not added and not removed:
        return dg.SkipReason(f"{len(live)} shards, nothing new.")
    # New shards are made by the condition of `candidates`, and the manifest follows them. A retirement alone
    # updates no asset, so it asks for the manifest itself.
    requests = [dg.RunRequest(asset_selection=[dg.AssetKey("live_pool")])] if removed else []
    context.log.info(f"Inbox: {len(added)} new shards, {len(removed)} retired.")
    return dg.SensorResult(run_requests=requests)


def build_sensors() -> list[dg.SensorDefinition]:
    """The inbox sensor, and the sensor that evaluates automation conditions; both are on by default."""
    return [
        inbox_sensor,
        dg.AutomationConditionSensorDefinition(
            "automation", target=dg.AssetSelection.all(), default_status=dg.DefaultSensorStatus.RUNNING
        ),
    ]
