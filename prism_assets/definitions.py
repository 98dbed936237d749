"""The code location: every asset, job, schedule and sensor of a project, wired from `prism.yaml`.

    from prism_assets import build_definitions, load_settings

    defs = build_definitions(load_settings("prism.yaml"), key_prefix="acme")

`defs` below is that of `prism.yaml` in the working folder (or of PRISM_CONFIG), built when Dagster loads it.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import dagster as dg

from prism_assets.engines import build_engines
from prism_assets.ops.conditions import condition_of
from prism_assets.ops.runs import one_process
from prism_assets.ops.schedules import build_jobs, build_schedules
from prism_assets.ops.sensors import build_sensors
from prism_assets.project import Project
from prism_assets.resources.lake import digest
from prism_assets.settings import Settings, load_settings
from prism_assets.tables import ASSETS, Asset
from prism_assets.work import as_resource


def build_definitions(
    settings: Settings,
    resource_overrides: Mapping[str, Any] | None = None,
    *,
    key_prefix: str | Sequence[str] = (),
    group_prefix: str = "",
    executor: dg.ExecutorDefinition | None = one_process,
) -> dg.Definitions:
    """All definitions of a project.

    `key_prefix` is put before every asset key, and names the project's jobs, sensors, schedules, resources and shards,
    so that it can be used beside other definitions, or beside another project, in one code location and one instance.
    `resource_overrides` exchanges engines: `lake`, `language_model`, `vector_store`. `executor` None leaves the choice
    to the definitions that these are merged with; ours runs all steps of a run in one process, which loads a model
    once. Raises ValueError for an override that names no engine.
    """
    project = Project.of(settings, key_prefix, group_prefix)
    engines = build_engines(settings)
    unknown = set(resource_overrides or {}) - set(engines)
    if unknown:
        raise ValueError(
            f"resource_overrides: {', '.join(sorted(unknown))} is no engine; there are {', '.join(engines)}"
        )
    engines |= resource_overrides or {}
    with warnings.catch_warnings():
        # Backfill policies, pools and freshness are marked beta; at every load they would fill the screen.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.Definitions(
            assets=[_asset(project, entry) for entry in ASSETS],
            jobs=build_jobs(project),
            schedules=build_schedules(project),
            sensors=build_sensors(project),
            resources={project.named(name): as_resource(engine) for name, engine in engines.items()},
            executor=executor,
        )


def _asset(project: Project, entry: Asset) -> dg.AssetsDefinition:
    """An asset with its automation condition, and with the settings that it reads in its code version."""
    # Where a target's files are is no setting of what is made of them.
    paths = {"targets": {"__all__": {"examples", "eval"}}}
    dumped = project.settings.model_dump(mode="json", exclude=paths)
    sections = {section: dumped[section] for section in entry.reads}
    condition = condition_of(project, entry)

    def finish(spec: dg.AssetSpec) -> dg.AssetSpec:
        version = f"{spec.code_version}-{digest(sections)[:8]}" if sections else spec.code_version
        return spec.replace_attributes(automation_condition=condition, code_version=version)

    return import_module(entry.module).build(project).map_asset_specs(finish)


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions of `prism.yaml` here, or of the file that PRISM_CONFIG names."""
    return build_definitions(load_settings())
