"""Lines on what is being done, where output is redirected and no bar shows it."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from prism_assets.progress import under_way

EVERY_SECONDS = 30.0


class Heartbeat:
    """Says every 30 seconds which step is under way, for how long, and how far its innermost counted work is."""

    def __init__(self, say: Callable[[str], None], every_seconds: float = EVERY_SECONDS) -> None:
        self._say, self._every = say, every_seconds
        self._title, self._since = "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def step(self, title: str) -> None:
        """A step begins."""
        self._title, self._since = title, time.monotonic()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            counted = under_way()
            seconds = time.monotonic() - self._since
            self._say(f"… {self._title}: {seconds:,.0f} s so far" + (f"; {counted}" if counted else ""))
