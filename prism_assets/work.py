"""How an asset runs and reports: a Stage from Dagster's context, one run over many partitions, outcomes and checks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from prism_assets.identity import ENGINES
from prism_assets.metadata import harmless
from prism_assets.project import CheckResult, Project
from prism_assets.resources.lake import Artifact, Lake, digest
from prism_assets.stage import Stage
from prism_assets.text import as_code, visible


def stage_of(
    project: Project, context: dg.AssetExecutionContext | dg.SensorEvaluationContext | dg.ScheduleEvaluationContext
) -> Stage:
    """The Stage of an asset or a sensor at work: the engines that the definitions were built with, run and log."""
    lake, model, index = (getattr(context.resources, project.named(one)) for one in ENGINES)
    run_id = context.run_id if isinstance(context, dg.AssetExecutionContext) else ""
    return Stage(project.settings, lake, model, index, run_id, context.log)


def stage_without_run(project: Project, definitions: dg.Definitions) -> Stage:
    """A Stage for a command: the engines of the definitions, outside of any run."""
    resources = definitions.resources or {}
    return Stage(project.settings, *(engine_of(resources[project.named(one)]) for one in ENGINES))


def as_resource(engine: Any) -> dg.ResourceDefinition:
    """An engine as a resource of Dagster that run config cannot change: a launch that gives it any is refused.

    A definition that somebody puts in an engine's place makes the engine itself; it gets no run config either.
    """
    if isinstance(engine, dg.ResourceDefinition):
        return dg.ResourceDefinition(
            engine.resource_fn,
            config_schema={},
            required_resource_keys=engine.required_resource_keys,
            description=engine.description,
        )
    return dg.ResourceDefinition(
        lambda _: engine, config_schema={}, description="Set in prism.yaml alone: it takes no run config."
    )


def engine_of(resource: dg.ResourceDefinition) -> Any:
    """The engine that `as_resource` was given."""
    return resource.resource_fn(dg.build_init_resource_context())  # pyright: ignore[reportCallIssue]


@dataclass
class Outcome:
    """The result of one partition of one asset: the artefacts it shows now, metadata, and its checks."""

    artifacts: Sequence[Artifact]
    computed: int  # how many artefacts were made in this run; the others were found
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checks: Sequence[CheckResult] = ()

    @property
    def version(self) -> str:
        """The data version in Dagster: the content hash, or a hash of several."""
        contents = [artifact.content_hash for artifact in self.artifacts]
        return contents[0] if len(contents) == 1 else digest(contents)


def each_partition(
    context: dg.AssetExecutionContext, stage: Stage, work: Callable[[str], Outcome]
) -> dg.MaterializeResult:
    """Do the work of every partition of this run and report on each.

    All partitions are worked on before a failure is raised, so a bad one does not stop the others; what they
    published is found again by the next run. Raises dagster.Failure with every reason.
    """
    keys = list(context.partition_keys)
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, Exception] = {}
    for key in keys:
        try:
            outcomes[key] = work(key)
        except Exception as error:
            if len(keys) == 1:
                raise
            context.log.error(visible(f"{key}: {type(error).__name__}: {error}"))
            failures[key] = error
    metadata = {key: _metadata(stage.lake, outcome) for key, outcome in outcomes.items()}
    if failures:
        # A step that fails records nothing of its own: say what was finished, or it would count as missing too.
        for key, outcome in outcomes.items():
            tags = {"dagster/data_version": outcome.version}
            context.log_event(
                dg.AssetMaterialization(context.asset_key, partition=key, metadata=metadata[key], tags=tags)
            )
        reasons = "\n".join(f"{key}: {type(error).__name__}: {error}" for key, error in failures.items())
        raise dg.Failure(
            f"{len(failures)} of {len(keys)} partitions failed; the others are finished and kept.\n{visible(reasons)}"
        ) from next(iter(failures.values()))
    if len(outcomes) == 1:
        return the_whole(context, stage, next(iter(outcomes.values())))
    for key in outcomes:
        context.add_asset_metadata(metadata[key], partition_key=key)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest({key: one.version for key, one in outcomes.items()})),
        check_results=list(_checks(context, outcomes)),
    )


def the_whole(context: dg.AssetExecutionContext, stage: Stage, outcome: Outcome) -> dg.MaterializeResult:
    """Report on an asset without partitions, or on the one partition of a run."""
    return dg.MaterializeResult(
        metadata=_metadata(stage.lake, outcome),
        data_version=dg.DataVersion(outcome.version),
        check_results=list(_checks(context, {"": outcome})),
    )


def _metadata(lake: Lake, outcome: Outcome) -> dict[str, Any]:
    """The metadata of a partition with what all have: computed or found, fingerprints, files, columns."""
    fingerprints = [artifact.fingerprint for artifact in outcome.artifacts]
    files = [f"- {as_code(str(lake.local(artifact)))}" for artifact in outcome.artifacts]
    return {
        **harmless(outcome.metadata),
        "computed": outcome.computed,
        "reused": outcome.computed == 0,
        "fingerprint": fingerprints[0] if len(fingerprints) == 1 else ", ".join(fingerprints),
        "files": dg.MetadataValue.md("\n".join(files)),
        **_column_schema(lake, outcome.artifacts),
    }


def _column_schema(lake: Lake, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """The columns of the first artefact that is a table, under the key that the UI knows."""
    for artifact in artifacts:
        schema = lake.schema(artifact)
        if schema is not None:
            columns = [dg.TableColumn(column.name, str(column.type)) for column in schema]
            return {"dagster/column_schema": dg.TableSchema(columns=columns)}
    return {}


def _checks(context: dg.AssetExecutionContext, outcomes: Mapping[str, Outcome]) -> Iterator[dg.AssetCheckResult]:
    """A result for each check, over all partitions."""
    checks = dict.fromkeys(result.check for outcome in outcomes.values() for result in outcome.checks)
    for check in checks:
        results = {
            key: result for key, outcome in outcomes.items() for result in outcome.checks if result.check == check
        }
        metadata: dict[str, Any] = {}
        for key, result in results.items():
            if len(results) == 1:
                metadata |= result.facts
            elif not result.passed or len(results) <= 20:
                metadata[key] = dg.MetadataValue.json({"passed": result.passed, **_jsonable(result.facts)})
        yield dg.AssetCheckResult(
            check_name=check.name,
            asset_key=context.asset_key,
            passed=all(result.passed for result in results.values()),
            severity=check.severity,
            metadata=harmless(metadata),
        )


def _jsonable(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | int | float | bool | list | dict | type(None)) else str(value)
        for name, value in facts.items()
    }
