"""The asset `experiment_trials`: selection, fine-tuning and evaluation for redrawn targets and several seeds."""

from collections.abc import Mapping, Sequence

import dagster as dg

from prism_assets.evaluation.scores import make_scores
from prism_assets.experiment.summary import Cost
from prism_assets.experiment.trials import (
    Split,
    prepare_splits,
    seeds_of,
    strategies_of,
)
from prism_assets.identity import join_key, trial_partition
from prism_assets.metadata import preview
from prism_assets.project import Project
from prism_assets.resources.lake import Artifact, Rows
from prism_assets.selection.selection import make_selection
from prism_assets.selection.selection_inputs import selection_inputs
from prism_assets.stage import Made, Stage
from prism_assets.tables import METRICS, schema_of
from prism_assets.training.adapter import make_adapter
from prism_assets.work import Outcome, each_partition, stage_of


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "experiment_trials",
        group="experiment",
        kinds={"pytorch", "parquet"},
        deps=["targets", "candidate_index", "live_pool", "warmup_checkpoints"],
        loads_model=True,
    )
    def experiment_trials(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Every strategy in every split with every seed: selection, adapter and held-out metrics of each trial.

        Made by the functions that make the production assets, from the same recipes: what `prism run` made is found,
        and a killed experiment goes on where it stopped. All trials of a target select from one state of the pool; a
        strategy that draws at random draws again in each split.
        """
        stage = stage_of(project, context)
        return each_partition(context, stage, lambda name: _run_trials(stage, name))

    return experiment_trials


def _run_trials(stage: Stage, target: str) -> Outcome:
    from prism_assets.selection.strategies import STRATEGIES

    strategies = strategies_of(stage.settings)
    splits, computed = prepare_splits(stage, target)
    # Read once: an arrival during the experiment must not give some trials another pool than the others.
    pinned = selection_inputs(stage, target, STRATEGIES["uniform"], of_target=splits[0].of_target())
    pinned = {role: pinned[role] for role in ("index", "pool")}
    trials: list[Artifact] = []
    total = len(splits) * len(strategies) * len(seeds_of(stage.settings))
    for split in splits:
        base, made = make_scores(stage, split.held_out, None, join_key(split.name, "base"))
        computed += made
        for strategy in strategies:
            for trial, made in _trials(stage, target, split, strategy, base, pinned):
                trials.append(trial)
                computed += made
                stage.log.info(f"{target}: trial {len(trials)} of {total}: {strategy}, split {split.number}.")
    shown = ("strategy", "split", "seed", *METRICS)
    metadata = {
        "dagster/row_count": len(trials),
        "rows": preview([{name: one.notes[name] for name in shown} for one in trials], limit=60),
    }
    return Outcome(trials, computed, metadata)


def _trials(
    stage: Stage, target: str, split: Split, strategy: str, base: Artifact, pinned: Mapping[str, Artifact]
) -> "Sequence[Made]":
    """The trials of a strategy in a split, one a seed; `computed` counts all that was made for each."""
    from prism_assets.selection.strategies import STRATEGIES

    key = join_key(split.name, strategy)
    inputs = selection_inputs(stage, split.name, STRATEGIES[strategy], of_target=split.of_target())
    inputs |= {role: one for role, one in pinned.items() if role in inputs}
    # Another selection seed in each split, so that a random strategy is not the same draw in all of them.
    drawn = stage.settings.selection.model_copy(update={"seed": stage.settings.selection.seed + split.number})
    selection, _, selected = make_selection(stage.with_settings(selection=drawn), STRATEGIES[strategy], inputs, key)
    reads_targets = bool({"direction", "target_features"} & set(inputs))
    found = []
    for seed in seeds_of(stage.settings):
        adapter, trained = make_adapter(stage, key, selection, seed)
        scores, judged = make_scores(stage, split.held_out, adapter, key)
        made_from = {
            "target features": split.features if reads_targets else None,
            "direction": inputs.get("direction"),
            "selection": selection,
            "fine-tuning": adapter,
            "evaluation": scores,
        }
        named = {"target": target, "strategy": strategy, "split": split.number, "seed": seed}
        trial, made = _make_trial(stage, named, base, {role: one for role, one in made_from.items() if one is not None})
        stage.show(trial, trial.partition)
        found.append(Made(trial, selected + trained + judged + made))
        selected = 0
    return found


def _make_trial(stage: Stage, named: Mapping, base: Artifact, made_from: Mapping[str, Artifact]) -> Made:
    """One row: the metrics of an adapter and of the base model on the same records. What was made for it, with costs,
    is in the notes."""
    recipe = stage.recipe("trials", named, {**made_from, "base": base}, partition=trial_partition(**named))
    return stage.make(recipe, lambda: _row(named, base, made_from))


def _row(named: Mapping, base: Artifact, made_from: Mapping[str, Artifact]) -> Rows:
    import pyarrow as pa

    scores, selection = made_from["evaluation"], made_from["selection"]
    row = {
        **named,
        **{metric: scores.notes[metric] for metric in METRICS},
        **{f"base_{metric}": base.notes[metric] for metric in METRICS},
        "selected_rows": selection.notes["rows"],
        "completion_tokens": selection.notes["completion_tokens"],
    }
    costs = [Cost(name, one.fingerprint, *recorded_cost(one)) for name, one in made_from.items()]
    return Rows(pa.Table.from_pylist([row], schema_of("trials")), {**row, "costs": [one._asdict() for one in costs]})


def recorded_cost(artifact: Artifact) -> tuple[float | None, float | None]:
    """CPU and GPU seconds; None of what was made before costs were recorded."""
    cost = artifact.notes.get("cost") or {}
    return cost.get("cpu_seconds"), cost.get("gpu_seconds")
