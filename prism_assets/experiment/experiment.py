"""The asset `experiment`: the results of a target's trials, as a table and as a page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets.experiment.experiment_trials import recorded_cost
from prism_assets.experiment.summary import Cost, Trial
from prism_assets.experiment.trials import strategies_of, trial_keys
from prism_assets.features.blocks import blocks_of
from prism_assets.features.index_parts import indexed_shards
from prism_assets.identity import target_of_trial
from prism_assets.metadata import picture, preview
from prism_assets.project import Project
from prism_assets.report.files import page_head, replace_texts
from prism_assets.resources.lake import Artifact, Rows, references
from prism_assets.settings import Settings
from prism_assets.stage import Stage
from prism_assets.tables import METRICS, schema_of
from prism_assets.work import Outcome, each_partition, stage_of


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset("experiment", group="experiment", kinds={"html", "parquet"}, deps=["experiment_trials"])
    def experiment(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Mean, deviation, paired differences to uniform, less and random with intervals, costs, and the verdict in
        words.

        A table, and beside it experiment.json's part and page of the target; those over all targets are written to
        `storage.report`.
        """
        stage = stage_of(project, context)
        result = each_partition(context, stage, lambda name: _summarise(stage, name))
        context.log.info(f"The page over all targets is at {write_combined_page(stage)}.")
        return result

    return experiment


def _summarise(stage: Stage, target: str) -> Outcome:
    from prism_assets.experiment.summary import share_cost, summarize_trials
    from prism_assets.experiment.verdict import verdict

    settings = stage.settings
    keys = trial_keys(settings, target)
    trials = [stage.shown("trials", key) for key in keys]
    content = summarize_trials([_trial(one) for one in trials], settings.experiment.redraw)
    share_cost(content, _shared_cost(stage, trials), _shared_stages(settings))
    content["verdict"] = verdict(content)
    recipe = stage.recipe(
        "experiments",
        {"target": target, "redraw": settings.experiment.redraw},
        {"trials": trials},
        partition=target,
    )
    experiment, computed = stage.make(recipe, lambda: _rows(stage, target, content, len(trials)))
    stage.show(experiment, target)
    _retire_other_trials(stage, target, set(keys))
    return _outcome(stage, target, content, experiment, computed)


def _rows(stage: Stage, target: str, content: Mapping[str, Any], trials: int) -> Rows:
    import pyarrow as pa

    from prism_assets.experiment.page import build_page
    from prism_assets.experiment.summary import long_table

    data = {**page_head(stage), "targets": {target: content}}
    table = pa.Table.from_pylist(long_table(target, content), schema_of("experiments"))
    return Rows(
        table,
        {"trials": trials},
        {
            ".json": lambda path: path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8"),
            ".html": lambda path: path.write_text(build_page(data), encoding="utf-8"),
        },
    )


def _outcome(stage: Stage, target: str, content: Mapping[str, Any], experiment: Artifact, computed: int) -> Outcome:
    from prism_assets import plots
    from prism_assets.experiment.summary import table

    base = {metric: one and one["mean"] for metric, one in content["base"].items()}
    header, *rows = table({target: content})
    metadata = {
        "page": dg.MetadataValue.path(str(stage.lake.local(experiment, suffix=".html"))),
        "rows": preview([dict(zip(header[1:], row[1:], strict=True)) for row in rows], limit=30),
        "verdict": dg.MetadataValue.md("\n".join(f"- {one}" for one in content["verdict"])),
        "means": picture(plots.strategies_comparison(content["strategies"], base), "means"),
        "differences": picture(plots.paired_differences(content["differences"]), "paired differences"),
    }
    return Outcome([experiment], computed, metadata)


def _trial(artifact: Artifact) -> Trial:
    notes = artifact.notes
    return Trial(
        notes["strategy"],
        notes["split"],
        notes["seed"],
        {metric: notes[metric] for metric in METRICS},
        {metric: notes[f"base_{metric}"] for metric in METRICS},
        notes["selected_rows"],
        notes["completion_tokens"],
        [Cost(**one) for one in notes["costs"]],
    )


# -- shared costs -------------------------------------------------------------------------------------------------


def _shared_cost(stage: Stage, trials: Sequence[Artifact]) -> dict[str, Any]:
    """What strategies need before the first trial, once for all targets: warm-up, features, hidden states."""
    from prism_assets.experiment.summary import cost_by_stage

    made = [
        ("warm-up", stage.warmup),
        *(("candidate features", one) for one in _feature_blocks(stage)),
        *(("hidden states", one) for one in _hidden_states(stage, trials)),
    ]
    return cost_by_stage([Cost(name, one.fingerprint, *recorded_cost(one)) for name, one in made])


def _shared_stages(settings: Settings) -> dict[str, list[str]]:
    """Strategy -> the stages of `_shared_cost` that it could not do without."""
    from prism_assets.selection.strategies import STRATEGIES

    chosen = {name: STRATEGIES[name] for name in strategies_of(settings)}
    return {
        name: ["warm-up", "candidate features"] * one.needs_features
        + ["hidden states"] * ("hidden_states" in one.reads)
        for name, one in chosen.items()
    }


def _hidden_states(stage: Stage, trials: Sequence[Artifact]) -> Iterator[Artifact]:
    """The blocks that the selections of these trials were made from."""
    selections = {one.fingerprint for trial in trials for one in references(trial) if one.table == "selection"}
    for fingerprint in selections:
        selection = stage.lake.get("selection", fingerprint) if fingerprint else None
        for one in references(selection) if selection else ():
            if one.table == "hidden_states" and one.fingerprint is not None:
                block = stage.lake.get("hidden_states", one.fingerprint)
                if block is not None:
                    yield block


def _feature_blocks(stage: Stage) -> Iterator[Artifact]:
    for shard in indexed_shards(stage.lake, stage.shown("candidate_index")):
        features = stage.lake.get("candidate_features", shard.features)
        for block in blocks_of(stage.lake, features) if features else ():
            if block is not None:
                yield block


def _retire_other_trials(stage: Stage, target: str, keys: set[str]) -> None:
    """Remove the heads of trials that the settings no longer ask for; `prism gc` may remove what nothing else needs."""
    for head in stage.lake.heads("trials"):
        of_today = head["scope"] == stage.feature_version and target_of_trial(head["partition"]) == target
        if of_today and head["partition"] not in keys:
            stage.retire("trials", head["partition"])


def write_combined_page(stage: Stage) -> Path:
    """The page over all targets that have an experiment, renamed into place at `storage.report`; returns its path."""
    from prism_assets.experiment.page import build_page

    parts: dict[str, Any] = {}
    for name in stage.settings.targets:
        experiment = stage.shown_or_none("experiments", name)
        if experiment is not None:
            text = stage.lake.local(experiment, suffix=".json").read_text(encoding="utf-8")
            parts |= json.loads(text)["targets"]
    data = {**page_head(stage), "targets": parts}
    texts = {"experiment.json": json.dumps(data, indent=1, ensure_ascii=False), "experiment.html": build_page(data)}
    return replace_texts(stage.settings.storage.report, texts) / "experiment.html"
