"""The sensors: of files, of processes, and the one that evaluates automation conditions. All on by default."""

import json
import time
from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets.identity import ENGINES
from prism_assets.ops.home import claim_home
from prism_assets.ops.ranges import AutomationSensor
from prism_assets.ops.runs import close_orphaned_runs
from prism_assets.ops.shards import reconcile_shards
from prism_assets.project import Project
from prism_assets.resources.lake import Lake, digest
from prism_assets.settings import TargetSettings
from prism_assets.tables import ASSETS
from prism_assets.work import stage_of

# Between two looks: an arrival waits for one of `inbox` and three of `automation` until its selections are made.
LOOK_SECONDS = 5


def build_sensors(project: Project) -> list[dg.SensorDefinition]:
    """All sensors of a project."""
    return [
        _inbox(project),
        _target_files(project),
        _dead_runs(project),
        AutomationSensor(
            project,
            joined=project.key("selection"),
            name=project.named("automation"),
            target=dg.AssetSelection.assets(*project.keys(one.name for one in ASSETS)),
            default_status=dg.DefaultSensorStatus.RUNNING,
            minimum_interval_seconds=LOOK_SECONDS,
        ),
    ]


def _inbox(project: Project) -> dg.SensorDefinition:
    @dg.sensor(
        name=project.named("inbox"),
        asset_selection=[project.key("live_pool")],
        minimum_interval_seconds=LOOK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={project.named(one) for one in ENGINES},
        description="Notices files that arrive in the inbox, change or leave it, and makes shards of them.",
    )
    def inbox_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        """Registers settled files as shards and retires the shards of files that are gone."""
        from prism_assets.corpus.candidates import scan_inbox

        stage = stage_of(project, context)
        lake = stage.lake
        inbox = project.settings.candidates.inbox
        claim_home(Path(context.instance.root_directory), lake.folder, project.name)
        if not inbox.is_dir():
            return dg.SkipReason(f"There is no folder {inbox} yet.")
        found = scan_inbox(stage)
        known = set(context.instance.get_dynamic_partitions(str(project.shards.name)))
        # A file that is being written keeps the shard it had until it is at rest; a new one waits.
        shard_of: dict[str, str] = json.loads(context.cursor) if context.cursor else {}
        held = {str(file.path): file.key if file.settled else shard_of.get(str(file.path)) for file in found.files}
        held = {path: key for path, key in held.items() if key is not None}
        live = {*held.values(), *(file.key for file in found.files if file.key in known)}
        added, removed = reconcile_shards(project, context.instance, live)
        # New shards are made by the condition of `candidates`, and the manifest follows them. A retirement updates no
        # asset, so it asks for the manifest itself: as long as the manifest shows a shard that is gone, for a daemon
        # may die between the retirement and its request. The key keeps one state from being asked for twice.
        manifest, shown = _manifest_shards(lake)
        requests = []
        if shown - live:
            key = f"retire:{manifest}:{digest(sorted(live))}"
            requests = [dg.RunRequest(run_key=key, asset_selection=[project.key("live_pool")])]
        cursor = json.dumps(held)
        if not added and not removed and not requests:
            context.update_cursor(cursor)
            return dg.SkipReason(f"{len(live)} shards, nothing new.")
        context.log.info(f"Inbox: {len(added)} new shards, {len(removed)} retired.")
        return dg.SensorResult(run_requests=requests, cursor=cursor)

    return inbox_sensor


def _manifest_shards(lake: Lake) -> tuple[str, set[str]]:
    """Fingerprint and shards of the manifest that was shown last; nothing where there is none."""
    last = max(lake.heads("live_pool"), key=lambda entry: entry["time"], default=None)
    manifest = lake.get("live_pool", last["fingerprint"]) if last else None
    if manifest is None:
        return "", set()
    return manifest.fingerprint, set(lake.read_table(manifest, ["shard"])["shard"].to_pylist())


def _target_files(project: Project) -> dg.SensorDefinition:
    @dg.sensor(
        name=project.named("target_files"),
        asset_selection=[project.key("targets")],
        minimum_interval_seconds=10,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Notices changes of target and held-out files.",
    )
    def target_files_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        """Asks for the targets whose files changed since they were last looked at and are at rest now."""
        settings = project.settings
        seen: dict[str, Any] = json.loads(context.cursor) if context.cursor else {}
        states = {name: _file_states(target) for name, target in settings.targets.items()}
        rest = settings.candidates.at_rest_seconds
        settled = {
            name: state
            for name, state in states.items()
            if all(one is not None and time.time() - one[1] / 1e9 >= rest for one in state)
        }
        changed = [name for name, state in settled.items() if name in seen and seen[name] != state]
        cursor = json.dumps(
            {name: settled.get(name, seen.get(name)) for name in states if name in settled or name in seen}
        )
        if not changed:
            context.update_cursor(cursor)
            return dg.SkipReason("No target or held-out file changed.")
        requests = [
            dg.RunRequest(
                partition_key=name,
                run_key=f"{name}:{digest(settled[name])}",
                asset_selection=[project.key("targets")],
            )
            for name in changed
        ]
        return dg.SensorResult(run_requests=requests, cursor=cursor)

    return target_files_sensor


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


def _dead_runs(project: Project) -> dg.SensorDefinition:
    @dg.sensor(
        name=project.named("dead_runs"),
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Closes runs whose process was killed, or everything else would wait for the model that they hold.",
    )
    def dead_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        """Closes orphaned runs and requests none: the instance retries failed runs, and automation finds what is
        missing."""
        closed = close_orphaned_runs(context.instance)
        for run in closed:
            context.log.warning(f"The process of run {run} is gone: the run is closed.")
        return dg.SkipReason(f"{len(closed)} runs of killed processes closed.")

    return dead_runs_sensor
