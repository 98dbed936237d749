"""What the doors of all stages share: results with versions and tables, progress, one run over many partitions."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets.settings import Settings
from resources.lake import Artifact, digest
from resources.language_model import LanguageModel

_LOG_EVERY_SECONDS = 15.0


@dataclass
class Outcome:
    """What one partition of one asset came to: the artefacts it shows now, metadata, and checks by name."""

    artifacts: Sequence[Artifact]
    computed: int  # how many artefacts were made in this run; the others were found
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, tuple[bool, Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def version(self) -> str:
        contents = [artifact.content_hash for artifact in self.artifacts]
        return contents[0] if len(contents) == 1 else digest(contents)


def each_partition(
    context: dg.AssetExecutionContext,
    work: Callable[[str | None], Outcome],
    severities: Mapping[str, dg.AssetCheckSeverity] | None = None,
) -> dg.MaterializeResult:
    """Do the work of every partition of this run (or of the asset, where it has none) and report on each.

    All partitions are worked on before a failure is raised, so a bad one does not keep the others back; what they
    published is found again by the next run. Raises dagster.Failure with every reason.
    """
    keys: Sequence[str | None] = list(context.partition_keys) if context.has_partition_key or context.has_partition_key_range else [None]
    outcomes: dict[str | None, Outcome] = {}
    failures: dict[str | None, Exception] = {}
    for key in keys:
        try:
            outcomes[key] = work(key)
        except Exception as error:
            if len(keys) == 1:
                raise
            context.log.error(f"{key}: {type(error).__name__}: {error}")
            failures[key] = error
    if failures:
        # A step that fails records nothing of its own: say what was finished, or it would count as missing too.
        for key, outcome in outcomes.items():
            context.log_event(
                dg.AssetMaterialization(
                    context.asset_key,
                    partition=key,
                    metadata={**outcome.metadata, **_standard(outcome)},
                    tags={"dagster/data_version": outcome.version},
                )
            )
        reasons = "\n".join(f"{key}: {type(error).__name__}: {error}" for key, error in failures.items())
        raise dg.Failure(
            f"{len(failures)} of {len(keys)} partitions failed; the others are finished and kept.\n{reasons}"
        ) from next(iter(failures.values()))
    for key, outcome in outcomes.items():
        if key is not None and len(keys) > 1:
            context.add_asset_metadata({**outcome.metadata, **_standard(outcome)}, partition_key=key)
    only = next(iter(outcomes.values())) if len(outcomes) == 1 else None
    version = only.version if only else digest({str(key): one.version for key, one in outcomes.items()})
    return dg.MaterializeResult(
        metadata={**only.metadata, **_standard(only)} if only else {},
        data_version=dg.DataVersion(version),
        check_results=list(_checks(outcomes, severities or {})),
    )


def _standard(outcome: Outcome) -> dict[str, Any]:
    fingerprints = [artifact.fingerprint for artifact in outcome.artifacts]
    return {
        "computed": outcome.computed,
        "reused": outcome.computed == 0,
        "fingerprint": fingerprints[0] if len(fingerprints) == 1 else ", ".join(fingerprints),
        "files": dg.MetadataValue.md("\n".join(f"- `{artifact.path}`" for artifact in outcome.artifacts)),
        **_column_schema(outcome.artifacts),
    }


def _column_schema(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """The columns of the first artefact that is a table, under the key that the UI knows."""
    import pyarrow.parquet as pq

    for artifact in artifacts:
        if artifact.path.suffix == ".parquet":
            columns = pq.read_schema(artifact.path)
            return {
                "dagster/column_schema": dg.TableSchema(
                    columns=[dg.TableColumn(column.name, str(column.type)) for column in columns]
                )
            }
    return {}


def _checks(
    outcomes: Mapping[str | None, Outcome], severities: Mapping[str, dg.AssetCheckSeverity]
) -> Iterator[dg.AssetCheckResult]:
    names = list(dict.fromkeys(name for outcome in outcomes.values() for name in outcome.checks))
    for name in names:
        results = {key: outcome.checks[name] for key, outcome in outcomes.items() if name in outcome.checks}
        metadata: dict[str, Any] = {}
        for key, (passed, facts) in results.items():
            if len(results) == 1:
                metadata |= dict(facts)
            elif not passed or len(results) <= 20:
                metadata[str(key)] = dg.MetadataValue.json({"passed": passed, **_jsonable(facts)})
        yield dg.AssetCheckResult(
            check_name=name,
            passed=all(passed for passed, _ in results.values()),
            severity=severities.get(name, dg.AssetCheckSeverity.WARN),
            metadata=metadata,
        )


def _jsonable(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | int | float | bool | list | dict | type(None)) else str(value)
        for name, value in facts.items()
    }


def preview(rows: Sequence[Mapping[str, Any]], limit: int = 8, width: int = 100) -> dg.MetadataValue:
    """The first rows as a Markdown table, long texts shortened."""
    if not rows:
        return dg.MetadataValue.md("no rows")
    names = list(rows[0])

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        text = " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
        return text if len(text) <= width else text[: width - 1] + "…"

    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(row.get(name, "")) for name in names) for row in rows[:limit]]
    return dg.MetadataValue.md("\n".join(f"| {line} |" for line in lines))


def page_head(settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """What the JSON of every page begins with: when, of which model and with which settings it was made."""
    return {
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": {"name": settings.model.name, "fingerprint": model.identify().fingerprint},
        "settings": settings.model_dump(mode="json"),
    }


def replace_texts(folder: Path, texts: Mapping[str, str]) -> Path:
    """Write files, each renamed into place whole; returns the folder, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        draft = folder / f".{name}.{os.getpid()}"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, folder / name)
    return folder


def column_lineage(**columns: tuple[str, str]) -> dict[str, Any]:
    """Metadata that says which column of which asset each column was copied from: name=(asset, column)."""
    return {
        "dagster/column_lineage": dg.TableColumnLineage(
            {
                name: [dg.TableColumnDep(asset_key=dg.AssetKey(asset), column_name=column)]
                for name, (asset, column) in columns.items()
            }
        )
    }


class Stopwatch:
    """What work costs from the moment that the stopwatch is made: for the notes of an artefact, never for its identity.

    What is done inside `uncounted` is not in it.
    """

    def __init__(self) -> None:
        _wait_for_gpu()
        self._processor, self._clock = _counted()

    def cost(self) -> dict[str, float | None]:
        """`cpu_seconds` of all threads of this process; `gpu_seconds` from idle GPU to idle GPU, None without one."""
        gpu = _wait_for_gpu()
        processor, clock = _counted()
        return {
            "cpu_seconds": processor - self._processor,
            "gpu_seconds": clock - self._clock if gpu else None,
        }


# CPU and wall seconds of this process that no stopwatch counts.
_uncounted = (0.0, 0.0)


@contextmanager
def uncounted() -> Iterator[None]:
    """Work that is nobody's cost (loading a model, for whoever comes first) or has a stopwatch of its own."""
    global _uncounted
    _wait_for_gpu()
    before = _counted()
    try:
        yield
    finally:
        _wait_for_gpu()
        after = _counted()
        _uncounted = _uncounted[0] + after[0] - before[0], _uncounted[1] + after[1] - before[1]


def _counted() -> tuple[float, float]:
    """CPU and wall seconds so far, without what is not counted."""
    return time.process_time() - _uncounted[0], time.perf_counter() - _uncounted[1]


def _wait_for_gpu() -> bool:
    """Whether this process uses a GPU; if so, it is idle now."""
    torch = sys.modules.get("torch")  # a process that has not imported it has no work on a GPU
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    torch.cuda.synchronize()
    return True


class Progress:
    """Rows done, rate and time left: a line that renews itself on a terminal, a sparse log line in Dagster."""

    def __init__(self, context: dg.AssetExecutionContext, what: str, total: int, unit: str = "rows") -> None:
        self.context, self.what, self.total, self.unit = context, what, total, unit
        self.done = 0
        self.started = self.logged = time.monotonic()
        self._bar = None

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units of the total are finished."""
        self.done = done
        now = time.monotonic()
        if self._bar is not None:
            self._bar(done)
        if now - self.logged >= _LOG_EVERY_SECONDS and done:
            self.logged = now
            rate = done / (now - self.started)
            left = (self.total - done) / rate
            self.context.log.info(
                f"{self.what}: {done:,} of {self.total:,} {self.unit}, {rate:,.1f}/s, {left:,.0f} s left {note}".rstrip()
            )

    def advance(self, more: int = 1, note: str = "") -> None:
        """Say that `more` units were finished."""
        self.update(self.done + more, note)


@contextmanager
def progress(
    context: dg.AssetExecutionContext, what: str, total: int, unit: str = "rows"
) -> Iterator[Progress]:
    """Progress over a long step. On a terminal a Rich bar is shown and removed when the step ends."""
    tracker = Progress(context, what, total, unit)
    if not sys.stderr.isatty():
        yield tracker
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        tracker._bar = lambda done: bars.update(task, completed=done)
        yield tracker
