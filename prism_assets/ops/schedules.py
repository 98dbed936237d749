"""Jobs, and the schedules that catch what no event triggered. Schedules start switched off; the UI turns them on."""

from typing import Any

import dagster as dg

from prism_assets.features.candidate_index import COMPACT_TAG
from prism_assets.identity import ENGINES, join_key
from prism_assets.ops.integrity import JOB, PARTS, build_verify_job
from prism_assets.ops.ranges import RANGE_START, range_tags
from prism_assets.ops.stale import untrained
from prism_assets.project import Project
from prism_assets.settings import Settings
from prism_assets.tables import ASSETS, JOBS
from prism_assets.work import stage_of


def build_jobs(project: Project) -> list[Any]:
    """A job for each of `tables.JOBS`, with the assets that name it, and the one that verifies the lake."""
    return [
        build_verify_job(project),
        *_asset_jobs(project),
    ]


def _asset_jobs(project: Project) -> list[Any]:
    return [
        dg.define_asset_job(
            project.named(name),
            selection=dg.AssetSelection.assets(*project.keys(one.name for one in ASSETS if one.job == name)),
            description=description,
        )
        for name, description in JOBS.items()
    ]


def build_schedules(project: Project) -> list[Any]:
    """Nightly runs over the pool, the lake and, where `train: nightly` says so, over the selections that changed;
    weekly ones over all selections and over the measurements of trust."""
    settings = project.settings

    @dg.schedule(
        name=project.named("nightly_training"),
        cron_schedule="0 1 * * *",
        job_name=project.named("refresh_selections"),
        default_status=dg.DefaultScheduleStatus.RUNNING
        if settings.train == "nightly"
        else dg.DefaultScheduleStatus.STOPPED,
        required_resource_keys={project.named(one) for one in ENGINES},
        description="Fine-tunes and evaluates every night on the selections that changed since, but `full`. On by "
        "default where prism.yaml says `train: nightly`.",
    )
    def nightly_training(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        keys = untrained(stage_of(project, context), automated_keys(settings))
        if not keys:
            return dg.SkipReason("Every selection is the one that its adapters were trained on.")
        return [
            dg.RunRequest(run_key=f"{context.scheduled_execution_time:%Y-%m-%d}/{tags[RANGE_START]}", tags=tags)
            for tags in range_tags(project, keys)
        ]

    @dg.schedule(
        name=project.named("weekly_refresh"),
        cron_schedule="0 4 * * 0",
        job_name=project.named("refresh_selections"),
        description="Selects, fine-tunes and evaluates once a week for every target and strategy but `full`; what "
        "exists already is found, not trained again.",
    )
    def weekly_refresh(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        return [_request(context, key) for key in automated_keys(settings)]

    @dg.schedule(
        name=project.named("weekly_trust"),
        cron_schedule="0 6 * * 0",
        job_name=project.named("check_trust"),
        description="Measures once a week whether each target's scores hold; what did not change is found.",
    )
    def weekly_trust(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        return [_request(context, target) for target in settings.targets]

    return [
        dg.ScheduleDefinition(
            name=project.named("nightly_reconcile"),
            job_name=project.named("refresh_pool"),
            cron_schedule="0 3 * * *",
            tags={COMPACT_TAG: "true"},
            description="Reconciles manifest, warm-up and index with the inbox once a night, and compacts small "
            "index segments into one.",
        ),
        dg.ScheduleDefinition(
            name=project.named("nightly_verify"),
            job_name=project.named(JOB),
            cron_schedule="30 2 * * *",
            description="Reads a share of all artefacts every night and compares them with their content hashes; "
            f"in {PARTS} nights everything.",
        ),
        nightly_training,
        weekly_refresh,
        weekly_trust,
    ]


def _request(context: dg.ScheduleEvaluationContext, key: str) -> dg.RunRequest:
    return dg.RunRequest(run_key=f"{context.scheduled_execution_time:%Y-%m-%d}/{key}", partition_key=key)


def automated_keys(settings: Settings) -> list[str]:
    """Partitions of target × strategy that may be made automatically: training on the whole pool is not."""
    return [
        join_key(target, strategy)
        for strategy in settings.strategies
        for target in settings.targets
        if strategy != "full"
    ]
