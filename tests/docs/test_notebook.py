"""The notebook runs from the first cell to the last, and selects what it says."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook" / "from_two_files.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_committed_notebook_has_no_output(committed):
    assert len(committed.cells) > 15
    for cell in committed.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_notebook_selects_the_wanted_skill_and_draws_its_plots(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[2]), os.environ.get("PYTHONPATH", "")]))
    executed = nbclient.NotebookClient(committed.copy(), timeout=300, kernel_name="python3").execute()
    outputs = [one for cell in executed.cells for one in cell.get("outputs", [])]
    assert sum("image/png" in one.get("data", {}) for one in outputs) == 3
    counts = next(
        one["data"]["text/plain"] for one in outputs if "uniform" in one.get("data", {}).get("text/plain", "")
    )
    reverse = dict(
        zip(("prism", "uniform", "less", "random"), map(int, re.search(r"reverse +(.*)", counts)[1].split()))
    )
    assert reverse["prism"] > 30 > reverse["random"]  # of 40
    (folder,) = tmp_path.glob("two-files-*")
    assert (folder / "out" / "reverse" / "prism.jsonl").read_text().count("\n") == 40
