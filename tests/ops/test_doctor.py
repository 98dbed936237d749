"""`prism doctor` on selections: what of today's inputs and settings a selection does not show, and which one it is."""

import pytest

from prism_assets.ops.doctor import examine

STRATEGIES = ["prism", "prism-cover", "uniform", "random"]


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("doctor") / "project", strategies=STRATEGIES, seeds=[0])
    project.run()
    return project


@pytest.fixture
def project(finished, tmp_path):
    return finished.copy(tmp_path / "project")


def found(project) -> dict[str, str]:
    return {one.what: one.found for one in examine(project.stage)}


def test_a_finished_project_is_up_to_date(finished):
    assert found(finished)["selection"] == "up to date"


@pytest.mark.parametrize(
    ("changes", "strategies", "why"),
    [
        ({"selection": {"budget": 5}}, STRATEGIES, "other selection.budget"),
        ({"selection": {"seed": 7}}, ["random"], "other selection.seed"),
        ({"selection": {"rerank": 2.0}}, ["prism", "uniform"], "other selection.rerank)"),
        (
            {"preference": {"temperature": 3.0}},
            ["prism", "prism-cover"],
            "other preference.temperature or preference.score",
        ),
        (
            {"preference": {"score": "sum"}},
            ["prism", "prism-cover", "uniform"],
            "other preference.temperature or preference.score",
        ),
        ({"curvature": {"kind": "fisher", "damping": 0.1}}, ["prism", "uniform"], "has no warmup_sample_features yet"),
        ({"lora": {"rank": 3}}, None, "no warm-up for these settings yet"),
    ],
    ids=lambda value: (
        next(iter(value)) + "-" + next(iter(next(iter(value.values())))) if isinstance(value, dict) else ""
    ),
)
def test_a_changed_setting_is_named_for_the_strategies_that_it_moves(project, changes, strategies, why):
    project.configure(**changes)
    findings = found(project)
    if strategies is None:
        assert why in findings["stale"]
        return
    assert findings["selection"].startswith(f"{len(strategies)} of {len(STRATEGIES)} ")
    for name in STRATEGIES:
        assert (f"plain/{name}: " in findings["selection"]) == (name in strategies)
    assert why in findings["selection"]
    project.run()
    assert found(project)["selection"] == "up to date"


def test_an_arrival_is_seen_once_the_index_shows_it(project):
    from conftest import make_rows

    project.add("late", make_rows(5, seed=99))
    assert found(project)["selection"] == "up to date"  # of the pool that is indexed; what is not yet has its own lines
    assert found(project)["candidates"].startswith("1 of 3")
    project.run()
    assert found(project)["selection"] == "up to date"


def test_targets_that_changed_are_seen_through_the_direction(project):
    from conftest import make_rows, write_lines

    write_lines(project.folder / "plain" / "target.jsonl", make_rows(4, 300, "reverse"))
    from prism_assets.ops.pipeline import steps_of

    steps = [step for step in steps_of("run") if step.title in ("Base model", "Candidates", "Targets")]
    project.run_steps(steps)
    assert "plain/prism: target_anchors of plain are those of earlier target files" in found(project)["selection"]
    assert "plain/prism-cover: target_anchors of plain are those of earlier" in found(project)["selection"]


def test_a_selection_that_is_missing_is_said_to_be(project):
    project.configure(strategies=["prism", "less"])
    assert "plain/less: not made yet" in found(project)["selection"]
