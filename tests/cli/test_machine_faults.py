"""Faults of the machine end in advice, not in a traceback, and what was finished stays."""

import errno
import json
import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from alembic.util.exc import CommandError
from sqlalchemy.exc import DatabaseError, OperationalError
from typer.testing import CliRunner

from prism_assets.cli import app
from prism_assets.cli.machine_faults import advice
from prism_assets.ops.home import dagster_home
from prism_assets.resources import store
from prism_assets.resources.file_hashes import FileHashes
from prism_assets.resources.lake import Lake

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.fixture(scope="module")
def once(make_project, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("faults") / "project", strategies=["random"], seeds=[0])
    project.run()
    return project


@pytest.fixture
def finished(once, tmp_path):
    """A finished project that may be harmed, with a Dagster home of its own."""
    return once.copy(tmp_path / "project")


def prism(project, *arguments: str):
    result = CliRunner().invoke(app, [*arguments, "--config", str(project.config)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def met_by_dagster(error):
    """The error as it comes out of code that lies in a folder named dagster."""
    code: dict = {}
    exec(compile("def fail(error):\n    raise error", "/lib/dagster/storage.py", "exec"), code)
    try:
        code["fail"](error)
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk of /x/y is full"),
        (errno.EDQUOT, "disk of /x/y is full"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "input/output error"),
    ],
)
def test_what_the_disk_refuses_is_named_with_what_to_do(number, words):
    error = OSError(number, os.strerror(number), "/x/y")
    wrapped = RuntimeError("in some library")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        assert words in (advice(one) or "") and "run again" in (advice(one) or "")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("database or disk is full", "free some space"),
        ("attempt to write a readonly database", "set DAGSTER_HOME"),
        ("unable to open database file", "set DAGSTER_HOME"),
        ("file is not a database", "history"),
        ("database disk image is malformed", "move"),
        ("database is locked", "Another process"),
    ],
)
def test_what_dagsters_database_refuses_is_named_with_what_to_do(said, words, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", "/some/home")
    kind = DatabaseError if "not a" in said else OperationalError
    found = advice(met_by_dagster(kind("PRAGMA x", {}, sqlite3.DatabaseError(said)))) or ""
    assert words in found and said in found and "/some/home" in found and "PRAGMA" not in found


@pytest.mark.parametrize(("free", "words"), [(1000, "The disk is full"), (2**30, "run again")])
def test_an_input_output_error_of_the_database_on_a_full_disk_is_a_full_disk(free, words, monkeypatch, tmp_path):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    found = advice(met_by_dagster(OperationalError("x", {}, sqlite3.OperationalError("disk I/O error")))) or ""
    assert words in found and ("full" in found) == (free == 1000)


def test_a_fault_of_the_program_is_left_as_it_is():
    assert advice(TypeError("x")) is None
    assert advice(OSError(errno.ENOTDIR, "x")) is None
    for suppressed in (True, False):  # what was being handled is not the cause
        try:
            try:
                raise PermissionError(errno.EACCES, "denied", "/some/cache/x")
            except PermissionError:
                if suppressed:
                    raise ValueError("a bug") from None
                raise ValueError("a bug")  # noqa: B904
        except ValueError as error:
            assert advice(error) is None


def test_a_database_that_is_not_dagsters_is_left_as_it_is():
    try:
        sqlite3.connect(":memory:").execute("SELECT nothing FROM nowhere")
    except sqlite3.Error as error:
        assert advice(error) is None


def opens(config, ready, found):
    """In a process of its own: open the Dagster instance of a project at the same moment as others do."""
    from prism_assets.ops.home import instance_of
    from prism_assets.settings import load_settings

    settings = load_settings(config)
    ready.wait(60)
    with instance_of(settings) as instance:
        found.put(len(instance.get_runs()))


def test_a_new_instance_of_dagster_that_many_open_at_once_is_made_once(once, tmp_path, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dagster", "prism_assets.ops.home"])
    for number in range(3):
        project = once.copy(tmp_path / f"project{number}")
        ready, found = context.Barrier(3), context.Queue()
        others = [context.Process(target=opens, args=(project.config, ready, found)) for _ in range(3)]
        for one in others:
            one.start()
        for one in others:
            one.join(100)
        assert [one.exitcode for one in others] == [0, 0, 0]
        database = next(dagster_home(project.settings).rglob("runs.db"))
        with sqlite3.connect(database) as connection:
            assert len(connection.execute("SELECT * FROM alembic_version").fetchall()) == 1


def test_two_versions_of_dagsters_database_end_in_advice():
    found = advice(met_by_dagster(CommandError("Version table 'alembic_version' has more than one head present"))) or ""
    assert "move" in found and "history" in found


def test_a_damaged_history_of_dagster_ends_in_advice_and_loses_nothing(finished, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = dagster_home(finished.settings)
    assert prism(finished, "run").exit_code == 0
    before = {one.fingerprint for one in finished.lake.artifacts()}
    databases = list(home.rglob("*.db"))
    assert databases
    for one in databases:
        one.write_text("garbage" * 1000)
    result = prism(finished, "run")
    assert result.exit_code == 1 and "is not a database" in result.output and "Traceback" not in result.output
    for folder in ("history", "schedules"):
        shutil.move(home / folder, home / f"{folder}.away")
    assert prism(finished, "run").exit_code == 0
    assert {one.fingerprint for one in finished.lake.artifacts()} == before


@pytest.mark.parametrize("content", [b"[1]", b"\xff\xfe", b"", b'{"table": 3}'])
def test_a_damaged_head_or_cache_costs_a_look_and_nothing_else(finished, content):
    root = Path(finished.settings.storage.root)
    before = {(head["table"], head["partition"]): head["fingerprint"] for head in finished.lake.heads()}
    shaken = [*root.glob("heads/candidates/*/*"), *root.glob("heads/selection/*/*"), *root.glob("cache/*.json")]
    assert len(shaken) > 3
    for path in shaken:
        path.write_bytes(content)
    assert prism(finished, "doctor").exit_code in (0, 2)
    assert prism(finished, "sql", "SELECT count(*) FROM candidates").exit_code == 0
    made = finished.run()
    assert set(made.values()) == {0}
    assert {(head["table"], head["partition"]): head["fingerprint"] for head in finished.lake.heads()} == before


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"", b"[" * 100_000])
def test_a_config_of_a_model_that_is_none_is_named(finished, content):
    (finished.folder / "model" / "config.json").write_bytes(content)
    for command in ("run", "doctor"):
        result = prism(finished, command)
        assert result.exit_code == 2 and "config.json" in " ".join(result.output.split())


def test_settings_that_are_nested_without_end_are_refused(tmp_path):
    for text in ("a: " + "[" * 3000 + "]" * 3000, "\n".join(" " * level + "a:" for level in range(3000))):
        (tmp_path / "prism.yaml").write_text(text)
        result = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "prism.yaml")])
        assert result.exit_code == 2 and "nested too deeply" in result.output


def test_a_target_named_like_a_range_of_partitions_is_refused(finished):
    content = yaml.safe_load(finished.config.read_text())
    content["targets"] = {"a...b": content["targets"]["plain"]}
    finished.config.write_text(yaml.safe_dump(content))
    result = prism(finished, "doctor")
    assert result.exit_code == 2 and "three dots" in " ".join(result.output.split())


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be written below a lake any more."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(store.FolderStore, "workshop", lambda self: refuse(self.root))
    real = Path.write_text

    def write_text(path, *arguments, **options):
        return refuse(path) if "cache" in path.parts else real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)


def test_a_lake_that_can_only_be_read_is_read(finished, read_only):
    result = prism(finished, "sql", "SELECT count(*) AS n FROM candidates", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == [{"n": 40}]
    assert "up to date" in prism(finished, "doctor").output
    finished.lake.remember("x", b"data")
    assert finished.lake.recall("x") is None
    hashes = FileHashes(finished.lake.cache_file("y.json"))
    os.utime(finished.config, (1, 1))
    assert len(hashes.sha256(finished.config)) == 64
    hashes.save()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EACCES, errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_is_published_to(tmp_path, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    lake = Lake(str(tmp_path / "lake"))
    lake.store.put_new("artifacts/t/x.txt", lambda path: path.write_text("first"))
    lake.store.put_new("artifacts/t/x.txt", lambda path: path.write_text("second"))
    assert (tmp_path / "lake/artifacts/t/x.txt").exists()
    assert not list((tmp_path / "lake/unpublished").iterdir())
