"""The soak benchmark: its events are spread as it says, its faults fall where they should, and losses are told."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.project import ModelSize
from benchmarks.soak import EVENTS_A_LIFE, KINDS, Fault, benchmark, differences, drawn_kinds

ROOT = Path(__file__).resolve().parents[2]
PUBLISH = """
import sys
from pathlib import Path
from benchmarks.soak import Fault, arm
from prism_assets.errors import LakeError
from prism_assets.resources.lake import Lake, Recipe, Rows
import pyarrow as pa

kind, publication, after, root = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", Path(sys.argv[4])
arm(Fault(kind, publication, after), root / "told")
lake = Lake(str(root / "lake"))
for number in range(4):
    try:
        lake.publish(Recipe("rejects", 1, {"number": number}), Rows(pa.table({"a": [number]})))
    except LakeError as error:
        sys.exit(str(error))
"""


def publish(folder, fault):
    """Four artefacts published by a process with a fault: its status, how many are there, how many drafts."""
    command = [sys.executable, "-c", PUBLISH, fault.kind, str(fault.publication), str(fault.after), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    there = list((folder / "lake" / "artifacts" / "rejects").glob("*"))
    drafts = list((folder / "lake" / "unpublished").glob("*"))
    return done, len(there), len(drafts)


@pytest.mark.parametrize(("after", "there", "drafts"), [(False, 2, 1), (True, 3, 1)])
def test_a_kill_falls_at_the_publication_that_was_drawn(tmp_path, after, there, drafts):
    done, found, left = publish(tmp_path, Fault("kill", 3, after))
    assert done.returncode == -signal.SIGKILL and (found, left) == (there, drafts)
    assert (tmp_path / "told").read_text() == "rejects"


def test_a_full_disk_is_full_from_the_publication_that_was_drawn(tmp_path):
    done, found, left = publish(tmp_path, Fault("full disk", 3))
    assert "is full" in done.stderr and "Traceback" not in done.stderr and (found, left) == (2, 0)


def test_events_are_as_frequent_as_their_weights_say():
    weights = sum(KINDS.values())
    kinds = drawn_kinds(10 * weights, random.Random(0))
    assert {kind: kinds.count(kind) for kind in KINDS} == {kind: 10 * weight for kind, weight in KINDS.items()}
    assert drawn_kinds(7, random.Random(1)) == drawn_kinds(7, random.Random(1))


def test_what_is_missing_other_or_too_much_is_a_difference_but_not_what_was_retired():
    expected = {("candidates", "shard1", ""): "a", ("selection", "prism|strings", ""): "b"}
    assert differences(expected, {**expected, ("candidates", "late7", ""): "c"}, ["shard1"]) == []
    assert len(differences(expected, {("candidates", "shard1", ""): "x"}, ["shard1"])) == 2
    assert len(differences(expected, {**expected, ("selection", "prism|others", ""): "b"}, ["shard1"])) == 1


def test_a_short_life_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(soak, "SETTINGS", {**soak.SETTINGS, "strategies": ["random"]})
    kinds = ["damage", "kill", "full disk"]  # the damage waits until there is something
    said: list[str] = []
    found = benchmark(tmp_path, kinds=kinds, seed=0, size=ModelSize(hidden=16, layers=1), log=said.append)
    assert found["passed"], found
    assert found["events"] == 3 and found["events_by_kind"] == dict.fromkeys(kinds, 1) and found["lives"] == 1
    assert found["runs_refused"] >= 1 and found["runs_that_failed"] == 0 and found["contents_compared"] > 20
    assert found["damaged_files"] == 1 and found["most_drafts_left_by_a_kill"] <= 1
    assert [line for line in said if line.startswith("1: ")] != ["1: damage"] and EVENTS_A_LIFE > 3
