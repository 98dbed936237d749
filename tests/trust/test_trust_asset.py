"""The asset `trust` end to end on a tiny project: measured once, found again, shown; shuffled scores fail it."""

import json

import numpy as np
import pytest

from prism_assets.ops.pipeline import steps_of
from prism_assets.trust.verdict import CHECKS

OPTIONS = {"candidates": 16, "random_steps": 2, "held_out": 4, "datamodel_subsets": 8, "datamodel_rows": 16}


@pytest.fixture(scope="module", autouse=True)
def blank_plots():
    from prism_assets.plots import canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        yield


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory):
    """A finished project of two targets, of which nothing was measured yet. Copy it before changing it."""
    project = make_project(
        tmp_path_factory.mktemp("trust") / "project", strategies=["prism", "random"], seeds=[0], trust=OPTIONS
    )
    project.run()
    return project


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """The same project with its trust measured."""
    project = finished.copy(tmp_path_factory.mktemp("measured") / "project")
    project.results = measure(project)
    return project


def measure(project):
    return project.run_steps(steps_of("trust"))


def notes_of(project):
    from prism_assets.trust.trust import trust_of

    return trust_of(project.stage, "plain")


def version_of(project):
    return project.stage.feature_version


def checks_of(project, result):
    """Check name -> passed, from the run's events."""
    found = {}
    for record in project.instance.event_log_storage.get_records_for_run(result.run_ids[0]).records:
        event = record.event_log_entry.dagster_event
        if event and event.event_type_value == "ASSET_CHECK_EVALUATION":
            found[event.asset_check_evaluation_data.check_name] = event.asset_check_evaluation_data.passed
    return found


def test_prism_run_measures_nothing_and_the_report_says_how_to(finished):
    assert notes_of(finished) is None
    assert finished.report["targets"]["plain"]["trust"] is None
    page = (finished.settings.storage.report / "report.html").read_text()
    assert "Can this be trusted?" in page and "prism trust" in page


def test_every_question_has_a_check_and_every_number_its_rows(measured):
    assert set(checks_of(measured, measured.results[0])) == set(CHECKS)
    notes = notes_of(measured)
    with measured.lake.connect() as connection:
        rows = dict(
            connection.execute("SELECT measure || '/' || strategy, count(*) FROM trust GROUP BY ALL").fetchall()
        )
    assert rows == {
        "weights_rank_correlation/prism": 4,
        "weights_flipped/prism": 4,
        "growing_step/prism": 8,
        "growing_step/uniform": 8,
        "growing_step_held_out/prism": 8,
        "growing_step_held_out/uniform": 8,
        "single_step/prism": 16,
        "single_step/uniform": 16,
        "subset/prism": 8,
        "subset/uniform": 8,
    }
    assert notes["single_steps"]["prism"]["stored"]["n"] == 16 and notes["held_out_rows"] == 4
    assert set(notes["seconds"]) == {"single_steps", "random_steps", "growing_steps", "datamodel"}
    # √P times the learning rate of fine-tuning.
    parameters = sum(np.prod(t.shape) for t in direction(measured).values())
    assert notes["single_steps"]["length"] == pytest.approx(1e-3 * parameters**0.5)


def direction(project):
    from prism_assets.selection.direction_artifacts import load_direction

    return load_direction(project.lake, project.stage.shown("target_directions", "plain", "prism")).vectors[-1]


def test_the_correlations_in_the_notes_are_those_of_the_published_rows(measured):
    with measured.lake.connect() as connection:
        rows = connection.execute(
            "SELECT predicted, measured FROM trust WHERE measure = 'single_step' AND strategy = 'prism'"
        ).fetchnumpy()
    ranks = [np.argsort(np.argsort(rows[name])) for name in ("predicted", "measured")]
    expected = np.corrcoef(*ranks)[0, 1]
    assert notes_of(measured)["single_steps"]["prism"]["stored"]["value"] == pytest.approx(expected)
    assert expected > 0.5  # steps are small and the model is smooth: first order must hold here


def test_it_is_found_again_and_made_anew_for_another_learning_rate(measured, tmp_path):
    assert measure(measured)[0].computed == 0
    other = measured.copy(tmp_path / "other").configure(
        training={"learning_rate": 5e-4}, trust={"datamodel_subsets": 0}
    )
    assert measure(other)[0].computed == 1
    assert notes_of(other)["single_steps"]["length"] == pytest.approx(notes_of(measured)["single_steps"]["length"] / 2)
    assert notes_of(other)["datamodel"] is None


def test_the_report_shows_what_was_measured_for_todays_direction_only(measured, tmp_path):
    project = measured.copy(tmp_path / "shown")
    assert project.run()["Report"] == 1
    shown = project.report["targets"]["plain"]["trust"]
    assert [one["check"] for one in shown] == list(CHECKS)
    page = (project.settings.storage.report / "report.html").read_text()
    assert "effective targets of 6" in page and "Not measured: " not in page
    project.configure(preference={"temperature": 3.0}).run()
    assert project.report["targets"]["plain"]["trust"] is None


def test_shuffled_scores_fail_the_checks(finished, tmp_path, monkeypatch):
    from prism_assets.trust import trust

    real = trust.tried_candidates

    def shuffled(*arguments):
        rng = np.random.default_rng(1)
        tables = []
        for table in real(*arguments):
            for name in ("score_prism", "score_uniform"):
                column = table.column_names.index(name)
                table = table.set_column(column, name, [rng.permutation(table[name].to_numpy())])
            tables.append(table)
        return tuple(tables)

    monkeypatch.setattr(trust, "tried_candidates", shuffled)
    project = finished.copy(tmp_path / "shuffled")
    passed = checks_of(project, measure(project)[0])
    assert passed["single_steps_agree"] is False and passed["subsets_predicted"] is False
    assert passed["weights_not_concentrated"] is True  # what does not rest on scores is not touched


def test_without_what_it_measures_the_command_says_what_to_run_first(make_project, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from prism_assets.cli import app

    project = make_project(tmp_path / "empty")
    for name in ("DAGSTER_HOME", "PRISM_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    printed = CliRunner().invoke(app, ["trust", "plain", "--config", str(project.config)])
    assert printed.exit_code == 1 and "no warmup_checkpoints yet" in printed.output and "prism run" in printed.output


def test_the_command_prints_sentences_and_json(measured, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from prism_assets.cli import app

    project = measured.copy(tmp_path / "cli")
    for name in ("DAGSTER_HOME", "PRISM_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    config = ["--config", str(project.config)]
    printed = CliRunner().invoke(app, ["trust", "plain", *config])
    assert printed.exit_code == 0 and "effective targets of 6" in " ".join(printed.output.split())
    monkeypatch.delenv("DAGSTER_HOME")
    found = json.loads(CliRunner().invoke(app, ["trust", "plain", "--json", *config]).stdout)
    assert [one["check"] for one in found["findings"]] == list(CHECKS)
    assert found["measurements"]["single_steps"]["prism"]["stored"]["n"] == 16
    unknown = CliRunner().invoke(app, ["trust", "nobody", *config])
    assert unknown.exit_code == 2 and "prism.yaml names the targets plain" in unknown.output


def test_summed_scores_are_measured_as_summed(finished, measured, tmp_path):
    copy = finished.copy(tmp_path / "copy").configure(preference={"score": "sum", "temperature": 5.0})
    copy.run()
    measure(copy)
    lake, summed = copy.lake, notes_of(copy)
    weights = lake.require("target_weights", "plain", version_of(copy))
    # J of the whole completions' log-probabilities, by hand from what was published of each target.
    scores = np.array(lake.read_table(weights)["score"].to_pylist())
    assert np.exp(scores / 5.0).mean() == pytest.approx(weights.notes["objective"], rel=1e-5)
    step = summed["growing_steps"]["prism"][2]
    assert step["size"] == weights.notes["first_order"]["step"]
    for kind in ("predicted", "measured"):
        assert step[kind] == pytest.approx(weights.notes["first_order"]["prism"][kind], rel=0.02)
    smallest = summed["growing_steps"]["prism"][0]
    assert smallest["measured"] == pytest.approx(smallest["predicted"], rel=0.1)
    # The uniform direction raises the mean summed score, which is not the mean of means.
    assert summed["single_steps"]["uniform"]["exact"]["value"] > 0.9
    assert summed["growing_steps"]["prism"] != notes_of(measured)["growing_steps"]["prism"]


def test_of_a_corrected_direction_the_prediction_is_that_of_the_gradient_itself(finished, measured, tmp_path):
    copy = finished.copy(tmp_path / "copy").configure(curvature={"kind": "fisher", "damping": 0.01})
    copy.run()
    measure(copy)
    corrected, plain = notes_of(copy)["growing_steps"], notes_of(measured)["growing_steps"]
    for one, other in zip(corrected["prism"][:3], plain["prism"][:3], strict=True):
        assert one["size"] == pytest.approx(other["size"], rel=1e-5)
        # By Cauchy and Schwarz no direction is predicted to raise J as ∇J does; what is predicted holds all the same.
        assert 0 < one["predicted"] < other["predicted"]
        assert one["measured"] == pytest.approx(one["predicted"], rel=0.2)
