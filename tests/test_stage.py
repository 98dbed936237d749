"""What the doors of all stages share."""

import time

import pytest

from prism_assets.progress import Stopwatch, uncounted


def test_a_stopwatch_counts_work_and_not_waiting():
    stopwatch = Stopwatch()
    time.sleep(0.2)
    waited = stopwatch.cost()["cpu_seconds"]
    while stopwatch.cost()["cpu_seconds"] < waited + 0.1:
        sum(range(1000))
    assert waited < 0.1 and stopwatch.cost()["gpu_seconds"] is None


def test_what_is_uncounted_is_on_no_stopwatch_but_one_inside_it_counts():
    def burn(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    outer = Stopwatch()
    burn(0.05)
    with pytest.raises(ZeroDivisionError), uncounted():
        inner = Stopwatch()
        burn(0.2)
        within = inner.cost()["cpu_seconds"]
        _ = 1 / 0
    burn(0.05)
    assert within >= 0.2
    assert 0.1 <= outer.cost()["cpu_seconds"] < 0.2


@pytest.mark.parametrize("used", [True, False])
def test_a_gpu_is_waited_for_where_this_process_uses_one(monkeypatch, used):
    import torch

    waits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(time.sleep(0.05)))
    cost = Stopwatch().cost()
    assert len(waits) == (2 if used else 0)
    assert (cost["gpu_seconds"] is not None) == used and (not used or cost["gpu_seconds"] >= 0.05)
