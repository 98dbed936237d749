"""The asset `live_pool`: the manifest of live shards, and which of their rows count."""

from collections.abc import Mapping
from typing import Any, cast

import dagster as dg

from prism_assets.corpus.candidates import scan_inbox
from prism_assets.corpus.intake import COLUMNS, SHOW_REJECTS, intake
from prism_assets.corpus.targets import conversations
from prism_assets.errors import StageError
from prism_assets.metadata import preview
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, Rows
from prism_assets.stage import Stage
from prism_assets.work import Outcome, stage_of, the_whole

NOTHING_PENDING = Check("nothing_pending", "Every live shard has been ingested.")
NO_CONTAMINATION = Check("no_contamination", "No candidate is a target or held-out record.")


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "live_pool",
        group="corpus",
        kinds={"parquet"},
        deps=[project.all_shards_of("candidates"), "targets"],
        checks=[NOTHING_PENDING, NO_CONTAMINATION],
    )
    def live_pool(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """The manifest: the live shards, and which of their rows do not count.

        A row that is in several shards counts once, in the shard with the smallest key. A row equal to a target
        or held-out record is kept out of every ranking. Shares, budgets and top-k count the rows that remain.
        """
        stage = stage_of(project, context)
        keys = context.instance.get_dynamic_partitions(cast("str", project.shards.name))
        found = {key: stage.shown_or_none("candidates", key) for key in sorted(keys)}
        live = {key: artifact for key, artifact in found.items() if artifact is not None}
        return the_whole(context, stage, _list_pool(stage, live, sorted(set(keys) - set(live))))

    return live_pool


def _list_pool(stage: Stage, live: Mapping[str, Artifact], pending: list[str]) -> Outcome:
    inbox = stage.settings.candidates.inbox
    if not live:
        raise StageError(f"No candidates: put JSON Lines or Parquet files into {inbox}.")
    held_back = [stage.shown(table, name) for name in stage.settings.targets for table in ("targets", "eval_examples")]
    recipe = stage.recipe(
        "live_pool", {"shards": list(live)}, {"candidates": list(live.values()), "held_back": held_back}
    )
    pool, computed = stage.make(recipe, lambda: _manifest(stage, live, held_back))
    stage.show(pool)
    notes = pool.notes
    if not notes["canonical_rows"]:
        raise StageError(
            f"No candidate is left: every row of the {len(live)} files in {inbox} was rejected "
            f"or is a target or held-out record ({notes['contaminated']}). The reasons: {SHOW_REJECTS}"
        )
    rows = stage.lake.read_table(pool, ["shard", "rows", "canonical_rows", "completion_tokens"])
    return Outcome(
        [pool],
        computed,
        {
            "dagster/row_count": notes["canonical_rows"],
            "shards": len(live),
            "duplicates_across_shards": notes["duplicates"],
            "contaminated": notes["contaminated"],
            "completion_tokens": notes["completion_tokens"],
            "sources": dg.MetadataValue.json(notes["sources"]),
            "rows": preview(rows.to_pylist()),
            **_intake_metadata(stage),
        },
        [
            NOTHING_PENDING(not pending, pending=len(pending), shards=", ".join(pending[:20])),
            NO_CONTAMINATION(not notes["contaminated"], excluded=notes["contaminated"]),
        ],
    )


def _intake_metadata(stage: Stage) -> dict[str, Any]:
    """What became of all records given, for the UI."""
    found = intake(stage, scan_inbox(stage, at_rest_seconds=0).ignored)
    reasons = [{"records of": name, "reason": why, "rejected": count} for name, why, count in found.reasons]
    return {
        "intake": preview([dict(zip(COLUMNS, part.row(), strict=True)) for part in found.parts], limit=20),
        "rejected_because": preview(reasons, limit=20),
        "intake_notes": preview([{"note": one} for one in found.notes()], limit=20),
    }


def _manifest(stage: Stage, live: Mapping[str, Artifact], held_back: list[Artifact]) -> Rows:
    from prism_assets.corpus.manifest import manifest

    columns = ["id", "source", "completion_tokens"]
    tables = {key: stage.lake.read_table(artifact, columns) for key, artifact in live.items()}
    forbidden = set().union(*(conversations(stage, artifact) for artifact in held_back))
    table, notes = manifest(tables, {key: artifact.fingerprint for key, artifact in live.items()}, forbidden)
    return Rows(table, notes)
