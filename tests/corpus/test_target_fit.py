"""How many records of a target's file are used, and what length keeps the others, against the encoder itself."""

import pytest

from conftest import make_rows, write_lines
from prism_assets.corpus.encoding import encoder_of
from prism_assets.corpus.files import read_examples
from prism_assets.corpus.target_fit import given_records, target_fit
from prism_assets.corpus.token_tables import encode_all
from prism_assets.errors import PipelineError, RunRefused
from prism_assets.ops.pipeline import steps_of

# Completions of 41 to 60 characters and an EOS token, under a max_length of 48.
LONG = [{"prompt": "copy: ab=", "completion": "a" * length} for length in range(41, 61)]


@pytest.fixture
def project(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["prism", "random"], seeds=[0])
    project.target = project.folder / "plain" / "target.jsonl"
    return project


def used_at(project, length: int) -> int:
    """Records that the encoder takes at another max_length."""
    stage = project.stage
    examples, _ = read_examples(project.target, "target")
    encoder = encoder_of(stage)
    encoder.max_length = length
    return sum(one is not None for one in encode_all(examples, encoder)[0])


def fit_of(project):
    stage = project.stage
    return target_fit(project.target, "target", encoder_of(stage))


def test_the_lengths_that_are_offered_keep_what_they_promise_and_no_smaller_ones_do(project):
    write_lines(project.target, LONG)
    fit = fit_of(project)
    assert fit.given == 20 and fit.used == used_at(project, 48) == 6
    assert used_at(project, fit.keeps_all) == 20 and used_at(project, fit.keeps_all - 1) < 20
    assert used_at(project, fit.keeps_most) == 18 and used_at(project, fit.keeps_most - 1) < 18
    assert f"{fit.keeps_all} keeps every record" in fit.advice(48)
    assert "the model reads 50 tokens" in fit.advice(48, context=50) and "reads" not in fit.advice(48, context=100)


def test_what_no_length_keeps_is_counted_and_a_duplicate_is_not(project):
    broken = [{"prompt": "copy: ab=", "completion": ""}, "{not json"]
    write_lines(project.target, [*make_rows(3, 1), make_rows(3, 1)[0], *broken])
    fit = fit_of(project)
    assert (fit.given, fit.used, fit.keeps_most) == (5, 3, None)
    assert fit.first.startswith("line 5: ") and fit.advice(48) == ""
    assert fit.too_few(0.39) and not fit.too_few(0.4)


def test_a_run_stops_before_the_warm_up_where_more_than_half_of_a_file_is_rejected(project):
    write_lines(project.target, LONG)
    with pytest.raises(RunRefused) as raised:  # exit status 2: the user must change something
        project.run()
    message = str(raised.value)
    assert "of the 20 records" in message and "6 can be used" in message and "max_rejected: 0.7" in message
    assert f"{fit_of(project).keeps_all} keeps every record" in message
    assert not list(project.lake.artifacts("warmup_checkpoints"))


def test_a_setting_allows_it_and_the_report_says_how_many_are_used(project):
    write_lines(project.target, LONG)
    (target,) = project.content["targets"].values()
    project.configure(targets={"plain": {**target, "max_rejected": 0.7}})
    project.run()
    report = project.report["targets"]["plain"]
    assert report["records"] == {"targets": {"given": 20, "used": 6}, "eval_examples": {"given": 6, "used": 6}}
    page = (project.settings.storage.report / "report.html").read_text(encoding="utf-8")
    assert "20 given, 6 used" in page and "6 given" not in page


def test_exactly_half_is_still_allowed(project):
    write_lines(project.target, [*LONG[:6], *LONG[-6:]])
    project.run_steps([step for step in steps_of("run") if step.title in ("Base model", "Targets")])
    rejects = project.stage.shown("targets_rejects", "plain")
    assert given_records(6, project.lake.read_table(rejects).to_pylist()) == 12
    with pytest.raises(PipelineError, match="12 records"):
        (target,) = project.content["targets"].values()
        project.configure(targets={"plain": {**target, "max_rejected": 0.4}})
        project.run_steps([step for step in steps_of("run") if step.title in ("Base model", "Targets")])
