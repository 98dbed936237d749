"""The asset `report`: one page per target, and one over all targets."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets.corpus.candidates import scan_inbox
from prism_assets.corpus.intake import intake
from prism_assets.metadata import picture, preview
from prism_assets.project import Project
from prism_assets.report.content import ReportPart, explanations, rows_content, target_content, with_places
from prism_assets.report.files import page_head, relative_to, replace_texts
from prism_assets.report.places import DATA, PAGE, link_in_the_ui
from prism_assets.resources.lake import Artifact, Folder
from prism_assets.stage import Stage
from prism_assets.tables import METRICS
from prism_assets.work import Outcome, each_partition, stage_of

# The weekly refresh makes it at least once in seven days.
FRESH = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=9), warn_window=timedelta(days=8))
_REJECTS = 50


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "report",
        group="evaluation",
        kinds={"html"},
        deps=["evaluation", "selection", "target_direction", "live_pool"],
        loads_model=True,
        freshness_policy=FRESH,
    )
    def report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """One page per target: strategies side by side, what was selected and why, and where every number came from."""
        stage = stage_of(project, context)
        result = each_partition(context, stage, lambda name: _write_target(stage, name))
        context.log.info(f"The report over all targets is at {write_combined_report(stage)}.")
        return result

    return report


def _write_target(stage: Stage, name: str) -> Outcome:
    content = target_content(stage, name)
    # A report shows names: equal inputs under another name, or of other strategies, are another report.
    shown: dict[str, Any] = {"target": name, "strategies": stage.settings.strategies, "seeds": stage.settings.seeds}
    target = stage.settings.targets[name]
    if target.label is not None:
        shown["label"] = [target.label, *target.label_values]
    recipe = stage.recipe("report", shown, {"shown": content.shown}, partition=name)
    report, computed = stage.make(recipe, lambda: Folder(lambda folder: _write_page(stage, name, content, folder)))
    stage.show(report, name)
    return _outcome(stage, name, report, content.data, computed)


def _write_page(stage: Stage, name: str, content: ReportPart, folder: Path) -> None:
    from prism_assets.report.page import build_report

    whole = {**content.data, **rows_content(stage, name), "explanations": explanations(stage, name)}
    data = _around(stage, {name: whole})
    # What is stored in the lake names nothing by where the lake is now: it is moved and copied.
    data |= {name: relative_to(data[name], stage.lake.folder) for name in ("settings", "model", "intake")}
    (folder / DATA).write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / PAGE).write_text(build_report(data), encoding="utf-8")


def _outcome(stage: Stage, name: str, report: Artifact, content: Mapping[str, Any], computed: int) -> Outcome:
    from prism_assets.plots import strategies_comparison
    from prism_assets.report.headline import headline
    from prism_assets.report.verdict import verdict_sentences

    rows = [
        {"strategy": strategy, **{metric: (entry[metric] or {}).get("mean") for metric in METRICS}}
        for strategy, entry in content["strategies"].items()
    ]
    said = headline(name, content)
    metadata = {
        "page": dg.MetadataValue.url(link_in_the_ui(name)),  # of `prism ui`
        "report": dg.MetadataValue.path(str(stage.lake.local(report, PAGE))),
        "use": " ".join(one for one in (said.use, said.sure, said.trust) if one),
        "rows": preview([{"strategy": "base", **content["base"]}, *rows]),
        "verdict": dg.MetadataValue.md("\n".join(f"- {one}" for one in verdict_sentences(content))),
        "comparison": picture(strategies_comparison(content["strategies"], content["base"]), "comparison"),
    }
    return Outcome([report], computed, metadata)


def _around(stage: Stage, targets: Mapping[str, Any]) -> dict[str, Any]:
    """report.json around the targets' parts."""
    pool = stage.shown("live_pool")
    return {
        **page_head(stage),
        "lineage": {
            one.table: {
                "fingerprint": one.fingerprint,
                "content_hash": one.content_hash,
                "run_id": one.header["run_id"],
            }
            for one in (pool, stage.warmup)
        },
        "feature_version": stage.feature_version,
        "intake": intake(stage, scan_inbox(stage, at_rest_seconds=0).ignored).as_data(),
        "rejects": _first_rejects(stage, pool),
        "targets": dict(targets),
    }


def _first_rejects(stage: Stage, pool: Artifact) -> list[dict[str, Any]]:
    """The first rejects of the pool's shards: the table `rejects` has them all, however many there are."""
    found: list[dict[str, Any]] = []
    for shard in stage.lake.read_table(pool, ["shard"])["shard"].to_pylist():
        rejects = stage.shown_or_none("rejects", shard)
        if rejects is not None and rejects.notes["rows"] and len(found) < _REJECTS:
            first = stage.lake.read_first(rejects, _REJECTS - len(found))
            found += [{"shard": shard, **row} for row in first.to_pylist()]
    return found


def write_combined_report(stage: Stage) -> Path:
    """The report over all targets that have one, renamed into place at `storage.report`; returns the page's path."""
    from prism_assets.report.page import build_report

    parts: dict[str, Any] = {}
    for name in stage.settings.targets:
        report = stage.shown_or_none("report", name)
        if report is not None:
            parts |= json.loads(stage.lake.local(report, DATA).read_text(encoding="utf-8"))["targets"]
    data = _around(stage, {name: with_places(stage, part) for name, part in parts.items()})
    texts = {DATA: json.dumps(data, indent=1, ensure_ascii=False), PAGE: build_report(data)}
    return replace_texts(stage.settings.storage.report, texts) / PAGE
