"""Measuring the trust in a target: rows of what was predicted and measured, and statistics of them.

Everything is measured at the last warm-up checkpoint.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from prism_assets.corpus.target_set import target_set
from prism_assets.corpus.token_tables import from_table
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.gradients.vectors import norm
from prism_assets.selection.direction_artifacts import COMPARED, load_direction
from prism_assets.selection.target_scores import as_made, tokens_counted, usable_targets
from prism_assets.stats.ranks import rank_correlation
from prism_assets.trust import measures
from prism_assets.trust.inputs import TRAINING_SETTINGS, TrustInputs
from prism_assets.trust.measures import Probe

if TYPE_CHECKING:
    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.stats.ranks import Correlation

# Passes over a subset: enough for order and curvature to have an effect, few enough to be short.
_DATAMODEL_EPOCHS = 2


class Record:
    """What was measured: rows for the table, and the seconds that each part took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, dict[str, float]] = {}

    def add(self, measure: str, item: str, strategy: str = "prism", **numbers: float | None) -> None:
        """One row; numbers by column name."""
        self.rows.append({"measure": measure, "strategy": strategy, "item": item, **numbers})

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Wall and CPU seconds of what is done inside, under the name of the part."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[part] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def table(self) -> pa.Table:
        """measure, strategy, item, and per row what was predicted and measured; null where a column has no meaning."""
        numbers = ("size", "predicted", "exact", "measured", "held_out")
        fields = [(name, pa.string()) for name in ("measure", "strategy", "item")]
        schema = pa.schema([*fields, *((name, pa.float64()) for name in numbers)])
        return pa.Table.from_pylist(self.rows, schema)


def measure(
    work: GradientPass, inputs: TrustInputs, tried: tuple[pa.Table, pa.Table]
) -> tuple[pa.Table, dict[str, Any]]:
    """All measurements of a target at the last warm-up checkpoint: the rows of `Record.table`, and the notes.

    `tried`: the candidates for single steps and those that subsets are drawn from (`tried_candidates`). The notes have
    the statistics that `verdict.findings` reads, and the seconds of each part.
    """
    settings, lake = work.stage.settings, work.stage.lake
    single, subsets = tried
    start = {name: value.detach().clone() for name, value in work.at(None).parameters.items()}
    engine = work.at(work.checkpoints[-1])
    probe = _probe(work, inputs, engine)
    # AdamW moves a coordinate by about its learning rate at most.
    training_step = settings.training.learning_rate * engine.num_parameters**0.5
    vectors, stepped = (
        {name: load_direction(lake, one).vectors[-1] for name, one in directions.items()}
        for directions in (inputs.directions, inputs.stepped)
    )
    record = Record()
    singles = _single_steps(record, work, probe, vectors, single, training_step)
    lengths = {"training_step": training_step, "warmup": _distance(engine, start)}
    notes = {
        **{key: inputs.weights.notes[key] for key in ("effective_number_of_targets", "weight_rank_agreement")},
        "checkpoints": len(work.checkpoints),
        "kind": probe.kind,
        "usable_targets": probe.targets.size,
        "held_out_rows": probe.held_out.size,
        "random_steps": _random_steps(record, work, probe, lengths),
        "growing_steps": _growing_steps(
            record, inputs, probe, {**vectors, **stepped}, training_step * singles["largest_cosine"]
        ),
        "single_steps": singles,
        "datamodel": None,
    }
    if settings.trust.datamodel_subsets:
        notes["datamodel"] = _datamodel(record, work, probe, subsets)
    return record.table(), {**notes, "seconds": record.seconds}


def _probe(work: GradientPass, inputs: TrustInputs, engine: "GradientEngine") -> Probe:
    """The usable targets, and at most `trust.held_out` held-out records, drawn at random."""
    lake, settings = work.stage.lake, work.stage.settings
    usable = usable_targets(lake.read_table(inputs.features, ["refused"]))
    held_out = lake.read_table(inputs.eval_examples)
    order = np.random.default_rng(settings.trust.seed).permutation(held_out.num_rows)
    drawn = np.sort(order[: settings.trust.held_out])
    notes = inputs.weights.notes
    rows = lake.read_table(inputs.targets).take(usable)
    targets = target_set(rows)
    return Probe(
        engine,
        targets,
        notes["kind"],
        notes["temperature"],
        target_set(held_out.take(drawn)),
        tokens_counted(as_made(settings, inputs.weights), rows, targets.pairs),
    )


def _distance(engine: "GradientEngine", start: Mapping[str, Any]) -> float:
    """How far the engine's parameters are from those that training started from."""
    return norm({name: value.detach() - start[name] for name, value in engine.parameters.items()})


def _random_steps(record: Record, work: GradientPass, probe: Probe, lengths: Mapping[str, float]) -> dict[str, Any]:
    options = work.stage.settings.trust
    notes: dict[str, Any] = {"number": options.random_steps}
    with record.timed("random_steps"):
        for name, length in lengths.items():
            directions = measures.random_directions(probe.engine.parameter_shapes, options.random_steps, options.seed)
            found = measures.weight_stability(probe, directions, length)
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
    record: Record, inputs: TrustInputs, probe: Probe, vectors: Mapping[str, Any], needed: float
) -> dict[str, Any]:
    unit = inputs.weights.notes["first_order"]["step"]
    # ∇J, not the PRISM direction, which may have been corrected for curvature
    slopes = measures.Slopes(probe.gradient(), probe.held_out_gradient())
    notes: dict[str, Any] = {"probe_step": unit, "needed": needed, "pairs": probe.held_out.pairs}
    sizes = [unit * multiple for multiple in measures.STEP_MULTIPLES]
    with record.timed("growing_steps"):
        for name, vector in vectors.items():
            notes[name] = measures.growing_steps(probe, vector, slopes, sizes)
            for multiple, step in zip(measures.STEP_MULTIPLES, notes[name], strict=True):
                numbers = {key: step[key] for key in ("size", "predicted", "measured", "held_out")}
                record.add("growing_step", f"{multiple:g}", name, **numbers)
                held_out = {key: step[f"held_out_{key}"] for key in ("predicted", "measured")}
                record.add("growing_step_held_out", f"{multiple:g}", name, size=step["size"], **held_out)
    return notes


def _single_steps(
    record: Record,
    work: GradientPass,
    probe: Probe,
    vectors: Mapping[str, Any],
    sample: pa.Table,
    length: float,
) -> dict[str, Any]:
    preconditioner = work.preconditioner(work.checkpoints[-1])
    with record.timed("single_steps"), work.stage.progress("single candidates", sample.num_rows) as progress:
        effects = measures.single_candidate_steps(
            probe, from_table(sample), preconditioner, vectors, length, progress.update
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
            numbers = {"predicted": stored[row], "exact": exact[row], "measured": own[row], "held_out": held_out[row]}
            record.add("single_step", example, name, size=length, **numbers)
    return notes


def _datamodel(record: Record, work: GradientPass, probe: Probe, sample: pa.Table) -> dict[str, Any]:
    from prism_assets.sft.trainer import Training, fine_tune
    from prism_assets.trust.sample import random_halves

    stage = work.stage
    options = stage.settings.trust
    masks = random_halves(options.datamodel_subsets, sample.num_rows, options.seed)

    def train(examples: Sequence[Any]) -> None:
        fine_tune(
            probe.engine,
            examples,
            Training(epochs=_DATAMODEL_EPOCHS, **stage.settings.training.model_dump(include=TRAINING_SETTINGS)),
            seed=options.seed,
        )

    with record.timed("datamodel"), stage.progress("subsets", len(masks), "fine-tunings") as progress:
        changes = measures.subset_outcomes(
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
            numbers = {"predicted": predicted[row], "measured": own[row], "held_out": held_out[row]}
            record.add("subset", str(row), name, **numbers)
    return notes


def _plain(correlation: "Correlation") -> dict[str, Any]:
    return {**correlation._asdict(), "interval": None if correlation.interval is None else list(correlation.interval)}
