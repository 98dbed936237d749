"""A door: experiments. The stages of selection, fine-tuning and evaluation, run for redrawn targets and several seeds."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import UnusableTargets, corpus_version
from prism_assets.evaluation.assets import publish_scores
from prism_assets.experiment.summary import COMPARED_WITH, METRICS, Cost, Trial
from prism_assets.features.assets import feature_version, gradient_pass, publish_target_features
from prism_assets.partitions import targets_of
from prism_assets.reference.assets import warmup_scope
from prism_assets.selection.assets import direction_scope, join_key, publish_selection, selection_inputs, split_key
from prism_assets.selection.target_direction import DirectionInputs, publish_directions, sample_features
from prism_assets.settings import Settings
from prism_assets.training.assets import publish_adapter, seed_partition
from resources.lake import Artifact, Lake, Recipe, references
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore

SPLIT_VERSION = 1
TRIAL_VERSION = 1
EXPERIMENT_VERSION = 2

GROUP = "experiment"


def strategies_of(settings: Settings) -> list[str]:
    """The strategies of an experiment: those of the settings, and those that every one is held against."""
    return list(dict.fromkeys([*(settings.experiment.strategies or settings.strategies), *COMPARED_WITH]))


def seeds_of(settings: Settings) -> tuple[int, ...]:
    """The seeds of fine-tuning in each split."""
    return settings.experiment.seeds or settings.seeds


def split_name(target: str, split: int) -> str:
    """The name of a target in a split. Split 0 is the target itself, so that what `prism run` made is found."""
    return target if split == 0 else f"{target}/split-{split}"


def trial_partition(target: str, strategy: str, split: int, seed: int) -> str:
    """The head of one trial."""
    return seed_partition(join_key(f"{target}/split-{split}", strategy), seed)


def build_experiment_trials(settings: Settings) -> dg.AssetsDefinition:
    """The asset `experiment_trials`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"pytorch", "parquet"},
        code_version=str(TRIAL_VERSION),
        deps=["targets", "candidate_index", "live_pool", "warmup_checkpoints"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
    )
    def experiment_trials(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
        vector_store: VectorStore,
    ) -> dg.MaterializeResult:
        """Every strategy in every split with every seed: selection, adapter and held-out metrics of each trial.

        Made by the functions that make the production assets, from the same recipes: what `prism run` made is found, and
        a killed experiment goes on where it stopped. All trials of a target select from one state of the pool; a strategy
        that draws at random draws anew in each split.
        """
        return stage.each_partition(
            context, lambda name: _run_trials(context, settings, lake, language_model, vector_store, name)
        )

    return experiment_trials


class _Split(NamedTuple):
    """What the strategies of one split work from."""

    name: str
    number: int
    targets: Artifact
    held_out: Artifact
    features: Artifact
    directions: Mapping[str, Artifact]  # of the strategies that have one


def _run_trials(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    store: VectorStore,
    target: str,
) -> stage.Outcome:
    from prism_assets.selection.strategies import STRATEGIES

    version = feature_version(settings, lake, model)
    strategies, seeds = strategies_of(settings), seeds_of(settings)
    splits, computed = _prepare_splits(context, settings, lake, model, target, version)
    # Looked at once: an arrival in the midst of it must not give some trials another pool than the others.
    asked = [_answers(split, version, corpus_version(settings, model)) for split in splits]
    pinned = selection_inputs(settings, lake, model, target, STRATEGIES["uniform"], version, asked[0])
    trials: list[Artifact] = []
    total = len(splits) * len(strategies) * len(seeds)
    for split, of_target in zip(splits, asked, strict=True):
        drawn = _redrawn(settings, split.number)
        base, made = publish_scores(context, settings, lake, model, split.held_out, None, join_key(split.name, "base"))
        computed += made
        for name in strategies:
            key = join_key(split.name, name)
            inputs = selection_inputs(settings, lake, model, split.name, STRATEGIES[name], version, of_target)
            inputs |= {role: pinned[role] for role in ("index", "pool") if role in inputs}
            selection, made = publish_selection(context, drawn, lake, model, store, STRATEGIES[name], inputs, key)
            computed += made
            rows = lake.read_table(selection)
            reads_targets = bool({"direction", "target_features"} & set(inputs))
            for seed in seeds:
                adapter, trained = publish_adapter(context, settings, lake, model, key, selection, rows, seed)
                scores, judged = publish_scores(context, settings, lake, model, split.held_out, adapter, key)
                made_from = {
                    "target features": split.features if reads_targets else None,
                    "direction": inputs.get("direction"),
                    "selection": selection,
                    "fine-tuning": adapter,
                    "evaluation": scores,
                }
                trial, made = _publish_trial(context.run_id, lake, target, name, split, seed, base, made_from, version)
                lake.point(trial, trial.partition, version, context.run_id)
                computed += trained + judged + made
                trials.append(trial)
                context.log.info(f"{target}: trial {len(trials)} of {total}: {name}, split {split.number}, seed {seed}.")
    return _trials_outcome(trials, computed)


def _redrawn(settings: Settings, split: int) -> Settings:
    """The settings with another seed of selection in each split: what is drawn at random is one draw no more."""
    selection = settings.selection.model_copy(update={"seed": settings.selection.seed + split})
    return settings.model_copy(update={"selection": selection})


def _answers(split: _Split, version: str, corpus: str) -> Callable[[str, str], Artifact]:
    """What `selection_inputs` asks of a target, answered with a split's own."""
    known = {
        ("targets", corpus): split.targets,
        ("target_features", version): split.features,
        **{("target_directions", direction_scope(version, name)): one for name, one in split.directions.items()},
    }
    return lambda table, scope: known[table, scope]


def _prepare_splits(
    context: dg.AssetExecutionContext, settings: Settings, lake: Lake, model: LanguageModel, target: str, version: str
) -> tuple[list[_Split], int]:
    """Records, target gradients and directions of every split, with the model loaded once."""
    from prism_assets.selection.strategies import STRATEGIES

    corpus = corpus_version(settings, model)
    warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))
    given = lake.require("targets", target, corpus), lake.require("eval_examples", target, corpus)
    wanted = [STRATEGIES[name] for name in strategies_of(settings)]
    with_direction = {one.name: one for one in wanted if one.needs_direction}
    if any("direction" in one.reads for one in wanted):
        with_direction["prism"] = STRATEGIES["prism"]
    splits, computed = [], 0
    with gradient_pass(settings, model, warmup) as work:
        curvature = sample_features(context, settings, lake, work, warmup, version)
        for number in range(settings.experiment.splits):
            name = split_name(target, number)
            targets, held_out, made = _publish_split(context.run_id, settings, lake, target, number, *given)
            features, more = publish_target_features(context, settings, lake, work, warmup, targets, name, version)
            inputs = DirectionInputs(name, version, features, targets, held_out, warmup, curvature)
            directions, still_more = publish_directions(context, settings, lake, work, inputs, with_direction.values())
            computed += made + more + still_more
            splits.append(_Split(name, number, targets, held_out, features, directions))
    return splits, computed


def _publish_split(
    run_id: str, settings: Settings, lake: Lake, target: str, number: int, targets: Artifact, held_out: Artifact
) -> tuple[Artifact, Artifact, int]:
    """Targets and held-out records of a split; those of split 0 are there already."""
    if number == 0:
        return targets, held_out, 0
    from prism_assets.experiment.splits import redraw

    how = settings.experiment.redraw
    recipes = [
        Recipe(
            table, SPLIT_VERSION, {"split": number, "redraw": how}, {"targets": targets, "eval_examples": held_out},
            partition=split_name(target, number), version=targets.header["version"],
        )
        for table in ("targets", "eval_examples")
    ]  # fmt: skip
    found = [lake.find(recipe) for recipe in recipes]
    if None not in found:
        return *found, 0
    try:
        drawn = redraw(lake.read_table(targets), lake.read_table(held_out), number, how)
    except ValueError as error:
        raise UnusableTargets(f"targets.{target}: {error}.") from error
    return *(lake.publish_table(recipe, rows, run_id=run_id) for recipe, rows in zip(recipes, drawn, strict=True)), 2


def _publish_trial(
    run_id: str,
    lake: Lake,
    target: str,
    strategy: str,
    split: _Split,
    seed: int,
    base: Artifact,
    made_from: Mapping[str, Artifact | None],
    version: str,
) -> tuple[Artifact, int]:
    """One row: the metrics of an adapter and of the base model on the same records. What was made for it, with costs,
    is in the notes."""
    import pyarrow as pa

    scores, selection = made_from["evaluation"], made_from["selection"]
    named = {"target": target, "strategy": strategy, "split": split.number, "seed": seed}
    inputs = {role: one for role, one in made_from.items() if one is not None}
    recipe = Recipe(
        "trials", TRIAL_VERSION, named, {**inputs, "base": base},
        partition=trial_partition(target, strategy, split.number, seed), version=version,
    )  # fmt: skip
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    row = {
        **named,
        **{metric: scores.notes[metric] for metric in METRICS},
        **{f"base_{metric}": base.notes[metric] for metric in METRICS},
        "selected_rows": selection.notes["rows"],
        "completion_tokens": selection.notes["completion_tokens"],
    }
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("target", "strategy")),
            *((name, pa.int64()) for name in ("split", "seed")),
            *((f"{of}{metric}", pa.float64()) for of in ("", "base_") for metric in METRICS),
            *((name, pa.int64()) for name in ("selected_rows", "completion_tokens")),
        ]
    )
    costs = [Cost(name, one.fingerprint, *_recorded(one)) for name, one in inputs.items()]
    notes = {**row, "costs": [one._asdict() for one in costs]}
    return lake.publish_table(recipe, pa.Table.from_pylist([row], schema), run_id=run_id, notes=notes), 1


def _recorded(artifact: Artifact) -> tuple[float | None, float | None]:
    """CPU and GPU seconds; None of what was made before costs were recorded."""
    cost = artifact.notes.get("cost") or {}
    return cost.get("cpu_seconds"), cost.get("gpu_seconds")


def _trials_outcome(trials: Sequence[Artifact], computed: int) -> stage.Outcome:
    shown = ("strategy", "split", "seed", *METRICS)
    return stage.Outcome(
        trials,
        computed,
        {
            "dagster/row_count": len(trials),
            "rows": stage.preview([{name: one.notes[name] for name in shown} for one in trials], limit=60),
        },
    )


# -- outcome -----------------------------------------------------------------------------------------------------


def build_experiment(settings: Settings) -> dg.AssetsDefinition:
    """The asset `experiment`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"html", "parquet"},
        code_version=str(EXPERIMENT_VERSION),
        deps=["experiment_trials"],
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def experiment(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
    ) -> dg.MaterializeResult:
        """Mean, deviation, paired differences to uniform, less and random with intervals, costs, and the verdict in words.

        A table, and beside it experiment.json's part and page of the target; those over all targets are written to
        `storage.report`.
        """
        result = stage.each_partition(
            context, lambda name: _publish_experiment(context.run_id, settings, lake, language_model, name)
        )
        page = write_combined_page(settings, lake, language_model)
        context.log.info(f"The page over all targets is at {page}.")
        return result

    return experiment


def _publish_experiment(run_id: str, settings: Settings, lake: Lake, model: LanguageModel, target: str) -> stage.Outcome:
    import pyarrow as pa

    from prism_assets.evaluation import plots
    from prism_assets.experiment.page import build_page
    from prism_assets.experiment.summary import long_table, share_cost, summarize, table, verdict

    version = feature_version(settings, lake, model)
    keys = [
        trial_partition(target, strategy, split, seed)
        for strategy in strategies_of(settings)
        for split in range(settings.experiment.splits)
        for seed in seeds_of(settings)
    ]
    trials = [lake.require("trials", key, version) for key in keys]
    recipe = Recipe(
        "experiments", EXPERIMENT_VERSION, {"target": target, "redraw": settings.experiment.redraw}, {"trials": trials},
        partition=target, version=version,
    )  # fmt: skip
    content = summarize([_trial(one) for one in trials], settings.experiment.redraw)
    share_cost(content, _shared_cost(settings, lake, model, version, trials), _shared_stages(settings))
    content["verdict"] = verdict(content)
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        data = _page_data(settings, model, {target: content})
        schema = pa.schema(
            [
                *((name, pa.string()) for name in ("target", "strategy", "other", "metric")),
                *((name, pa.float64()) for name in ("mean", "std", "low", "high")),
                ("units", pa.int64()),
                ("unit", pa.string()),
            ]
        )
        artifact = lake.publish_table(
            recipe,
            pa.Table.from_pylist(long_table(target, content), schema),
            run_id=run_id,
            notes={"trials": len(trials)},
            attachments={
                ".json": lambda path: path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8"),
                ".html": lambda path: path.write_text(build_page(data), encoding="utf-8"),
            },
        )
    lake.point(artifact, target, version, run_id)
    _retire_other_trials(lake, target, version, set(keys))
    header, *rows = table({target: content})
    return stage.Outcome(
        [artifact],
        int(computed),
        {
            "page": dg.MetadataValue.path(str(artifact.path.with_suffix(".html"))),
            "rows": stage.preview([dict(zip(header[1:], row[1:], strict=True)) for row in rows], limit=30),
            "verdict": dg.MetadataValue.md("\n".join(f"- {one}" for one in content["verdict"])),
            "means": dg.MetadataValue.md(
                plots.as_markdown_image(
                    plots.strategies_comparison(content["strategies"], _means(content["base"])), "means"
                )
            ),
            "differences": dg.MetadataValue.md(
                plots.as_markdown_image(plots.paired_differences(content["differences"]), "paired differences")
            ),
        },
    )


def _means(base: Mapping[str, Any]) -> dict[str, float | None]:
    return {metric: one and one["mean"] for metric, one in base.items()}


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


def _shared_cost(
    settings: Settings, lake: Lake, model: LanguageModel, version: str, trials: Sequence[Artifact]
) -> dict[str, Any]:
    """What strategies need before the first trial, once for all targets: warm-up, features, hidden states."""
    from prism_assets.experiment.summary import cost_by_stage

    warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, model))
    made = [
        ("warm-up", warmup),
        *(("candidate features", one) for one in _feature_blocks(lake, version)),
        *(("hidden states", one) for one in _hidden_states(lake, trials)),
    ]
    return cost_by_stage([Cost(name, one.fingerprint, *_recorded(one)) for name, one in made])


def _shared_stages(settings: Settings) -> dict[str, list[str]]:
    """Strategy -> the stages of `_shared_cost` that it could not do without."""
    from prism_assets.selection.strategies import STRATEGIES

    chosen = {name: STRATEGIES[name] for name in strategies_of(settings)}
    return {
        name: ["warm-up", "candidate features"] * one.needs_features + ["hidden states"] * ("hidden_states" in one.reads)
        for name, one in chosen.items()
    }


def _hidden_states(lake: Lake, trials: Sequence[Artifact]) -> Iterator[Artifact]:
    """The blocks that the selections of these trials were made from."""
    selections = {one.fingerprint for trial in trials for one in references(trial) if one.table == "selection"}
    for fingerprint in selections:
        selection = lake.get("selection", fingerprint)
        for one in references(selection) if selection else ():
            block = lake.get("hidden_states", one.fingerprint) if one.table == "hidden_states" else None
            if block is not None:
                yield block


def _feature_blocks(lake: Lake, version: str) -> Iterator[Artifact]:
    from prism_assets.features.assets import indexed_shards

    for shard in indexed_shards(lake, lake.require("candidate_index", None, version)):
        features = lake.get("candidate_features", shard.features)
        for name in lake.read_table(features, ["block"])["block"].to_pylist() if features else ():
            block = lake.get("feature_blocks", name)
            if block is not None:
                yield block


def _retire_other_trials(lake: Lake, target: str, version: str, keys: set[str]) -> None:
    """Trials of this target that the settings ask for no more; `prism gc` may remove what nothing else needs."""
    for head in lake.heads("trials"):
        its_target = split_key(head["partition"])[0].partition("/split-")[0]
        if head["scope"] == version and its_target == target and head["partition"] not in keys:
            lake.retire("trials", head["partition"], version)


def _page_data(settings: Settings, model: LanguageModel, targets: Mapping[str, Any]) -> dict[str, Any]:
    """experiment.json around the targets' parts."""
    return {**stage.page_head(settings, model), "targets": dict(targets)}


def write_combined_page(settings: Settings, lake: Lake, model: LanguageModel) -> Path:
    """The page over all targets that have an experiment, renamed into place at `storage.report`; returns its path."""
    from prism_assets.experiment.page import build_page

    version = feature_version(settings, lake, model)
    parts: dict[str, Any] = {}
    for name in settings.targets:
        artifact = lake.head("experiments", name, version)
        if artifact is not None:
            parts |= json.loads(artifact.path.with_suffix(".json").read_text(encoding="utf-8"))["targets"]
    data = _page_data(settings, model, parts)
    texts = {"experiment.json": json.dumps(data, indent=1, ensure_ascii=False), "experiment.html": build_page(data)}
    return stage.replace_texts(settings.storage.report, texts) / "experiment.html"
