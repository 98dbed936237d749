"""An estimate before the work: rows and tokens, the time of each stage still to be done, memory, disk, and records that
are lost to `max_length`.

Times come from a second of each kind of pass on real rows (`rates`) and from what the lake does not have yet
(`remaining`). What no model works on (reading files but for tokenising, the index, rankings, pages) is not in them.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prism_assets.ops.figures import Pool, TargetFile, Targets, pool_figures, target_figures
from prism_assets.ops.rates import Measured, Rate, Rates, measure
from prism_assets.ops.remaining import Remaining, Work
from prism_assets.resources.lake import Lake
from prism_assets.stage import Stage

_NAME_BYTES = 50  # of a row's id, and its share of the columns' ends
_REPORT_BYTES = 1_400_000  # of a target's: half of it the scripts within; 1.36 to 1.39 MB on the demo


class StageTime(NamedTuple):
    """The model's work for a stage."""

    stage: str
    rows: float
    tokens: float  # through the model, each time that they go
    new_tokens: float  # generated, at most
    seconds: float
    cpu_seconds: float


class Disk(NamedTuple):
    """Bytes that the work will write, by what they are, and bytes that are free."""

    parts: Mapping[str, float]
    free: int

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a run will cost. Without anything to do there are no stages and nothing was measured."""

    pool: Pool
    targets: Mapping[str, Targets]
    max_length: int
    context: int | None
    stages: Sequence[StageTime]
    measured: Measured | None
    disk: Disk
    benchmarks: bool  # whether there are some, whose time is not in it

    @property
    def seconds(self) -> float:
        """Of the clock, on a machine as busy as now."""
        return sum(one.seconds for one in self.stages)

    @property
    def cpu_seconds(self) -> float:
        """Of all threads."""
        return sum(one.cpu_seconds for one in self.stages)

    @property
    def files(self) -> list[TargetFile]:
        """The files of all targets."""
        return [one for target in self.targets.values() for one in target]

    @property
    def problems(self) -> list[str]:
        """What the work will stop at."""
        found = [one.problem for one in self.files if one.problem]
        memory = self.measured.memory if self.measured else None
        if memory is not None and memory.smallest > memory.allowed:
            found.append(
                f"memory: the longest example alone takes {size_text(memory.smallest)}, and the process may hold "
                f"{size_text(memory.allowed)}: raise execution.memory, lower tokenization.max_length, or load the "
                "model in bfloat16 (model.dtype) or quantised (model.quantization)"
            )
        if self.disk.total > self.disk.free:
            found.append(
                f"disk: {size_text(self.disk.total)} will be written and {size_text(self.disk.free)} are free: lower "
                "features.sketch_dim or warmup.checkpoints, or free space (`prism gc`)"
            )
        return found

    def lost(self, file: TargetFile) -> str:
        """How many records of a target's file are not used, and what would keep them; empty where all are."""
        return file.fit.lost(self.max_length, self.context) if file.fit is not None else ""

    def pool_text(self) -> str:
        """Rows and tokens in words."""
        about = "about " if self.pool.extrapolated else ""
        return (
            f"{about}{self.pool.rows:,.0f} rows, {self.pool.tokens:,.0f} tokens "
            f"({self.pool.completion_tokens:,.0f} of completions)"
        )

    def time_text(self, most: int = 3) -> str:
        """The time in words, with the stages that take most of it."""
        if not self.stages:
            return "the time is not known"
        longest = sorted(self.stages, key=lambda one: -one.seconds)[:most]
        parts = ", ".join(f"{one.stage} {time_text(one.seconds)}" for one in longest)
        return f"about {time_text(self.seconds)} of model time ({parts})"

    def line(self) -> str:
        """All on one line."""
        if self.measured is None:
            return f"{self.pool_text()}; everything is up to date"
        memory = f", {size_text(self.measured.memory.expected)} of memory" if self.measured else ""
        return f"{self.pool_text()}; {self.time_text()}{memory}, {size_text(self.disk.total)} of disk"

    def data(self) -> dict[str, Any]:
        """As JSON."""
        pool, measured = self.pool, self.measured
        memory = None
        if measured is not None:
            memory = {
                **{"device": measured.memory.device, "model_bytes": measured.memory.model},
                **{"expected_bytes": measured.memory.expected, "smallest_bytes": measured.memory.smallest},
                "allowed_bytes": measured.memory.allowed,
            }
        return {
            "pool": {
                **{"rows": round(pool.rows), "tokens": round(pool.tokens)},
                "completion_tokens": round(pool.completion_tokens),
                **{"files": pool.files, "files_not_ingested": len(pool.pending)},
                **{"extrapolated": pool.extrapolated, "sampled_records": pool.sampled},
                **{"rejected": round(pool.rejected), "truncated": round(pool.truncated)},
                "max_length": self.max_length,
            },
            "targets": [
                {
                    **{"target": one.name, "file": "examples" if one.kind == "target" else "eval"},
                    "path": str(one.path),
                    "given": one.fit.given if one.fit else None,
                    "used": one.fit.used if one.fit else None,
                    "max_length_for_all": one.fit.keeps_all if one.fit else None,
                    "max_length_for_90_percent": one.fit.keeps_most if one.fit else None,
                    "problem": one.problem or None,
                }
                for one in self.files
            ],
            "stages": [one._asdict() for one in self.stages],
            **{"seconds": self.seconds, "cpu_seconds": self.cpu_seconds},
            "rates": _rates_data(measured.rates) if measured and measured.rates else None,
            "memory": memory,
            "disk": {"bytes": self.disk.total, "free_bytes": self.disk.free, "parts": dict(self.disk.parts)},
            "benchmarks_left_out": self.benchmarks,
            "problems": self.problems,
        }


def estimate(
    stage: Stage,
    names: Sequence[str] | None = None,
    *,
    targets: Mapping[str, Targets] | None = None,
    seconds: float = 1.0,
    before_model: Callable[[], None] = lambda: None,
) -> Estimate:
    """Estimate a run for these targets (by default all), measuring about so many seconds of each kind of pass.

    `targets`: their figures, where they are known. `before_model` is called before the model is loaded, which it is
    only where something is to be done. Raises SettingsError where the inbox has nothing to be used, and what
    the model and the gradient engine raise.
    """
    targets = target_figures(stage, names or list(stage.settings.targets)) if targets is None else targets
    pool = pool_figures(stage)
    works = list(Remaining(stage, pool, targets))
    measured = None
    if works:
        before_model()
        measured = _measured(stage, pool, targets, seconds)
    return Estimate(
        pool,
        targets,
        stage.settings.tokenization.max_length,
        stage.model_identity.context_length,
        [_time(work, measured.rates, pool) for work in works] if measured and measured.rates else [],
        measured,
        _disk(stage, works, pool, measured),
        bool(stage.settings.evaluation.benchmarks),
    )


def _rates_data(rates: Rates) -> dict[str, dict[str, float]]:
    return {name: rate._asdict() for name, rate in rates._asdict().items()}


def _measured(stage: Stage, pool: Pool, targets: Mapping[str, Targets], seconds: float) -> Measured:
    files = [file for target in targets.values() for file in target]
    longest = max((one for file in files for one in file.examples), key=lambda one: len(one.input_ids), default=None)
    examples = [*pool.sample, *([longest] if longest is not None else [])]
    prompts = [prompt for file in files for prompt in file.prompts]
    return measure(stage, examples, prompts, rows=round(pool.largest_shard), seconds=seconds)


def _time(work: Work, rates: Rates, pool: Pool) -> StageTime:
    parts = (
        *((work.gradient, rates.gradient), (work.training, rates.training), (work.forward, rates.forward)),
        *((work.generated, rates.generation), (work.steps, rates.step), (work.tokenised, Rate(*pool.tokenising))),
    )
    return StageTime(
        work.stage,
        work.rows,
        work.gradient + work.training + work.forward,
        work.generated,
        sum(count * rate.seconds for count, rate in parts),
        sum(count * rate.cpu_seconds for count, rate in parts),
    )


# -- disk ---------------------------------------------------------------------------------------------------------


def _disk(stage: Stage, works: Sequence[Work], pool: Pool, measured: Measured | None) -> Disk:
    features, checkpoints = stage.settings.features, stage.settings.warmup.checkpoints
    parameters = measured.parameters if measured else 0
    width = parameters if features.sketch_dim == "exact" else features.sketch_dim
    vector = 2 * checkpoints * width
    hidden = stage.model.base().config.get_text_config().hidden_size if any(work.states for work in works) else 0

    def total(name: str) -> float:
        return sum(getattr(work, name) for work in works)

    parts = {
        "text_and_tokens": total("texts") * pool.bytes_a_row + total("lines") * pool.text_bytes,
        "feature_blocks": total("blocks") * (vector + 24 * checkpoints + _NAME_BYTES),
        "index_segments": total("segments") * vector,
        "parameters": 4 * parameters * total("parameters"),
        "reports": _REPORT_BYTES * total("reports"),
        "hidden_states": (2 * hidden + _NAME_BYTES) * total("states"),
    }
    return Disk({name: size for name, size in parts.items() if size}, free_space(stage.lake))


def free_space(lake: Lake) -> int:
    """Free bytes of the disk that the lake is on, or will be on."""
    folder = lake.folder.absolute()
    return shutil.disk_usage(next(one for one in (folder, *folder.parents) if Path(one).is_dir())).free


# -- words --------------------------------------------------------------------------------------------------------


def size_text(size: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def time_text(seconds: float) -> str:
    """Seconds, minutes, hours or days, in two digits or so."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}" if seconds < 10 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:,.1f} s"
