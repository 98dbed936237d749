"""`prism experiment` through Dagster: what it finds, what it makes, how it goes on, what it leaves behind."""

import json
import os
import time

import numpy as np
import pytest

from conftest import make_rows, write_lines
from prism_assets.errors import PipelineError, UserMistake
from prism_assets.experiment.summary import COMPARED_WITH, STAGES
from prism_assets.identity import split_name, trial_partition
from prism_assets.ops.pipeline import steps_of

STRATEGIES = ("prism", "random", "uniform", "less")


pytestmark = pytest.mark.usefixtures("blank_plots")


def experiment(project, targets=None):
    """How many artefacts the experiment made."""
    results = project.run_steps(steps_of("experiment"), targets=targets)
    return results[-1].computed


def made(lake, table):
    return {one.fingerprint for one in lake.artifacts(table)}


def version_of(lake):
    (scope,) = {head["scope"] for head in lake.heads("trials")}
    return scope


def trial(lake, strategy, split, seed):
    return lake.require("trials", trial_partition("plain", strategy, split, seed), version_of(lake))


def above(lake, artifact, role):
    """The artefact that stands in this role among the inputs."""
    return lake.get(artifact.header["inputs"][role]["table"], artifact.header["inputs"][role]["fingerprint"])


@pytest.fixture(scope="module")
def started(make_project, tmp_path_factory):
    """A project after `prism run`. Copy it."""
    project = make_project(
        tmp_path_factory.mktemp("experiment") / "project",
        strategies=["prism", "random"], seeds=[0, 1], experiment={"splits": 2},
    )  # fmt: skip
    project.run()
    return project


@pytest.fixture(scope="module")
def finished(started, tmp_path_factory):
    """The same after `prism experiment`, and what was there before it. Read only."""
    project = started.copy(tmp_path_factory.mktemp("finished") / "project")
    before = {table: made(project.lake, table) for table in ("selection", "adapters", "evaluations")}
    assert experiment(project) > 0
    return project, before


def content_of(project):
    text = (project.settings.storage.report / "experiment.json").read_text(encoding="utf-8")
    return json.loads(text)["targets"]["plain"]


# -- what is made ------------------------------------------------------------------------------------------------


def test_every_strategy_runs_in_every_split_with_every_seed_and_the_counterparts_are_added(finished):
    project, _ = finished
    content = content_of(project)
    assert set(content["strategies"]) == set(STRATEGIES) and set(COMPARED_WITH) < set(STRATEGIES)
    places = {(one["strategy"], one["split"], one["seed"]) for one in content["trials"]}
    assert places == {(s, p, q) for s in STRATEGIES for p in (0, 1) for q in (0, 1)} and len(content["trials"]) == 16


def test_split_zero_is_what_prism_run_made(finished):
    project, before = finished
    lake = project.lake
    for strategy in ("prism", "random"):
        for seed in (0, 1):
            one = trial(lake, strategy, 0, seed)
            for role, table in (("selection", "selection"), ("fine-tuning", "adapters"), ("evaluation", "evaluations")):
                assert above(lake, one, role).fingerprint in before[table], (strategy, seed, role)
    # 4 strategies, 2 splits, 2 seeds; four of them were there.
    assert len(made(lake, "adapters") - before["adapters"]) <= 16 - 4


def test_what_prism_run_shows_is_not_moved(finished, started):
    project, _ = finished
    for table in ("targets", "eval_examples", "selection", "adapters", "evaluations", "target_directions"):
        heads = [
            {(h["scope"], h["partition"], h["fingerprint"]) for h in one.lake.heads(table)}
            for one in (project, started)
        ]
        assert heads[0] == heads[1], table


def test_a_second_run_makes_nothing(finished, tmp_path):
    project, _ = finished
    again = project.copy(tmp_path / "copy")
    before = {one.fingerprint for one in again.lake.artifacts()}
    assert experiment(again) == 0
    assert {one.fingerprint for one in again.lake.artifacts()} == before


def test_a_trial_is_judged_on_the_records_of_its_split(finished):
    project, _ = finished
    lake = project.lake
    for strategy in STRATEGIES:
        one = trial(lake, strategy, 1, 0)
        scores = above(lake, one, "evaluation")
        rows = lake.read_table(scores)
        records = lake.read_table(above(lake, scores, "records"))
        assert above(lake, scores, "records").partition == split_name("plain", 1)
        assert rows["id"].to_pylist() == records["id"].to_pylist()
        (row,) = lake.read_table(one).to_pylist()
        assert row["target_preference"] == pytest.approx(np.mean(np.exp(rows["mean_log_prob"].to_numpy())))
        assert row["exact_match"] == pytest.approx(np.mean(rows["exact_match"].to_pylist()))


def test_directions_of_a_split_are_made_from_its_targets(finished):
    project, _ = finished
    lake = project.lake
    targets = [
        above(lake, above(lake, trial(lake, "prism", split, 0), "direction"), "targets").content_hash
        for split in (0, 1)
    ]
    assert targets[0] == lake.require("targets", "plain", lake.heads("targets")[0]["scope"]).content_hash != targets[1]


def test_what_is_drawn_at_random_is_drawn_anew_in_each_split(finished):
    project, _ = finished
    lake = project.lake
    chosen = [
        set(lake.read_table(above(lake, trial(lake, "random", split, 0), "selection"))["id"].to_pylist())
        for split in (0, 1)
    ]
    assert chosen[0] != chosen[1] and len(chosen[0]) == len(chosen[1]) == 8


def test_the_outcome_is_that_of_its_trials(finished):
    project, _ = finished
    content = content_of(project)
    prefer = {(one["strategy"], one["split"], one["seed"]): one["target_preference"] for one in content["trials"]}
    means = {s: [np.mean([prefer[s, p, q] for q in (0, 1)]) for p in (0, 1)] for s in STRATEGIES}
    entry = content["strategies"]["prism"]["target_preference"]
    assert entry["mean"] == pytest.approx(np.mean(means["prism"])) and entry["n"] == 2
    for other in COMPARED_WITH:
        difference = content["differences"]["prism"][other]["target_preference"]
        each = np.subtract(means["prism"], means[other])
        assert difference["mean"] == pytest.approx(each.mean()) and difference["std"] == pytest.approx(each.std(ddof=1))
    page = (project.settings.storage.report / "experiment.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and content["verdict"][0] in page


def test_costs_are_those_of_the_making(finished):
    project, _ = finished
    lake = project.lake
    cost = content_of(project)["strategies"]["prism"]["cost"]
    assert set(cost) == set(STAGES) and all(one["cpu_seconds"] > 0 and not one["unknown"] for one in cost.values())
    assert set(content_of(project)["strategies"]["random"]["cost"]) == {"selection", "fine-tuning", "evaluation"}
    adapters = {above(lake, trial(lake, "prism", p, q), "fine-tuning").fingerprint for p in (0, 1) for q in (0, 1)}
    spent = sum(lake.get("adapters", one).notes["cost"]["cpu_seconds"] for one in adapters)
    assert cost["fine-tuning"]["cpu_seconds"] == pytest.approx(spent)
    shared = content_of(project)["shared_cost"]
    assert set(shared) == {"warm-up", "candidate features"} and all(one["cpu_seconds"] > 0 for one in shared.values())


def test_hidden_states_are_work_that_is_shared_and_loading_the_model_is_nobodys(finished, tmp_path, monkeypatch):
    from prism_assets.resources.model.language_model import LanguageModel

    project = finished[0].copy(tmp_path / "project")
    load = LanguageModel.adapted

    def slow(self, **keywords):
        until = time.process_time() + 1
        while time.process_time() < until:
            pass
        return load(self, **keywords)

    monkeypatch.setattr(LanguageModel, "adapted", slow)
    project.configure(experiment={"strategies": ["rds"], "splits": 1, "seeds": [0]})
    experiment(project)
    content = content_of(project)
    shared, rds = content["shared_cost"], content["strategies"]["rds"]
    (selection,) = [one for one in project.lake.artifacts("selection") if one.header["settings"]["strategy"] == "rds"]
    blocks = [
        project.lake.get("hidden_states", one["fingerprint"]) for one in selection.header["lineage"]["hidden_states"]
    ]
    spent = sum(one.notes["cost"]["cpu_seconds"] for one in {block.fingerprint: block for block in blocks}.values())
    assert shared["hidden states"] == {"cpu_seconds": pytest.approx(spent), "gpu_seconds": None, "unknown": 0}
    assert 0 < spent < 1 and 0 < rds["cost"]["selection"]["cpu_seconds"] < 1
    alone = sum(one["cpu_seconds"] for one in rds["cost"].values()) + spent
    assert rds["with_shared"]["cpu_seconds"] == pytest.approx(alone)
    gradients = shared["warm-up"]["cpu_seconds"] + shared["candidate features"]["cpu_seconds"]
    less, random = (content["strategies"][name] for name in ("less", "random"))
    assert less["with_shared"]["cpu_seconds"] - sum(c["cpu_seconds"] for c in less["cost"].values()) == pytest.approx(
        gradients
    )
    assert random["with_shared"]["cpu_seconds"] == pytest.approx(sum(c["cpu_seconds"] for c in random["cost"].values()))


# -- resuming ----------------------------------------------------------------------------------------------------


def test_a_killed_experiment_goes_on_where_it_stopped(started, finished, tmp_path, monkeypatch):
    from prism_assets.resources.lake.lake import Lake

    project = started.copy(tmp_path / "project")
    publish = Lake.publish_folder
    trained = []

    def killed_at_the_third(self, recipe, *arguments, **keywords):
        if recipe.table == "adapters":
            trained.append(recipe.fingerprint)
            if len(trained) == 3:
                raise KeyboardInterrupt
        return publish(self, recipe, *arguments, **keywords)

    before = made(project.lake, "adapters")
    with monkeypatch.context() as patch:
        patch.setattr(Lake, "publish_folder", killed_at_the_third)
        with pytest.raises((KeyboardInterrupt, PipelineError)):
            experiment(project)
    assert made(project.lake, "adapters") - before == set(trained[:2])
    assert not list(project.lake.heads("experiments")) and project.lake.heads("trials")

    again = []

    def counted(self, recipe, *arguments, **keywords):
        again.append(recipe.fingerprint)
        return publish(self, recipe, *arguments, **keywords)

    monkeypatch.setattr(Lake, "publish_folder", counted)
    experiment(project)
    straight = finished[0].lake
    assert not set(trained[:2]) & set(again)
    assert made(project.lake, "adapters") == made(straight, "adapters")
    (ours,), (theirs,) = list(project.lake.artifacts("experiments")), list(straight.artifacts("experiments"))
    assert (ours.fingerprint, ours.content_hash) == (theirs.fingerprint, theirs.content_hash)


def test_more_splits_cost_the_new_ones_and_fewer_take_the_others_out(finished, tmp_path):
    project = finished[0].copy(tmp_path / "project")
    before = made(project.lake, "trials")
    project.configure(experiment={"splits": 3})
    experiment(project)
    assert len(made(project.lake, "trials") - before) == 8 and content_of(project)["units"] == 3
    project.configure(experiment={"splits": 1, "seeds": [0], "strategies": ["prism"]})
    assert experiment(project) == 1  # the outcome itself
    assert len(project.lake.heads("trials")) == 4 and content_of(project)["units"] == 1


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["apart", "together"])
def test_no_split_selects_a_target_or_held_out_record(started, tmp_path, how):
    project = started.copy(tmp_path / "project")
    folder = project.folder / "plain"
    leaked = [json.loads((folder / f"{role}.jsonl").read_text().splitlines()[0]) for role in ("target", "eval")]
    project.add("leak", [{key: row[key] for key in ("prompt", "completion")} for row in leaked])
    project.configure(selection={"budget": "100%"}, training={"steps": 1}, seeds=[0], experiment={"redraw": how})
    experiment(project)
    lake = project.lake
    records = set()
    for table in ("targets", "eval_examples"):
        for one in lake.artifacts(table):
            records |= set(lake.read_table(one)["conversation_id"].to_pylist())
    selected = [set(lake.read_table(above(lake, trial(lake, s, p, 0), "selection"))["id"].to_pylist())
                for s in STRATEGIES for p in (0, 1)]  # fmt: skip
    assert all(len(one) == 40 and not one & records for one in selected)


def test_an_arrival_in_the_midst_of_it_gives_no_trial_another_pool(started, tmp_path, monkeypatch):
    from prism_assets.experiment import experiment_trials

    project = started.copy(tmp_path / "project")
    lake = project.lake
    tables = ("candidate_index", "live_pool")
    before = {table: [(head, lake.get(table, head["fingerprint"])) for head in lake.heads(table)] for table in tables}
    project.add("late", make_rows(20, 321))
    project.configure(seeds=[0], strategies=["prism"])
    judge = experiment_trials.make_scores

    def judge_and_move_the_pool(*arguments):
        for table in tables:
            for head, artifact in before[table]:
                lake.point(artifact, head["partition"], head["scope"])
        return judge(*arguments)

    monkeypatch.setattr(experiment_trials, "make_scores", judge_and_move_the_pool)
    experiment(project)
    pools = {
        s: [above(lake, above(lake, trial(lake, s, p, 0), "selection"), "pool") for p in (0, 1)] for s in STRATEGIES
    }
    found = {one.fingerprint for its in pools.values() for one in its}
    assert len(found) == 1 and found != {artifact.fingerprint for _, artifact in before["live_pool"]}


def test_records_that_cannot_be_split_are_the_users_to_change(started, tmp_path):
    project = started.copy(tmp_path / "project")
    target = (project.folder / "plain" / "target.jsonl").read_text().splitlines()
    write_lines(project.folder / "plain" / "eval.jsonl", target)
    project.configure(experiment={"redraw": "together"})
    with pytest.raises(UserMistake, match="targets.plain: 6 different records are too few"):
        experiment(project)


# -- lineage, catalogue, gc --------------------------------------------------------------------------------------


def test_lineage_reaches_from_the_outcome_to_the_files(finished):
    from prism_assets.catalog.lineage import find_artifact, trace

    project, _ = finished
    traced = trace(project.lake, find_artifact(project.lake, "experiment[plain]"))
    assert not [edge for one in traced["artifacts"] for edge in one["inputs"] if edge["missing"]]
    tables = {one["table"] for one in traced["artifacts"]}
    assert tables >= {"trials", "evaluations", "adapters", "selection", "target_directions", "targets", "candidates"}
    assert split_name("plain", 1) in {one["partition"] for one in traced["artifacts"] if one["table"] == "targets"}


def test_trials_and_experiments_can_be_asked_in_sql(finished):
    from prism_assets.catalog.sql import connect
    from prism_assets.catalog.views import additions
    from prism_assets.resources.lake.lake import Lake
    from prism_assets.resources.lake.views import CatalogAdditions

    project, _ = finished
    content = content_of(project)
    with connect(project.lake) as sql:
        rows = sql.execute("SELECT strategy, split, seed, target_preference, cpu_seconds FROM trials").fetchall()
        expected = {(t["strategy"], t["split"], t["seed"], t["target_preference"]) for t in content["trials"]}
        assert {row[:4] for row in rows} == expected and all(row[4] > 0 for row in rows)
        found = sql.execute(
            "SELECT mean, low FROM experiments WHERE strategy = 'prism' AND other = 'less' AND metric = 'mean_log_prob'"
        ).fetchone()
        difference = content["differences"]["prism"]["less"]["mean_log_prob"]
        assert found == pytest.approx((difference["mean"], difference["interval"][0]))
        shown = sql.execute("SELECT count(*) FROM selections WHERE current").fetchone()
        assert shown == (2,)
    with project.lake.connect(CatalogAdditions(additions().columns)) as typed, project.lake.connect() as plain:
        for table in ("trials", "experiments"):
            kinds = dict(row[:2] for row in plain.execute(f"DESCRIBE raw.{table}").fetchall())
            assert set(additions().columns[table]) <= set(kinds)
            assert kinds == dict(row[:2] for row in typed.execute(f"DESCRIBE raw.{table}").fetchall())
    with connect(Lake(root=str(project.folder / "nothing"))) as empty:
        assert (
            empty.execute("SELECT * FROM trials").fetchall()
            == empty.execute("SELECT * FROM experiments").fetchall()
            == []
        )


def test_gc_keeps_what_an_experiment_rests_on_and_clears_what_it_gave_up(finished, tmp_path):
    from prism_assets.ops.gc import collect, plan, what_is_current

    project = finished[0].copy(tmp_path / "project")
    lake = project.lake

    def clear():
        today = what_is_current(project.stage)
        return collect(lake, plan(lake, **today._asdict(), min_age=0.0, keep=0))

    assert not set(clear()) & {"trials", "experiments", "adapters", "selection", "target_directions", "targets"}
    (artifact,) = lake.artifacts("experiments")
    assert lake.local(artifact, suffix=".html").exists() and lake.local(artifact, suffix=".json").exists()
    assert experiment(project) == 0

    project.configure(experiment={"splits": 1})
    experiment(project)
    removed = clear()
    assert removed["trials"][0] == 8 and removed["experiments"][0] == 1 and removed["targets"][0] == 1
    assert not lake.local(artifact).exists() and not lake.local(artifact, suffix=".html").exists()
    assert experiment(project) == 0

    # A new warm-up is a new feature version: the experiment belongs to the old one and goes with it.
    project.configure(warmup={"generation": 2})
    project.run()
    assert clear()["experiments"][0] == 1 and not list(lake.artifacts("trials"))


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def prism():
    from typer.testing import CliRunner

    from prism_assets.cli import app

    before = dict(os.environ)
    yield lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_the_command_prints_table_verdict_and_page(finished, tmp_path, prism):
    project = finished[0].copy(tmp_path / "project")
    result = prism("experiment", "--config", project.config)
    assert result.exit_code == 0, result.output
    assert all(f" {name} " in result.output for name in ("base", *STRATEGIES))
    assert all(sentence in result.output for sentence in content_of(project)["verdict"])
    assert str(project.settings.storage.report / "experiment.html") in result.output
    answer = json.loads(prism("experiment", "--json", "--target", "plain", "--config", project.config).stdout)
    assert answer["computed"] == 0 and answer["targets"]["plain"]["differences"] == content_of(project)["differences"]


def test_an_unknown_target_is_answered_with_the_known(finished, prism):
    result = prism("experiment", "--target", "plane", "--config", finished[0].config)
    assert result.exit_code == 2 and "plain" in result.output
