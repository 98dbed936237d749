"""What the doors of all stages share."""

import time

import pytest

from prism_assets.stage import Stopwatch


def test_a_stopwatch_counts_work_and_not_waiting():
    stopwatch = Stopwatch()
    time.sleep(0.2)
    waited = stopwatch.cost()["cpu_seconds"]
    while stopwatch.cost()["cpu_seconds"] < waited + 0.1:
        sum(range(1000))
    assert waited < 0.1 and stopwatch.cost()["gpu_seconds"] is None


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
