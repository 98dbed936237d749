"""experiment.json's content as one self-contained HTML page: no script, no outside resource, all escaped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_assets.experiment.summary import (
    COMPARED_WITH,
    METRIC_LABELS,
    STAGES,
    cost_text,
    total_cost,
    with_interval,
)
from prism_assets.report.comparison import shown_metrics
from prism_assets.report.wording import mean_and_std, visible_value

FORMAT = 1


def build_page(data: Mapping[str, Any]) -> str:
    """The page for `data`, the content of experiment.json. Raises ValueError where its format is unknown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if data.get("format") != FORMAT:
        raise ValueError(f"experiment.json has format {data.get('format')!r}; this version reads format {FORMAT}")
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "report"]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = shown_metrics(data["targets"].values())
    return environment.get_template("experiment.html").render(
        created=data["created"],
        model_name=data["model"]["name"],
        model_fingerprint=data["model"]["fingerprint"],
        metrics=[METRIC_LABELS[one] for one in metrics],
        compared_with=COMPARED_WITH,
        targets=[
            _view(f"target-{n}", name, one, metrics) for n, (name, one) in enumerate(data["targets"].items(), start=1)
        ],
        settings=json.dumps(data["settings"], indent=1, ensure_ascii=False),
    )


def _view(anchor: str, name: str, content: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    strategies = content["strategies"]
    highest = {
        metric: max((one[metric]["mean"] for one in strategies.values() if one[metric]), default=None)
        for metric in metrics
    }
    stages = [stage for stage in STAGES if stage in content["cost"]]
    return {
        "anchor": anchor,
        "name": name,
        "facts": [
            (
                "Splits",
                content["splits"],
                "files as they are, then redrawn" if content["splits"] > 1 else "the files as they are",
            ),
            ("Seeds", len(content["seeds"]), "in each split"),
            ("Trials", len(content["trials"]), f"of {len(strategies)} strategies"),
            ("Cost", cost_text(total_cost(content["cost"])), "of all trials"),
        ],
        "verdict": content["verdict"],
        "unit": content["unit"],
        "units": content["units"],
        "base": [mean_and_std(content["base"], metric) for metric in metrics],
        "rows": [
            {
                "strategy": strategy,
                "cells": [
                    (mean_and_std(one, metric), one[metric] and one[metric]["mean"] == highest[metric])
                    for metric in metrics
                ],
                "rows": f"{one['rows']:,.0f}",
                "tokens": f"{one['completion_tokens']:,.0f}",
            }
            for strategy, one in strategies.items()
        ],
        "differences": [
            {
                "strategy": strategy,
                "other": other,
                "cells": [with_interval(difference[metric]) for metric in metrics],
            }
            for strategy, others in content["differences"].items()
            for other, difference in others.items()
        ],
        "stages": stages,
        "costs": [
            (
                strategy,
                [cost_text(one["cost"].get(stage)) for stage in stages],
                cost_text(total_cost(one["cost"])),
                cost_text(one.get("with_shared")),
            )
            for strategy, one in strategies.items()
        ],
        "shared_cost": [(stage, cost_text(one)) for stage, one in content["shared_cost"].items()],
        "trials": [
            (
                one["strategy"],
                one["split"],
                one["seed"],
                ["–" if one.get(m) is None else f"{one[m]:.4f}" for m in metrics],
            )
            for one in content["trials"]
        ],
        "plots": _plots(content),
    }


def _plots(content: Mapping[str, Any]) -> list[dict[str, str]]:
    from prism_assets import plots

    strategies = content["strategies"]
    unit = content["unit"]
    base = {metric: one and one["mean"] for metric, one in content["base"].items()}
    gpu = total_cost(content["cost"])["gpu_seconds"] is not None
    key = "gpu_seconds" if gpu else "cpu_seconds"
    costs = {
        name: {stage: one["cost"][stage][key] or 0.0 for stage in STAGES if stage in one["cost"]}
        for name, one in strategies.items()
    }
    drawn = [
        (
            plots.strategies_comparison(strategies, base),
            f"Mean over {unit}s, with one standard deviation to each side; dashed: the base model.",
        ),
        (
            plots.paired_differences(content["differences"]),
            f"Left of zero: worse than the strategy after the minus sign. Strokes are the {unit}s, bars 95% intervals.",
        ),
        (
            plots.stage_costs(costs, unit="GPU" if gpu else "CPU"),
            "What making the artefacts took, each counted once for its strategy, found ones included.",
        ),
    ]
    return [{"uri": plots.as_data_uri(image), "caption": caption} for image, caption in drawn]
