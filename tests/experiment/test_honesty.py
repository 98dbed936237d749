"""What no comparison may rest on: held-out records in a selection, and influence that does not see harm."""

import numpy as np
import pytest

from conftest import make_rows, write_lines
from prism_assets.corpus.target_set import target_set
from prism_assets.corpus.token_tables import from_table
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.ops.pipeline import Step, steps_of
from prism_assets.selection.strategies import STRATEGIES

SELECT = (*steps_of("run")[:7], Step("Selection", ("selection",), "target_strategy"))
GRADIENT = [name for name, one in STRATEGIES.items() if one.needs_direction]


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


def select(project):
    """Content hash and selected ids of every strategy."""
    project.run_steps(SELECT)
    found = {name: project.selection(name) for name in project.settings.strategies}
    return {name: (one.content_hash, project.lake.read_table(one)["id"].to_pylist()) for name, one in found.items()}


def test_no_strategy_sees_held_out_records(make_project, tmp_path):
    """Other records held out change nothing but this: what equals one of them is no candidate."""
    project = make_project(tmp_path / "project", strategies=sorted(set(STRATEGIES) - {"oracle"}))
    before = select(project)
    eval_file = project.folder / "plain" / "eval.jsonl"
    write_lines(eval_file, [{**row, "answer": "x"} for row in make_rows(9, 777, "copy")])
    assert select(project) == before

    held_out = project.lake.read_table(project.selection("prism")).to_pylist()[2]
    write_lines(eval_file, [{key: held_out[key] for key in ("prompt", "completion")}])
    project.configure(selection={"budget": 7})
    after = select(project)
    for name in GRADIENT:
        assert after[name][1] == [one for one in before[name][1] if one != held_out["id"]][:7], name
    assert all(held_out["id"] not in ids for _, ids in after.values())


def wanted(prompt):
    return {"prompt": prompt, "completion": "aaaa", "rejected": "zzzz"}


@pytest.fixture(scope="module")
def planted(make_project, tmp_path_factory):
    """Pairs that want `aaaa` and reject `zzzz`; among the candidates some that say what is wanted under other prompts,
    and some that say what is rejected, under the pairs' own prompts."""
    from prism_assets.plots import canvas

    project = make_project(
        tmp_path_factory.mktemp("planted") / "project",
        strategies=GRADIENT, selection={"budget": "100%"}, features={"sketch_dim": "exact"},
    )  # fmt: skip
    prompts = [f"say: {word}=" for word in ("bcd", "efg", "hij", "klm", "nop", "qrs")]
    write_lines(project.folder / "plain" / "target.jsonl", [wanted(one) for one in prompts])
    write_lines(project.folder / "plain" / "eval.jsonl", [wanted("say: tuv=")])
    harmful = [{"prompt": one, "completion": "zzzz", "source": "harmful"} for one in prompts[:2]]
    helpful = [{"prompt": f"say: {one}=", "completion": "aaaa", "source": "helpful"} for one in ("wxy", "zab")]
    project.add("planted", [*harmful, *helpful])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        select(project)
    return project


@pytest.mark.parametrize("strategy", GRADIENT)
def test_a_planted_harmful_candidate_ranks_low_and_a_helpful_one_high(planted, strategy):
    rows = planted.selected(strategy)
    assert len(rows) == 44
    of = {source: [row for row in rows if row["source"] == source] for source in ("harmful", "helpful")}
    assert [row["rank"] for row in of["helpful"]] == [1, 2] and all(row["score"] > 0 for row in of["helpful"])
    assert [row["rank"] for row in of["harmful"]] == [43, 44] and all(row["score"] < 0 for row in of["harmful"])


@pytest.mark.parametrize(("source", "sign"), [("harmful", -1), ("helpful", 1)])
def test_a_step_on_a_planted_candidate_does_to_the_targets_what_its_score_says(planted, source, sign):
    """Measured, not predicted: the optimiser's small step on this row alone, and the targets' mean margin."""
    lake = planted.lake
    rows = lake.read_table(planted.selection("uniform"))
    row = from_table(rows.take([rows["source"].to_pylist().index(source)]))
    targets = target_set(lake.read_table(lake.require("targets", "plain", lake.heads("targets")[0]["scope"])))
    with gradient_pass(planted.stage) as work:
        checkpoint = work.checkpoints[-1]
        engine = work.at(checkpoint)
        before = np.mean(targets.scores(engine.mean_log_probs(targets.examples)))
        preconditioner = work.preconditioner(checkpoint)
        gradient = engine.weighted_gradient(row, np.ones(1)).gradient
        step = {name: preconditioner.diagonal(name) * value for name, value in gradient.items()}
        length = sum(float(value.square().sum()) for value in step.values()) ** 0.5
        moved = {name: value + 1e-3 * step[name] / length for name, value in checkpoint.lora.items()}
        engine = work.at(checkpoint._replace(lora=moved))
        change = np.mean(targets.scores(engine.mean_log_probs(targets.examples))) - before
    assert change * sign > 1e-5
