"""What all stages share: the stopwatch, and the Stage with what is derived from its settings."""

import time
from functools import cached_property

import pytest

from prism_assets.progress import Stopwatch, uncounted
from prism_assets.stage import DERIVED_FROM, Stage


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


# -- the stage ----------------------------------------------------------------------------------------------------


class Noting:
    """Settings that note which of their sections were read."""

    def __init__(self, settings):
        self.settings, self.sections = settings, set()

    def __getattr__(self, name):
        self.sections.add(name)
        return getattr(self.settings, name)


@pytest.fixture(scope="module")
def stage(two_versions):
    return two_versions.stage


def test_what_is_kept_of_a_stage_is_derived_from_the_sections_that_are_named(stage):
    kept = [name for name, value in vars(Stage).items() if isinstance(value, cached_property)]
    assert set(DERIVED_FROM) == set(kept)
    for name in kept:
        noting = Noting(stage.settings)
        getattr(Stage(noting, stage.lake, stage.model, stage.index), name)
        assert noting.sections == DERIVED_FROM[name], name


def test_other_settings_leave_what_does_not_depend_on_them(stage, monkeypatch):
    before = {name: getattr(stage, name) for name in DERIVED_FROM}
    drawn = stage.with_settings(selection=stage.settings.selection.model_copy(update={"seed": 7}))
    identified = []
    monkeypatch.setattr(type(stage.model), "identify", lambda self: identified.append(self))
    assert {name: getattr(drawn, name) for name in DERIVED_FROM} == before and not identified
    assert drawn.settings.selection.seed == 7 and stage.settings.selection.seed != 7
    other = stage.with_settings(features=stage.settings.features.model_copy(update={"seed": 7}))
    assert other.corpus_version == stage.corpus_version and other.warmup_scope == stage.warmup_scope
    assert other.feature_version != stage.feature_version and not identified
