"""Who else on the machine can read a lake."""

import os
import stat
from pathlib import Path

import pytest

from prism_assets.resources.file_hashes import FileHashes
from prism_assets.resources.private_folders import make_private, open_to_all
from prism_assets.resources.store import FolderStore


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o000, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", ["put", "put_new"])
def test_a_new_lake_is_its_owners_alone_and_the_folders_around_it_stay_usual(tmp_path, umask, write):
    root = tmp_path / "project" / "lake"
    getattr(FolderStore(root), write)("heads/a.json", lambda path: path.write_text("{}"))
    assert mode(root) == 0o700 and mode(root.parent) == 0o777 & ~umask


def test_a_lake_that_is_open_to_a_group_stays_so(tmp_path):
    root = tmp_path / "lake"
    root.mkdir()
    root.chmod(0o2770)
    FolderStore(root).put("a", lambda path: path.write_text(""))
    assert mode(root) == 0o2770 and not open_to_all(root)


def test_what_remembers_hashes_makes_no_open_lake(tmp_path, umask):
    (tmp_path / "file").write_text("a")
    os.utime(tmp_path / "file", (1, 1))
    hashes = FileHashes(tmp_path / "lake" / "cache" / "inbox.json")
    hashes.sha256(tmp_path / "file")
    hashes.save()
    assert mode(tmp_path / "lake") == 0o700


def test_home_and_lake_of_prism_ui_are_their_owners_alone(make_project, tmp_path, monkeypatch, umask):
    from prism_assets.ops.home import dagster_home

    project = make_project(tmp_path / "project")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = dagster_home(project.settings)
    assert mode(home) == mode(project.settings.storage.root) == 0o700
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "elsewhere"))
    assert mode(dagster_home(project.settings)) == 0o700


@pytest.mark.parametrize(("bits", "expected"), [(0o700, False), (0o770, False), (0o755, True), (0o701, True)])
def test_which_folders_are_open(tmp_path, bits, expected):
    folder = tmp_path / "folder"
    make_private(folder)
    folder.chmod(bits)
    assert open_to_all(folder) is expected
    assert not open_to_all(tmp_path / "none")


def test_doctor_names_an_open_lake_and_what_to_do(make_project, tmp_path, monkeypatch):
    from prism_assets.ops.doctor import _permissions

    project = make_project(tmp_path / "project")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    root = project.settings.storage.root
    assert _permissions(project.stage) == []  # there is none yet
    make_private(root)
    (root / "dagster").mkdir(mode=0o755)
    monkeypatch.setenv("DAGSTER_HOME", str(root / "dagster"))
    assert _permissions(project.stage) == []
    root.chmod(0o755)
    (lake, home) = _permissions(project.stage)
    assert (lake.state, lake.what) == ("note", "lake") and f"chmod o= {root}" in lake.found
    assert home.what == "DAGSTER_HOME"
