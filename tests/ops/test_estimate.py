"""`prism estimate` against independent counts: the tokenizer, what the engine is given, what the run then writes."""

import json
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import make_rows, write_lines
from prism_assets.ops.estimate import estimate, time_text
from prism_assets.ops.pipeline import Listener, run_pipeline, steps_of
from prism_assets.ops.rates import Memory

SECONDS = 0.05


def prism(*arguments):
    from prism_assets.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    """Drawing is half of the time of a run."""
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


@pytest.fixture
def fresh(make_project, tmp_path):
    return make_project(tmp_path / "project", strategies=["prism", "random"], seeds=[0])


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory):
    """A finished project. Copy it before changing it."""
    from prism_assets.plots import canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        project = make_project(tmp_path_factory.mktemp("estimate") / "project", strategies=["prism", "random"])
        project.run()
    return project


def estimated(project, **options):
    return estimate(project.stage, seconds=SECONDS, **options)


def stages(project) -> dict[str, float]:
    """Rows or parts of each stage that has something to do."""
    return {one.stage: one.rows for one in estimated(project).stages}


def rehearse_once(project) -> None:
    """What is done once a process, and is no part of an estimate."""
    from prism_assets.reference.rehearsal import rehearse

    rehearse(project.stage)


def tokens_of(project, rows) -> tuple[int, int]:
    """All tokens and those of completions, by the tokenizer alone: prompt and completion with BOS and EOS."""
    tokenizer = project.stage.model.tokenizer()
    prompts = sum(len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in rows)
    completions = sum(len(tokenizer(row["completion"], add_special_tokens=False)["input_ids"]) + 1 for row in rows)
    bos = len(tokenizer("a")["input_ids"]) - 1
    return prompts + completions + bos * len(rows), completions


# -- rows and tokens ---------------------------------------------------------------------------------------------


def test_rows_and_tokens_are_those_of_the_tokenizer_before_and_after_the_files_are_ingested(fresh):
    rows = [*make_rows(20, 10), *make_rows(20, 11)]
    before = estimated(fresh).pool
    fresh.run_steps([step for step in steps_of("run") if step.title in ("Base model", "Candidates")])
    after = estimated(fresh).pool
    assert (len(before.pending), len(after.pending)) == (2, 0)
    for pool in (before, after):
        assert not pool.extrapolated
        assert pool.rows == 40 and (pool.tokens, pool.completion_tokens) == tokens_of(fresh, rows)


def test_a_large_file_is_extrapolated_by_bytes_and_said_to_be(fresh):
    rows = make_rows(30_000, 5)
    fresh.add("large", rows)
    found = estimated(fresh)
    distinct = list({row["prompt"]: row for row in rows}.values())
    everything = [*make_rows(20, 10), *make_rows(20, 11), *distinct]
    assert found.pool.extrapolated and found.pool.sampled < 4_000 and found.line().startswith("about ")
    # Repetitions far apart are not seen in a sample.
    assert len(everything) * 0.95 < found.pool.rows < 31_000
    assert found.pool.tokens == pytest.approx(tokens_of(fresh, rows)[0], rel=0.05)


def test_rows_that_lose_a_part_of_their_prompt_are_counted(fresh):
    long = [{"prompt": f"copy: {'ab' * 25}{number}=", "completion": "ab"} for number in range(7)]
    fresh.add("long", long)
    assert estimated(fresh).pool.truncated == 7
    fresh.run_steps([step for step in steps_of("run") if step.title in ("Base model", "Candidates")])
    assert estimated(fresh).pool.truncated == 7


# -- what is still to be done ------------------------------------------------------------------------------------


def test_a_finished_project_costs_nothing_and_measures_nothing(finished, monkeypatch):
    monkeypatch.setattr("prism_assets.ops.estimate.measure", None)
    found = estimated(finished)
    assert found.stages == [] and found.measured is None and found.disk.total == 0
    assert found.line().endswith("everything is up to date")


def test_a_change_costs_what_follows_from_it(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    project.configure(selection={"budget": 5})
    # 2 strategies x 2 seeds; the base model was evaluated.
    assert stages(project) == {"selection": 2, "adapter": 4, "evaluation": 4}
    project.configure(selection={"budget": 8}, seeds=[0, 1, 2])
    assert stages(project) == {"adapter": 2, "evaluation": 2}
    project.configure(seeds=[0, 1], strategies=["prism", "random", "less"])
    assert stages(project) == {"target_direction": 1, "selection": 1, "adapter": 2, "evaluation": 2}
    project.configure(strategies=["prism", "random"], preference={"probe_step": 0.03})
    assert "candidate_features" not in stages(project) and stages(project)["target_direction"] == 1


def test_an_arrival_costs_its_own_rows_and_a_changed_held_out_file_no_features(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    project.add("late", make_rows(5, seed=99))
    found = stages(project)
    assert found["candidates"] == found["candidate_features"] == 5 and "warm-up" not in found
    (project.inbox / "late.jsonl").unlink()
    write_lines(project.folder / "plain" / "eval.jsonl", make_rows(3, 400, "reverse"))
    # The pool holds the new records back, so rankings may change.
    assert set(stages(project)) == {"target_direction", "evaluation", "selection", "adapter"}


def test_a_finished_block_of_an_unfinished_shard_costs_nothing(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    stage = project.stage
    (key, *_) = sorted(head["partition"] for head in project.lake.heads("candidates"))
    features = stage.shown("candidate_features", key)
    stage.retire("candidate_features", key)
    project.lake.store.delete(features.key)
    assert "candidate_features" not in stages(project)


# -- counts of the engine ----------------------------------------------------------------------------------------


def test_the_tokens_of_each_kind_of_pass_are_those_that_the_engine_is_given(make_project, tmp_path, monkeypatch):
    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.ops.remaining import Remaining

    project = make_project(
        tmp_path / "project",
        warmup={"checkpoints": 2},
        training={"steps": None, "epochs": 2},
        strategies=["prism", "less", "full"],
        seeds=[0, 1],
    )
    found = estimated(project)
    rehearse_once(project)
    works = list(Remaining(project.stage, found.pool, found.targets))
    given: Counter[str] = Counter()

    def counted(name: str, kind: str) -> None:
        real = getattr(GradientEngine, name)

        def run(self, examples, *arguments, **options):
            given[kind] += sum(len(one.input_ids) for one in examples)
            return real(self, examples, *arguments, **options)

        monkeypatch.setattr(GradientEngine, name, run)

    counted("feature_rows", "gradient")
    counted("weighted_gradient", "training")
    counted("weighted_gradients", "training")
    counted("mean_log_probs", "forward")
    project.run_steps(steps_of("run")[:-1])  # without the report, whose explanations are not in the estimate
    total = {kind: sum(getattr(work, kind) for work in works) for kind in given}
    assert total["gradient"] == given["gradient"]
    # Which rows are selected is not known beforehand: they count with the pool's mean length.
    assert total["training"] == pytest.approx(given["training"], rel=0.1)
    prompts = sum(len(one) for one in found.targets["plain"].held_out.prompts)
    evaluated = 1 + 3 * 2  # whose prompts are read by generation, not by the engine
    assert total["forward"] - prompts * evaluated == given["forward"]


def test_exact_scores_cost_a_pass_only_where_features_came_before_the_directions(make_project, tmp_path, monkeypatch):
    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.ops.remaining import Remaining

    project = make_project(tmp_path / "project", strategies=["prism", "less"], selection={"rerank": "all"}, seeds=[0])
    given = [0]
    real = GradientEngine.feature_rows

    def counted(self, examples, *arguments, **options):
        given[0] += sum(len(one.input_ids) for one in examples)
        return real(self, examples, *arguments, **options)

    def predicted() -> float:
        found = estimated(project)
        return sum(work.gradient for work in Remaining(project.stage, found.pool, found.targets))

    def spent() -> int:
        given[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(GradientEngine, "feature_rows", counted)
            project.run_steps(
                [one for one in steps_of("run") if one.title not in ("Fine-tuning, evaluation", "Report")]
            )
        return given[0]

    rehearse_once(project)
    first = predicted()
    assert spent() == first  # the features' pass, which takes the products along
    project.configure(preference={"temperature": 0.5})
    assert predicted() == pytest.approx(spent(), rel=1e-6) and 0 < given[0] < first  # one pass over the pool for both
    assert predicted() == 0


# -- disk and memory ---------------------------------------------------------------------------------------------


def test_the_disk_is_what_the_run_then_writes(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["prism", "rds"], seeds=[0], selection={"budget": "10%"})
    for number in range(3):
        project.add(f"more{number}", make_rows(700, seed=50 + number))
    disk = estimated(project).disk
    project.run()
    folder = project.settings.storage.root / "artifacts"

    def written(*tables: str) -> int:
        names = tables or [one.name for one in folder.iterdir()]
        return sum(file.stat().st_size for name in names for file in (folder / name).rglob("*") if file.is_file())

    assert written() == pytest.approx(disk.total, rel=0.2)
    assert written("feature_blocks", "target_features") == pytest.approx(disk.parts["feature_blocks"], rel=0.1)
    assert written("index_segments") == pytest.approx(disk.parts["index_segments"], rel=0.1)
    texts = written("candidates", "warmup_sample", "selection")
    assert texts == pytest.approx(disk.parts["text_and_tokens"], rel=0.25)


def test_memory_is_at_least_the_model_and_batches_are_halved_before_it_is_exceeded():
    memory = Memory("cpu", model=100, held=150, loading=0, planned=400, least=60, allowed=300)
    assert (memory.smallest, memory.expected) == (210, 300)
    assert memory._replace(allowed=1000).expected == 550
    assert memory._replace(allowed=200).expected == 210  # not below one example alone: that is a problem
    assert memory._replace(loading=900).expected == 1050


def test_the_measured_model_is_its_tensors(fresh):
    found = estimated(fresh)
    assert found.measured is not None
    base = fresh.stage.model.base()
    tensors = [*base.parameters(), *base.buffers()]
    assert found.measured.memory.model == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.measured.memory.held > found.measured.memory.model and found.problems == []
    assert all(rate.seconds > 0 for rate in (found.measured.rates.gradient, found.measured.rates.forward))


def test_too_little_memory_is_a_problem_that_names_the_setting(fresh):
    fresh.configure(execution={"memory": "1MB"})
    found = estimated(fresh)
    (problem,) = found.problems
    assert "execution.memory" in problem and found.stages == [] and found.data()["rates"] is None


# -- the command, doctor and run ---------------------------------------------------------------------------------


def test_json_has_the_promised_layout(fresh):
    write_lines(fresh.folder / "plain" / "target.jsonl", [*make_rows(3, 1), {"prompt": "a", "completion": "b" * 60}])
    result = prism("estimate", "--json", "--seconds", SECONDS, "--config", fresh.config)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["pool"]["rows"] == 40 and data["pool"]["files_not_ingested"] == 2 and data["problems"] == []
    assert data["targets"][0] == {
        "target": "plain",
        "file": "examples",
        "path": str(fresh.folder / "plain" / "target.jsonl"),
        **{"given": 4, "used": 3, "max_length_for_all": 62, "max_length_for_90_percent": 62, "problem": None},
    }
    assert [one["stage"] for one in data["stages"]][:3] == ["candidates", "warm-up", "candidate_features"]
    assert data["seconds"] == pytest.approx(sum(one["seconds"] for one in data["stages"]))
    assert set(data["rates"]) == {"gradient", "training", "forward", "generation", "step"}
    assert data["memory"]["smallest_bytes"] <= data["memory"]["expected_bytes"] <= data["memory"]["allowed_bytes"]
    assert data["disk"]["bytes"] == pytest.approx(sum(data["disk"]["parts"].values()))


def test_words_say_what_is_lost_and_what_keeps_it(fresh):
    write_lines(fresh.folder / "plain" / "target.jsonl", [*make_rows(3, 1), {"prompt": "a", "completion": "b" * 60}])
    output = " ".join(prism("estimate", "--seconds", SECONDS, "--config", fresh.config).output.split())
    assert "40 rows" in output and "candidate_features" in output and "2 of 2 files are not ingested" in output
    assert "targets.plain.examples: 4 given, 3 used" in output and "max_length 62 keeps every record" in output


def test_what_would_stop_the_run_ends_with_2(fresh, tmp_path):
    target = fresh.folder / "plain" / "target.jsonl"
    write_lines(target, [*make_rows(1, 1), *[{"prompt": "a", "completion": "b" * length} for length in (60, 61, 62)]])
    result = prism("estimate", "--json", "--seconds", SECONDS, "--config", fresh.config)
    assert result.exit_code == 2 and "max_rejected" in json.loads(result.stdout)["problems"][0]
    doctor = prism("doctor", "--json", "--config", fresh.config)
    found = {one["what"]: one for one in json.loads(doctor.stdout)}
    assert doctor.exit_code == 2 and found["targets.plain.examples"]["state"] == "problem"
    assert "64 keeps every record" in found["targets.plain.examples"]["found"]
    target.unlink()
    assert prism("estimate", "--seconds", SECONDS, "--config", fresh.config).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--target", "nobody"], "prism.yaml names the targets plain"), (["--seconds", "0"], "0.05")],
)
def test_wrong_input_is_named(fresh, arguments, words):
    result = prism("estimate", "--config", fresh.config, *arguments)
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output


def test_an_empty_inbox_and_a_model_that_is_not_there_are_named(fresh):
    for file in fresh.inbox.iterdir():
        file.unlink()
    result = prism("estimate", "--config", fresh.config)
    assert result.exit_code == 2 and "candidates.inbox" in result.output and "Traceback" not in result.output
    fresh.configure(model={"name": "/nowhere"})
    result = prism("estimate", "--config", fresh.config)
    assert result.exit_code == 2 and "model.name" in result.output


def test_a_run_says_it_before_its_first_step_and_says_nothing_where_all_is_done(fresh, monkeypatch):
    from prism_assets.project import Project

    said: list[str] = []
    listener = Listener(
        on_step=lambda step: said.append(step.title), on_estimate=lambda found: said.append(found.line())
    )

    def run():
        said.clear()
        run_pipeline(Project.of(fresh.settings), fresh.definitions, fresh.instance, listener=listener)
        return list(said)

    first, second, *_ = run()
    assert "40 rows" in first and "of model time" in first and second == steps_of("run")[0].title
    assert run()[0] == steps_of("run")[0].title
    monkeypatch.setattr("prism_assets.ops.estimate.estimate", lambda *_, **__: 1 / 0)
    assert run()[0] == steps_of("run")[0].title  # an estimate fails no run


def test_times_are_written_in_two_digits_or_so():
    seconds = [0.04, 9.96, 42, 150, 4_000, 9_000, 200_000]
    assert [time_text(one) for one in seconds] == ["0.0 s", "10.0 s", "42 s", "2.5 min", "67 min", "2.5 h", "2.3 days"]


def test_batches_of_every_length_are_looked_at_before_neighbours():
    from prism_assets.ops.rates import _spread

    for count in (1, 2, 3, 7, 64, 100):
        order = _spread(count)
        assert sorted(order) == list(range(count))
        if count >= 64:
            assert np.ptp(order[:4]) >= count // 2
