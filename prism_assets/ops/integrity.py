"""Is what the lake holds what was published? Asked by `prism doctor --verify`, and of a share of it every night."""

from collections.abc import Iterator
from datetime import date
from typing import Any

import dagster as dg

from prism_assets.errors import LakeError
from prism_assets.identity import ENGINES
from prism_assets.project import Project
from prism_assets.resources.lake import Lake, damaged_among
from prism_assets.selection.json_lines import JSON_LINES, restore_json_lines
from prism_assets.stage import Stage
from prism_assets.text import visible

PARTS = 14  # the nights in which everything is read once
JOB = "verify_lake"


def damaged(stage: Stage) -> Iterator[str]:
    """A sentence for every artefact that was damaged, and is set aside now, and for every JSON Lines file that was
    written again."""
    yield from damaged_among(stage.lake)
    for table in ("selection", "removed"):
        for artifact in list(stage.lake.artifacts(table)):
            place = stage.lake.local(artifact, suffix=JSON_LINES)
            try:
                if restore_json_lines(stage, artifact):
                    yield f"{place} was lost or altered; it was written again."
            except (LakeError, OSError) as error:
                yield f"{place} is lost or altered, or cannot be read, and was not written again: {error}"


def build_verify_job(project: Project) -> dg.JobDefinition:
    """The job that reads a share of the lake, another one every night."""
    lake_name = project.named(ENGINES[0])

    @dg.op(
        name=f"{project.named(JOB)}_share",
        required_resource_keys={lake_name},
        description=f"Reads a {PARTS}th of all artefacts whole and compares them with their content hashes. A damaged "
        "one is set aside, so that the next run makes it again, and fails this run by name.",
    )
    def verify_share(context: dg.OpExecutionContext) -> None:
        lake: Lake = getattr(context.resources, lake_name)
        found = list(damaged_among(lake, date.today().toordinal() % PARTS, PARTS))
        if found:
            raise dg.Failure(visible("\n".join(found)))
        context.log.info(f"Nothing is damaged in this {PARTS}th of the lake.")

    @dg.job(name=project.named(JOB), description=f"Verifies a {PARTS}th of the lake, another one every day.")
    def job() -> Any:
        verify_share()

    return job
