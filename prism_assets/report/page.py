"""The page: report.json's content as one self-contained HTML file.

Without scripts it has the verdict, the tables and the pictures; `report.js` adds sorting, the search over the selected
rows, and charts. Its scripts are in it, and its policy lets no other run and nothing be fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_assets.corpus.intake import COLUMNS, SHOW_REJECTS, Intake
from prism_assets.report.comparison import METRIC_LABELS, check_format, shown_metrics
from prism_assets.report.inlined import content_policy, data_block, scripts, styles
from prism_assets.report.views import target_view
from prism_assets.report.wording import count_text, pretty, visible_value

_SHOWN_REJECTS = 50


def build_report(data: Mapping[str, Any]) -> str:
    """The HTML page for `data`, the content of report.json: all of it escaped, and the same bytes for the same data.

    Raises ValueError where the format is unknown or a target lacks its strategies.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    check_format(data)
    targets = []
    for number, (name, target) in enumerate(data.get("targets", {}).items(), start=1):
        if not isinstance(target.get("strategies"), Mapping):
            raise ValueError(f"report.json, targets.{name}: 'strategies' is missing")
        targets.append(target_view(f"target-{number}", name, target, shown_metrics(data["targets"].values())))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_block"] = data_block
    model = data.get("model") or {}
    return environment.get_template("report.html").render(
        created=str(data.get("created") or ""),
        model_name=str(model.get("name") or "unnamed model"),
        model_fingerprint=str(model.get("fingerprint") or ""),
        metrics=[METRIC_LABELS[one] for one in shown_metrics(data.get("targets", {}).values())],
        targets=targets,
        settings=pretty(data.get("settings")),
        lineage=pretty(data.get("lineage")),
        intake=_intake_view(data),
        policy=content_policy(),
        library_styles=styles(),
        scripts=scripts(),
    )


def _intake_view(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What became of the records given, None where nothing is known of it."""
    if not data.get("intake"):
        return None
    intake = Intake.from_data(data["intake"])
    rejects: list[Mapping[str, Any]] = list(data.get("rejects") or [])
    return {
        "columns": COLUMNS[1:],
        "parts": [(part.name, list(map(count_text, part.row()[1:]))) for part in intake.parts],
        "reasons": [(name, why, count_text(count)) for name, why, count in intake.reasons],
        "files": intake.files,
        "unused": intake.unused_fields,
        "rows": [
            tuple(str(row.get(name) or "") for name in ("shard", "line", "field", "reason"))
            for row in rejects[:_SHOWN_REJECTS]
        ],
        "command": SHOW_REJECTS,
    }
