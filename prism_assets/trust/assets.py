"""Trust: for every target, what was measured of whether its weights, directions and scores hold, and what that means."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version
from prism_assets.features.assets import GradientPass, feature_identity, feature_version, gradient_pass, target_set
from prism_assets.partitions import targets_of
from prism_assets.reference.assets import pad_token_id, warmup_scope
from prism_assets.selection.target_direction import (
    COMPARED,
    as_made,
    direction_scope,
    load_direction,
    tokens_counted,
)
from prism_assets.settings import Settings
from prism_assets.trust.verdict import CHECKS, FEWEST_EFFECTIVE, LEAST_CORRELATION, MOST_FLIPPED, findings
from resources.lake import Artifact, Lake, LakeError, Recipe, hash_table
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.features.gradients import GradientEngine
    from prism_assets.rank_statistics import Correlation
    from prism_assets.trust.measures import Outcome, Probe

TRUST_VERSION = 1

GROUP = "trust"

# Passes over a subset: enough that order and curvature have their say, few enough to be short.
_DATAMODEL_EPOCHS = 2

# What a training step and the fine-tunings on subsets depend on; length and accumulation are their own.
_TRAINING_SETTINGS = {"learning_rate", "batch_size", "scheduler", "warmup_ratio", "weight_decay"}

_DESCRIPTIONS = {
    "weights_not_concentrated": f"The weights rest on at least {FEWEST_EFFECTIVE:g} effective targets.",
    "preferences_stable": f"A random step as long as one training step flips at most {MOST_FLIPPED:.0%} of the target "
    "pairs, and the weights agree across checkpoints.",
    "first_order_reaches": "Measured and predicted change of J agree within a factor of two as far along PRISM as one "
    "training step on the best candidate goes.",
    "single_steps_agree": "A step on a single candidate changes J in the order of the stored scores: rank correlation of "
    f"at least {LEAST_CORRELATION}, and above zero beyond its 95% interval.",
    "held_out_follows": "The same steps change the mean log-probability of held-out examples in the order of the stored "
    "scores: rank correlation above zero beyond its 95% interval.",
    "subsets_predicted": "Summed scores predict what short fine-tunings on random subsets do to J: the rank correlation "
    "(linear datamodeling score) is above zero beyond its 95% interval.",
}


def build_trust(settings: Settings) -> dg.AssetsDefinition:
    """The asset `trust`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"pytorch", "parquet"},
        code_version=str(TRUST_VERSION),
        deps=["target_direction", "candidate_index", "targets", "warmup_checkpoints"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        check_specs=[dg.AssetCheckSpec(name, asset="trust", description=_DESCRIPTIONS[name]) for name in CHECKS],
    )
    def trust(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
        vector_store: VectorStore,
    ) -> dg.MaterializeResult:
        """Whether a target's scores can be trusted, measured: weights after small steps, first order over growing steps,
        scores against what training on single candidates and on random subsets really does.

        Costly, so never made by automation: `prism trust TARGET`, the job `check_trust`, or its weekly schedule.
        """
        warmup = lake.require("warmup_checkpoints", None, warmup_scope(settings, language_model))

        with gradient_pass(settings, language_model, warmup) as work:
            return stage.each_partition(
                context, lambda name: _publish_trust(context, settings, lake, vector_store, work, warmup, name)
            )

    return trust


class _Inputs(NamedTuple):
    """What the trust in one target is measured from."""

    version: str
    weights: Artifact
    directions: dict[str, Artifact]
    targets: Artifact
    eval_examples: Artifact
    features: Artifact
    warmup: Artifact


def trust_of(settings: Settings, lake: Lake, model: LanguageModel, target: str) -> dict[str, Any] | None:
    """The measurements of a target in today's feature version, None where it was not measured."""
    artifact = lake.head("trust", target, feature_version(settings, lake, model))
    return None if artifact is None else dict(artifact.notes)


def _publish_trust(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    store: VectorStore,
    work: GradientPass,
    warmup: Artifact,
    name: str,
) -> stage.Outcome:
    import pyarrow as pa

    version = feature_version(settings, lake, work.model)
    corpus = corpus_version(settings, work.model)
    inputs = _Inputs(
        version,
        lake.require("target_weights", name, version),
        {one: lake.require("target_directions", name, direction_scope(version, one)) for one in COMPARED},
        lake.require("targets", name, corpus),
        lake.require("eval_examples", name, corpus),
        lake.require("target_features", name, version),
        warmup,
    )
    made = as_made(settings, inputs.weights).preference
    single, subsets = _samples(settings, lake, store, inputs)
    recipe = Recipe(
        "trust",
        TRUST_VERSION,
        {
            "trust": settings.trust.model_dump(),
            "probe_step": settings.preference.probe_step,
            "temperature": inputs.weights.notes["temperature"],
            **({"score": made.score} if made.score != "mean" else {}),
            "training": settings.training.model_dump(include=_TRAINING_SETTINGS),
            "features": feature_identity(settings, work.model, warmup),
        },
        {
            **inputs.directions,
            "weights": inputs.weights,
            "targets": inputs.targets,
            "eval_examples": inputs.eval_examples,
            "features": inputs.features,
            "warmup": warmup,
            # The rows that are tried, not the pool: an arrival that leaves them alone changes nothing.
            "candidates": hash_table(pa.concat_tables([single, subsets])),
        },
        lineage={"index": lake.require("candidate_index", None, version)},
        partition=name,
        version=version,
    )
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        rows, notes = _measure(context, settings, lake, work, inputs, single, subsets)
        artifact = lake.publish_table(recipe, rows, run_id=context.run_id, notes=notes)
    lake.point(artifact, name, version, context.run_id)
    return _trust_outcome(lake, artifact, int(computed))


# -- which candidates --------------------------------------------------------------------------------------------


def _samples(settings: Settings, lake: Lake, store: VectorStore, inputs: _Inputs) -> "tuple[pa.Table, pa.Table]":
    """The candidates on which single steps are taken, and those that subsets are drawn from."""
    import numpy as np

    from prism_assets.explanation import open_index
    from prism_assets.trust.sample import spread_over_scores

    index = open_index(lake, store, inputs.version)
    if not index.ranked:
        raise dg.Failure("No candidate of the live pool has usable features: see the check gradients_usable.")
    scores = {}
    for name, direction in inputs.directions.items():
        found = index.found.scores(load_direction(lake, direction)[0])
        scores[name] = np.concatenate([one[mask] for one, mask in zip(found, index.usable, strict=True)])
    shards = [one.shard for one in index.shards]
    places = [
        (shard, int(row)) for shard, mask in zip(shards, index.usable, strict=True) for row in np.flatnonzero(mask)
    ]

    def sample(number: int) -> "pa.Table":
        chosen = spread_over_scores(scores, number)
        own = {name: values[chosen] for name, values in scores.items()}
        return _candidate_rows(lake, index.pool, [places[position] for position in chosen], own)

    options = settings.trust
    return sample(options.candidates), sample(options.datamodel_rows if options.datamodel_subsets else 0)


def _candidate_rows(
    lake: Lake, pool: Artifact, places: Sequence[tuple[str, int]], scores: "Mapping[str, np.ndarray]"
) -> "pa.Table":
    """Rows of the pool at (shard, row), shards together: id, tokens, and the stored score under each strategy."""
    import pyarrow as pa

    columns = lake.read_table(pool, ["shard", "candidates_fingerprint"]).to_pydict()
    fingerprints = dict(zip(columns["shard"], columns["candidates_fingerprint"], strict=True))
    schema = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])
    parts = [schema.empty_table()]
    for shard in dict.fromkeys(shard for shard, _ in places):
        candidates = lake.get("candidates", fingerprints[shard])
        if candidates is None:
            raise LakeError(f"The rows of shard {shard} are not in the lake any more: run `prism run`.")
        rows = [row for one, row in places if one == shard]
        parts.append(lake.read_table(candidates, schema.names).take(rows).cast(schema))
    table = pa.concat_tables(parts)
    for name, values in scores.items():
        table = table.append_column(f"score_{name}", pa.array(values, pa.float64()))
    return table


# -- measuring ---------------------------------------------------------------------------------------------------


class _Record:
    """What was measured: rows for the table, and the seconds that each part took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, dict[str, float]] = {}

    def add(self, measure: str, item: str, strategy: str = "prism", **numbers: float | None) -> None:
        """One row; numbers by column name."""
        self.rows.append({"measure": measure, "strategy": strategy, "item": item, **numbers})

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[part] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def table(self) -> "pa.Table":
        """measure, strategy, item, and per row what was predicted and measured; null where a column has no meaning."""
        import pyarrow as pa

        numbers = ("size", "predicted", "exact", "measured", "held_out")
        fields = [(name, pa.string()) for name in ("measure", "strategy", "item")]
        schema = pa.schema([*fields, *((name, pa.float64()) for name in numbers)])
        return pa.Table.from_pylist(self.rows, schema)


def _measure(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    work: GradientPass,
    inputs: _Inputs,
    single: "pa.Table",
    subsets: "pa.Table",
) -> "tuple[pa.Table, dict[str, Any]]":
    """Everything, at the last warm-up checkpoint: the rows of the table and the notes."""
    start = {name: value.detach().clone() for name, value in work.at(None).parameters.items()}
    engine = work.at(work.checkpoints[-1])
    probe = _probe(settings, lake, inputs, engine)
    # AdamW moves a coordinate by about its learning rate at most.
    training_step = settings.training.learning_rate * engine.num_parameters**0.5
    vectors = {name: load_direction(lake, one)[1][-1] for name, one in inputs.directions.items()}
    record = _Record()
    with stage.progress(context, f"single candidates of {inputs.targets.partition}", single.num_rows) as progress:
        singles = _single_steps(record, work, probe, vectors, single, training_step, progress)
    lengths = {"training_step": training_step, "warmup": _distance(engine, start)}
    notes = {
        **{key: inputs.weights.notes[key] for key in ("effective_number_of_targets", "weight_rank_agreement")},
        "checkpoints": len(work.checkpoints),
        "kind": probe.kind,
        "usable_targets": probe.targets.size,
        "held_out_rows": len(probe.held_out),
        "random_steps": _random_steps(record, settings, probe, lengths),
        "growing_steps": _growing_steps(record, inputs, probe, vectors, training_step * singles["largest_cosine"]),
        "single_steps": singles,
        "datamodel": None,
    }
    if settings.trust.datamodel_subsets:
        notes["datamodel"] = _datamodel(context, record, settings, work, probe, subsets)
    return record.table(), {**notes, "seconds": record.seconds}


def _probe(settings: Settings, lake: Lake, inputs: _Inputs, engine: "GradientEngine") -> "Probe":
    """The usable targets, and at most `trust.held_out` held-out records, drawn at random."""
    import numpy as np

    from prism_assets.trust.measures import Probe

    refused = lake.read_table(inputs.features, ["refused"])["refused"].to_pylist()
    usable = np.flatnonzero([reason is None for reason in refused])
    held_out = target_set(lake.read_table(inputs.eval_examples))
    drawn = np.sort(np.random.default_rng(settings.trust.seed).permutation(held_out.size)[: settings.trust.held_out])
    notes = inputs.weights.notes
    rows = lake.read_table(inputs.targets).take(usable)
    targets = target_set(rows)
    return Probe(
        engine,
        targets,
        notes["kind"],
        notes["temperature"],
        [held_out.examples[row] for row in drawn],
        tokens_counted(as_made(settings, inputs.weights), rows, targets.pairs),
    )


def _distance(engine: "GradientEngine", start: Mapping[str, Any]) -> float:
    """How far the engine's parameters are from those that training started from."""
    from prism_assets.selection.direction import norm

    return norm({name: value.detach() - start[name] for name, value in engine.parameters.items()})


def _random_steps(record: _Record, settings: Settings, probe: "Probe", lengths: Mapping[str, float]) -> dict[str, Any]:
    from prism_assets.trust.measures import random_directions, weight_stability

    number = settings.trust.random_steps
    notes: dict[str, Any] = {"number": number}
    with record.timed("random_steps"):
        for name, length in lengths.items():
            directions = random_directions(probe.engine.parameter_shapes, number, settings.trust.seed)
            found = weight_stability(probe, directions, length)
            for position, (correlation, flipped) in enumerate(zip(*found, strict=True)):
                record.add("weights_rank_correlation", f"{name}/{position}", size=length, measured=correlation)
                record.add("weights_flipped", f"{name}/{position}", size=length, measured=flipped)
            correlations = [one for one in found.rank_correlations if one is not None]
            flips = [one for one in found.flipped if one is not None]
            notes[name] = {
                "length": length,
                "rank_correlation_mean": _mean(correlations),
                "rank_correlation_min": min(correlations, default=None),
                "flipped_mean": _mean(flips),
                "flipped_max": max(flips, default=None),
            }
    return notes


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _growing_steps(
    record: _Record, inputs: _Inputs, probe: "Probe", vectors: Mapping[str, Any], needed: float
) -> dict[str, Any]:
    from prism_assets.trust.measures import STEP_MULTIPLES, growing_steps

    unit = inputs.weights.notes["first_order"]["step"]
    gradient = probe.gradient()  # not the PRISM direction, which may have been corrected for curvature
    notes: dict[str, Any] = {"probe_step": unit, "needed": needed}
    with record.timed("growing_steps"):
        for name, vector in vectors.items():
            notes[name] = growing_steps(probe, vector, gradient, [unit * multiple for multiple in STEP_MULTIPLES])
            for multiple, step in zip(STEP_MULTIPLES, notes[name], strict=True):
                record.add("growing_step", f"{multiple:g}", name, **step)
    return notes


def _single_steps(
    record: _Record,
    work: GradientPass,
    probe: "Probe",
    vectors: Mapping[str, Any],
    sample: "pa.Table",
    length: float,
    progress: stage.Progress,
) -> dict[str, Any]:
    import numpy as np

    from prism_assets.corpus.tokenization import from_table
    from prism_assets.rank_statistics import rank_correlation
    from prism_assets.trust.measures import single_candidate_steps

    with record.timed("single_steps"):
        effects = single_candidate_steps(
            probe, from_table(sample), work.preconditioner(work.checkpoints[-1]), vectors, length, progress.update
        )
    flips = [one.flipped for one in effects if one.flipped is not None]
    notes: dict[str, Any] = {
        "length": length,
        "largest_cosine": max(abs(one.cosines["prism"]) for one in effects),
        "flipped_mean": _mean(flips),
        "flipped_max": max(flips, default=None),
    }
    held_out = np.array([one.change.held_out for one in effects])
    for name in vectors:
        stored = sample[f"score_{name}"].to_numpy()
        exact = np.array([one.cosines[name] for one in effects])
        own = np.array([getattr(one.change, name) for one in effects])
        notes[name] = {
            "stored": _plain(rank_correlation(stored, own)),
            "exact": _plain(rank_correlation(exact, own)),
            "held_out": _plain(rank_correlation(stored, held_out)),
        }
        for row, example in enumerate(sample["id"].to_pylist()):
            record.add(
                "single_step", example, name, size=length,
                predicted=stored[row], exact=exact[row], measured=own[row], held_out=held_out[row],
            )  # fmt: skip
    return notes


def _datamodel(
    context: dg.AssetExecutionContext,
    record: _Record,
    settings: Settings,
    work: GradientPass,
    probe: "Probe",
    sample: "pa.Table",
) -> dict[str, Any]:
    import numpy as np

    from prism_assets.corpus.tokenization import from_table
    from prism_assets.rank_statistics import rank_correlation
    from prism_assets.training.sft import fine_tune
    from prism_assets.trust.measures import subset_outcomes
    from prism_assets.trust.sample import random_halves

    options = settings.trust
    masks = random_halves(options.datamodel_subsets, sample.num_rows, options.seed)

    def train(examples: Sequence[Any]) -> None:
        fine_tune(
            probe.engine.model,
            examples,
            seed=options.seed,
            epochs=_DATAMODEL_EPOCHS,
            **settings.training.model_dump(include=_TRAINING_SETTINGS),
            pad_token_id=pad_token_id(work.model),
        )

    with record.timed("datamodel"), stage.progress(context, "subsets", len(masks), "fine-tunings") as progress:
        changes: list[Outcome] = subset_outcomes(
            probe, from_table(sample), masks, train, lambda: work.at(work.checkpoints[-1]), progress.update
        )
    notes: dict[str, Any] = {"rows": sample.num_rows, "epochs": _DATAMODEL_EPOCHS}
    held_out = np.array([one.held_out for one in changes])
    for name in COMPARED:
        predicted = masks @ sample[f"score_{name}"].to_numpy()
        own = np.array([getattr(one, name) for one in changes])
        notes[name] = {
            "own": _plain(rank_correlation(predicted, own)),
            "held_out": _plain(rank_correlation(predicted, held_out)),
        }
        for row in range(len(masks)):
            record.add(
                "subset", str(row), name, predicted=predicted[row], measured=own[row], held_out=held_out[row]
            )  # fmt: skip
    return notes


def _plain(correlation: "Correlation") -> dict[str, Any]:
    return {**correlation._asdict(), "interval": None if correlation.interval is None else list(correlation.interval)}


# -- showing -----------------------------------------------------------------------------------------------------


def _trust_outcome(lake: Lake, artifact: Artifact, computed: int) -> stage.Outcome:
    from prism_assets.evaluation import plots

    notes = artifact.notes
    found = findings(notes)
    rows = lake.read_table(artifact).to_pylist()
    pictures = {
        "steps": plots.growing_steps(notes["growing_steps"]),
        "candidates": plots.predicted_and_measured(
            [row for row in rows if row["measure"] == "single_step" and row["strategy"] == "prism"],
            title="A step on one candidate alone",
            xlabel="stored influence score",
        ),
    }
    if notes["datamodel"] is not None:
        pictures["subsets"] = plots.predicted_and_measured(
            [row for row in rows if row["measure"] == "subset" and row["strategy"] == "prism"],
            title="Short fine-tunings on random subsets",
            xlabel="sum of the subset's scores",
        )
    return stage.Outcome(
        [artifact],
        computed,
        {
            "verdict": dg.MetadataValue.md("\n".join(f"- **{one.question}** {one.sentence}" for one in found)),
            **{name: dg.MetadataValue.md(plots.as_markdown_image(image, name)) for name, image in pictures.items()},
            "figures": dg.MetadataValue.json(
                {key: notes[key] for key in ("random_steps", "growing_steps", "single_steps", "datamodel")}
            ),
            "seconds": sum(one["wall"] for one in notes["seconds"].values()),
        },
        # What was not measured has not failed; the sentence says so.
        {
            one.check: (one.passed is not False, {"measured": one.passed is not None, "says": one.sentence})
            for one in found
        },
    )
