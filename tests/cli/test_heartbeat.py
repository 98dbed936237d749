"""Where output is redirected, a line says every so often what is being done."""

import logging
import threading

from prism_assets.cli.heartbeat import Heartbeat
from prism_assets.progress import progress, under_way


def test_a_silent_step_is_named_with_the_innermost_counted_work():
    lines, enough = [], threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) >= 2:
            enough.set()

    log = logging.getLogger("test")
    with (
        Heartbeat(say, every_seconds=0.01) as heartbeat,
        progress(log, "subsets", 7),
        progress(log, "warm-up", 64, "steps") as inner,
    ):
        heartbeat.step("Warm-up checkpoints")
        lines.clear()
        inner.update(16, "(loss 1.250)")
        assert enough.wait(10)
    assert lines[-1].startswith("… Warm-up checkpoints: 0 s so far; warm-up: 16 of 64 steps, ")
    assert lines[-1].endswith("s left (loss 1.250)")
    count = len(lines)
    assert under_way() == "" and not any(thread.name == "heartbeat" for thread in threading.enumerate())
    assert len(lines) == count


def test_work_that_is_not_counted_is_named_all_the_same():
    said = threading.Event()
    lines = []
    with Heartbeat(lambda line: (lines.append(line), said.set()), every_seconds=0.01):
        assert said.wait(10)
    assert lines[0] == "… starting: 0 s so far"
