"""Progress of long work, on a terminal or in the log, and its cost in CPU and GPU seconds."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prism_assets.text import visible

_LOG_EVERY_SECONDS = 15.0


class Stopwatch:
    """The CPU and GPU seconds of work since the stopwatch was made: for the notes of an artefact, never for its
    identity.

    What is done inside `uncounted` is not in it.
    """

    def __init__(self) -> None:
        wait_for_gpu()
        self._processor, self._clock = _counted()

    def cost(self) -> dict[str, float | None]:
        """`cpu_seconds` of all threads of this process; `gpu_seconds` from idle GPU to idle GPU, None without one."""
        gpu = wait_for_gpu()
        processor, clock = _counted()
        return {
            "cpu_seconds": processor - self._processor,
            "gpu_seconds": clock - self._clock if gpu else None,
        }


# CPU and wall seconds of this process that no stopwatch counts.
_uncounted = (0.0, 0.0)


@contextmanager
def uncounted() -> Iterator[None]:
    """Work that no stopwatch counts: loading a model, which would fall on its first user, or what has a stopwatch of
    its own."""
    global _uncounted
    wait_for_gpu()
    before = _counted()
    try:
        yield
    finally:
        wait_for_gpu()
        after = _counted()
        _uncounted = _uncounted[0] + after[0] - before[0], _uncounted[1] + after[1] - before[1]


def _counted() -> tuple[float, float]:
    """CPU and wall seconds so far, without what is not counted."""
    return time.process_time() - _uncounted[0], time.perf_counter() - _uncounted[1]


def wait_for_gpu() -> bool:
    """Whether this process uses a GPU; if so, it is idle now."""
    torch = sys.modules.get("torch")  # a process that has not imported it has no work on a GPU
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    torch.cuda.synchronize()
    return True


class Progress:
    """Rows done, rate and time left: a bar on a terminal, and a line in the log every 15 seconds.

    total: None where nobody knows it yet.
    """

    def __init__(self, log: logging.Logger, what: str, total: int | None, unit: str = "rows") -> None:
        self.log, self.what, self.total, self.unit = log, visible(what), total, unit
        self.done, self.note = 0, ""
        self.started = self.logged = time.monotonic()
        self._bar: Callable[[int], None] | None = None

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units of the total are finished."""
        self.done, self.note = done, note
        now = time.monotonic()
        if self._bar is not None:
            self._bar(done)
        if now - self.logged >= _LOG_EVERY_SECONDS and done:
            self.logged = now
            self.log.info(str(self))

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        text = f"{self.what}: {self.done:,}{of} {self.unit}"
        if self.done:
            rate = self.done / (time.monotonic() - self.started)
            left = "" if self.total is None else f", {(self.total - self.done) / rate:,.0f} s left"
            text += f", {rate:,.1f}/s{left} {self.note}"
        return text.rstrip()

    def advance(self, more: int = 1) -> None:
        """Say that `more` units were finished."""
        self.update(self.done + more)


# What is counted in this process now, the innermost last.
_under_way: list[Progress] = []


def under_way() -> str:
    """How far the innermost work is that is counted now; empty where none is. Can be asked from any thread."""
    return str(_under_way[-1]) if _under_way else ""


@contextmanager
def progress(log: logging.Logger, what: str, total: int | None, unit: str = "rows") -> Iterator[Progress]:
    """Progress over a long step. On a terminal a Rich bar is shown and removed when the step ends."""
    tracker = Progress(log, what, total, unit)
    _under_way.append(tracker)
    try:
        yield from _shown(tracker, total)
    finally:
        _under_way.remove(tracker)


def _shown(tracker: Progress, total: int | None) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield tracker
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(tracker.what, total=total)
        tracker._bar = lambda done: bars.update(task, completed=done)
        yield tracker
