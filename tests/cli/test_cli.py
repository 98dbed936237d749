"""`prism` from the outside: exit statuses, what is printed, and how little `prism --help` imports."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from conftest import write_lines

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, MUST_CHANGE = 0, 1, 2


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The commands put PRISM_CONFIG and DAGSTER_HOME into the environment; no other test shall see them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PRISM_CONFIG", "DAGSTER_HOME"):
            patch.setenv(name, "")
            patch.delenv(name)
        before = dict(os.environ)
        yield
        for name in set(os.environ) - set(before):
            del os.environ[name]


@pytest.fixture(scope="module", autouse=True)
def blank_plots():
    """Drawing is half of the time of a run."""
    from prism_assets.plots import canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        yield


@pytest.fixture(autouse=True)
def no_leftovers():
    for name in ("PRISM_CONFIG", "DAGSTER_HOME", "PRISM_TRAINING__REPORT_TO"):
        os.environ.pop(name, None)


def prism(*arguments):
    from prism_assets.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory):
    """A project finished by `prism run`, and what that printed."""
    project = make_project(tmp_path_factory.mktemp("cli") / "project", strategies=["prism", "random"], seeds=[0])
    return project, prism("run", "--config", project.config, "--report-to", "tensorboard")


# -- light -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["estimate", "--help"], ["run", "--help"], ["query", "--help"], ["trust", "--help"]]
)
def test_help_is_light(arguments):
    script = (
        "import sys\n"
        "from prism_assets.cli import main\n"
        f"sys.argv = ['prism', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code, leave.code\n"
        "heavy = {'dagster', 'torch', 'duckdb', 'pyarrow', 'transformers', 'peft', 'faiss', 'numpy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "LOADED []"
    assert "Usage" in done.stdout


def test_every_promised_command_is_there():
    output = prism("--help").output
    for command in ("init", "estimate", "demo", "run", "experiment", "query", "trust", "ui", "doctor", "export"):
        assert f" {command} " in output


# -- init --------------------------------------------------------------------------------------------------------


def test_init_writes_a_file_that_loads(tmp_path):
    from prism_assets.settings import load_settings

    path = tmp_path / "new" / "prism.yaml"
    assert prism("init", path).exit_code == DONE
    assert load_settings(path).candidates.inbox == tmp_path / "new" / "data" / "candidates"
    assert path.read_text(encoding="utf-8").count("#") > 5


def test_init_overwrites_only_when_told_to(tmp_path):
    path = tmp_path / "prism.yaml"
    path.write_text("mine")
    result = prism("init", path)
    assert result.exit_code == MUST_CHANGE and "--force" in result.output and path.read_text() == "mine"
    assert prism("init", "--force", tmp_path).exit_code == DONE
    assert path.read_text() != "mine"


# -- what the user must change -----------------------------------------------------------------------------------


COMMANDS = [["run"], ["experiment"], ["query", "plain"], ["trust", "plain"], ["doctor"], ["ui"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_bad_settings_are_the_users_to_change(command, tmp_path):
    config = tmp_path / "prism.yaml"
    result = prism(*command, "--config", config)
    assert result.exit_code == MUST_CHANGE and "There is no" in result.output and "prism init" in result.output
    config.write_text("targets: {a: {examples: x, eval: y}}\nlora: {rnak: 3}\n")
    result = prism(*command, "--config", config)
    assert result.exit_code == MUST_CHANGE
    assert "lora.rnak: unknown key; did you mean `rank`?" in result.output and "Traceback" not in result.output


def test_the_config_may_come_from_the_environment(tmp_path, monkeypatch):
    config = tmp_path / "elsewhere.yaml"
    config.write_text("targets: 3\n")
    monkeypatch.setenv("PRISM_CONFIG", str(config))
    result = prism("run")
    assert result.exit_code == MUST_CHANGE and "elsewhere.yaml needs a change" in result.output


def test_a_missing_model_is_the_users_to_change(make_project, tmp_path):
    project = make_project(tmp_path / "project").configure(model={"name": "./no-model"})
    result = prism("doctor", "--json", "--config", project.config)
    assert result.exit_code == MUST_CHANGE
    problems = {one["what"]: one["found"] for one in json.loads(result.stdout) if one["state"] == "problem"}
    assert "no folder" in problems["model"]


@pytest.mark.parametrize("key", ["storage.root", "storage.report", "candidates.inbox"])
@pytest.mark.parametrize("command", [["run"], ["doctor"], ["sql", "SELECT 1"]], ids=lambda command: command[0])
def test_a_file_in_the_place_of_a_folder_is_the_users_to_change(make_project, tmp_path, key, command):
    project = make_project(tmp_path / "project")
    (project.folder / "taken").write_text("a file")
    section, name = key.split(".")
    for there in ("./taken", "./taken/below"):
        project.configure(**{section: {name: there}})
        result = prism(*command, "--config", project.config)
        assert result.exit_code == MUST_CHANGE and f"{key}: " in result.output
        assert f"{project.folder / 'taken'} is a file" in result.output and "Traceback" not in result.output


REFUSED_EARLY = {
    "max_length": ({"tokenization": {"max_length": 4096}}, "max_length", "context has 64 tokens"),
    "device": ({"model": {"device": "cuda"}}, "device", "torch finds no GPU"),
}


@pytest.mark.parametrize("mistake", REFUSED_EARLY)
def test_what_no_step_could_work_with_is_refused_before_the_first(make_project, tmp_path, monkeypatch, mistake):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sections, what, words = REFUSED_EARLY[mistake]
    project = make_project(tmp_path / "project").configure(**sections)
    found = prism("doctor", "--json", "--config", project.config)
    assert found.exit_code == MUST_CHANGE
    problems = {one["what"]: one["found"] for one in json.loads(found.stdout) if one["state"] == "problem"}
    assert words in problems[what]
    result = prism("run", "--config", project.config)
    assert result.exit_code == MUST_CHANGE and words in result.output and "Traceback" not in result.output
    assert not (project.settings.storage.root / "artifacts").exists()  # nothing was begun


def test_two_projects_on_one_dagster_home_are_refused(make_project, tmp_path, monkeypatch):
    """Either would retire the shards of the other."""
    home = tmp_path / "home"
    first, second = (make_project(tmp_path / name) for name in ("first", "second"))
    from prism_assets.errors import UserMistake
    from prism_assets.ops.home import claim_home, dagster_home

    monkeypatch.setenv("DAGSTER_HOME", str(home))
    assert dagster_home(first.settings) == dagster_home(first.settings) == home
    for command in (["run"], ["ui"], ["gc"]):
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        result = prism(*command, "--config", second.config)
        assert result.exit_code == MUST_CHANGE, result.output
        assert str(first.settings.storage.root) in result.output and "another DAGSTER_HOME" in result.output
    monkeypatch.delenv("DAGSTER_HOME")
    own = dagster_home(second.settings)
    assert own == second.settings.storage.root / "dagster"
    # A lake that is copied takes its own instance along.
    copied = second.copy(tmp_path / "third")
    assert dagster_home(copied.settings) == copied.settings.storage.root / "dagster"
    with pytest.raises(UserMistake, match="retire each other"):
        claim_home(home, second.settings.storage.root)


# -- a finished project ------------------------------------------------------------------------------------------


def test_run_ends_with_the_comparison_and_the_paths(finished):
    project, result = finished
    assert result.exit_code == DONE, result.output
    assert all(f"{row} " in result.output for row in ("base", "prism", "random"))
    for strategy in ("prism", "random"):
        path = project.folder / "out" / "plain" / f"{strategy}.jsonl"
        assert str(path) in result.output and path.is_file()
    assert str(project.settings.storage.report / "report.html") in result.output
    assert f"prism ui --config {project.config}" in result.output
    assert (project.settings.storage.root / "prism.duckdb").is_file()


def test_a_tracker_gets_the_losses_of_every_step(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    project, _ = finished
    losses = project.lake.require("adapters", "prism|plain/seed-0").notes["losses"]
    (folder,) = {
        path.parent
        for path in (project.settings.storage.root / "tracking" / "plain" / "prism" / "seed-0").rglob("events*")
    }
    events = EventAccumulator(str(folder))
    events.Reload()
    # The Trainer rounds what it logs to four digits.
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, abs=1e-4)


def test_a_second_run_says_that_everything_is_up_to_date(finished):
    project, _ = finished
    result = prism("run", "--json", "--config", project.config)
    assert result.exit_code == DONE
    content = json.loads(result.stdout)
    assert len(content["steps"]) == 10 and {step["computed"] for step in content["steps"]} == {0}
    assert set(content["targets"]) == {"plain"}


def test_query_prints_the_ranking(finished):
    project, _ = finished
    result = prism("query", "plain", "-k", 3, "--json", "--config", project.config)
    assert result.exit_code == DONE
    rows = json.loads(result.stdout)
    assert [row["id"] for row in rows] == [row["id"] for row in project.selected("prism")[:3]]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) >= {"score", "shard", "source", "prompt", "completion"}
    table = prism("query", "plain", "-k", 2, "--strategy", "uniform", "--config", project.config)
    assert table.exit_code == DONE and "uniform" in table.output


def test_unknown_targets_are_answered_with_the_known(finished):
    project, _ = finished
    for command in (["query", "plane"], ["run", "--target", "plane"]):
        result = prism(*command, "--config", project.config)
        assert result.exit_code == MUST_CHANGE and "plane" in result.output and "plain" in result.output


def test_every_strategy_of_the_project_gives_its_order(finished):
    project, _ = finished
    for strategy in project.settings.strategies:
        chosen = [row["id"] for row in project.selected(strategy)]
        result = prism(
            "query", "plain", "--strategy", strategy, "-k", len(chosen), "--json", "--config", project.config
        )
        assert result.exit_code == DONE, result.output
        assert [row["id"] for row in json.loads(result.stdout)] == chosen, strategy


def test_what_ranks_nothing_or_has_no_direction_says_so(finished):
    project, _ = finished
    for more in (["--strategy", "magic"], ["--strategy", "random", "--harmful"], ["--strategy", "random", "--exact"]):
        result = prism("query", "plain", *more, "--config", project.config)
        assert result.exit_code == MUST_CHANGE, result.output
        assert "Traceback" not in result.output
        assert ("prism, uniform" if more[1] == "magic" else "has no direction") in " ".join(result.output.split())


def test_a_query_begins_where_it_is_asked_to(finished):
    project, _ = finished

    def rows(*arguments) -> list[dict]:
        result = prism("query", "plain", "--json", "--config", project.config, *arguments)
        assert result.exit_code == DONE, result.output
        return json.loads(result.stdout)

    whole, cut = rows("-k", 12), len(project.selected("prism"))
    assert rows("-k", 4, "--offset", 5) == whole[5:9]
    around = rows("-k", 4, "--around-cut")
    assert [row["rank"] for row in around] == [cut - 1, cut, cut + 1, cut + 2]
    assert [row["taken"] for row in around] == [True, True, False, False]
    refused = prism("query", "plain", "--around-cut", "--offset", 2, "--config", project.config)
    assert refused.exit_code == MUST_CHANGE and "--offset" in refused.output


def test_answers_are_csv_and_parquet_too(finished, tmp_path):
    project, _ = finished
    columns = "id, rank, score, [rank, 7] AS pair, NULL AS nothing"
    question = f"SELECT {columns} FROM scores WHERE score IS NOT NULL ORDER BY id, rank LIMIT 5"
    known = json.loads(prism("sql", question, "--json", "--config", project.config).stdout)
    found = prism("sql", question, "--format", "csv", "--config", project.config)
    assert found.exit_code == DONE, found.output
    rows = list(csv.DictReader(io.StringIO(found.stdout)))
    assert [row["id"] for row in rows] == [row["id"] for row in known] and len(rows) == 5
    assert [float(row["score"]) for row in rows] == [row["score"] for row in known]
    assert [json.loads(row["pair"]) for row in rows] == [row["pair"] for row in known]
    assert {row["nothing"] for row in rows} == {""}
    found = prism("sql", question, "--format", "parquet", "--config", project.config)
    assert pq.read_table(io.BytesIO(found.stdout_bytes)).to_pylist() == known
    query = prism("query", "plain", "-k", 3, "--format", "csv", "--config", project.config)
    assert [row["rank"] for row in csv.DictReader(io.StringIO(query.stdout))] == ["1", "2", "3"]
    both = prism("sql", question, "--json", "--format", "csv", "--config", project.config)
    assert both.exit_code == MUST_CHANGE and "two formats" in both.output
    wrong = prism("sql", "SELEC 1", "--format", "csv", "--config", project.config)
    assert wrong.exit_code == MUST_CHANGE and "DuckDB" in wrong.output


def test_doctor_finds_a_finished_project_up_to_date(finished):
    project, _ = finished
    result = prism("doctor", "--json", "--config", project.config)
    assert result.exit_code == DONE, result.output
    findings = json.loads(result.stdout)
    assert all(set(one) == {"state", "what", "found"} for one in findings)
    by_name = {one["what"]: one for one in findings}
    for name in ("candidates", "candidate_features", "candidate_index", "selection"):
        assert by_name[name]["found"] == "up to date"
    assert "LlamaForCausalLM" in by_name["model"]["found"] and "2 files" in by_name["inbox"]["found"]
    assert not [one for one in findings if one["state"] == "problem"]


def test_doctor_sees_an_arrival_and_a_missing_file(finished, tmp_path):
    project, _ = finished
    project = project.copy(tmp_path / "project")
    project.add("late", [{"prompt": "copy: new=", "completion": "new"}])
    (project.inbox / "notes.txt").write_text("words")
    found = {one["what"]: one for one in json.loads(prism("doctor", "--json", "--config", project.config).stdout)}
    assert found["candidates"] == {"state": "note", "what": "candidates", "found": "1 of 3 files are not ingested"}
    assert found["candidate_index"]["state"] == "note" and "notes.txt" in found["ignored"]["found"]
    (project.folder / "plain" / "eval.jsonl").unlink()
    result = prism("doctor", "--json", "--config", project.config)
    assert result.exit_code == MUST_CHANGE and "targets.plain.eval" in result.stdout


def test_a_run_that_fails_says_where_and_why(finished, tmp_path):
    project, _ = finished
    project = project.copy(tmp_path / "project")
    write_lines(project.folder / "plain" / "target.jsonl", [{"prompt": "a", "completion": ""}])
    result = prism("run", "--config", project.config)
    assert result.exit_code == MUST_CHANGE, result.output
    assert "UnusableTargets" not in result.output
    assert "Targets" in result.output and "holds no usable row" in result.output and "Traceback" not in result.output


def test_a_query_before_the_first_run_says_what_to_do(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    result = prism("query", "plain", "--config", project.config)
    assert result.exit_code == MUST_CHANGE
    assert "prism run" in result.output and "Traceback" not in result.output
