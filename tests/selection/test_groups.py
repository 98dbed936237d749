"""A direction a group, brought to unit length and added, against the groups' directions one by one."""

import numpy as np
import pytest

from conftest import make_rows, write_lines
from prism_assets.corpus.target_set import target_set
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.gradients.vectors import inner, norm
from prism_assets.ops.pipeline import steps_of
from prism_assets.selection.direction import target_vector
from prism_assets.selection.direction_artifacts import load_direction
from prism_assets.selection.preference import preference_weights

GROUPS = ["b", "a", None, "a", "b", "a"]


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(
        tmp_path_factory.mktemp("groups") / "project",
        strategies=["prism", "less"],
        seeds=[0],
        warmup={"checkpoints": 2},
        features={"sketch_dim": "exact"},
    )
    rows = make_rows(6, 300, "reverse")
    write_lines(
        project.folder / "plain" / "target.jsonl",
        [{**row, "rejected": row["completion"] + "x", "group": group} for row, group in zip(rows, GROUPS, strict=True)],
    )
    upto_directions(project)
    return project


def upto_directions(project):
    steps = steps_of("run")
    project.run_steps(steps[: [step.title for step in steps].index("Target directions") + 1])


def direction_of(project, strategy="prism"):
    return load_direction(project.lake, project.stage.shown("target_directions", "plain", strategy))


def gradients_and_margins(work, checkpoint, table):
    """The margin's gradient and the margin of each pair."""
    engine, targets = work.at(checkpoint), target_set(table)
    gradients = [target_vector(engine, targets.target(j), np.ones(1)) for j in range(targets.size)]
    return gradients, targets.scores(engine.mean_log_probs(targets.examples))


def added(gradients, weights):
    return {name: sum(w * one[name] for w, one in zip(weights, gradients, strict=True)) for name in gradients[0]}


def distance(left, right):
    return norm({name: left[name] - right[name] for name in left}) / norm(right)


def test_a_direction_is_the_sum_of_its_groups_unit_directions(project):
    stage, found = project.stage, direction_of(project)
    table = stage.lake.read_table(stage.shown("targets", "plain"))
    members = [np.flatnonzero([one == group for one in GROUPS]) for group in (None, "a", "b")]
    with gradient_pass(stage) as work:
        for k, checkpoint in enumerate(work.checkpoints):
            gradients, margins = gradients_and_margins(work, checkpoint, table)
            weights = preference_weights(margins, "pairs").weights
            parts = [added([gradients[j] for j in rows], weights[rows]) for rows in members]
            expected = added(parts, [1 / norm(part) for part in parts])
            assert distance(found.vectors[k], expected) < 1e-5
            # Each group's direction has the same part in the sum.
            shares = [inner(part, part) ** 0.5 * found.weights[k][rows[0]] / weights[rows[0]]
                      for part, rows in zip(parts, members, strict=True)]  # fmt: skip
            np.testing.assert_allclose(shares, 1, rtol=1e-5)
            assert distance(added(gradients, found.weights[k]), expected) < 1e-5
            assert distance(added(gradients, weights), expected) > 0.01


def test_pooled_groups_make_the_published_direction(project, tmp_path):
    one = project.copy(tmp_path / "copy")
    before = one.stage.shown("target_directions", "plain", "prism")
    one.configure(preference={"groups": "pooled"})
    upto_directions(one)
    stage, found = one.stage, direction_of(one)
    artifact = stage.shown("target_directions", "plain", "prism")
    assert before.header["settings"]["groups"] == "separate" and "groups" not in artifact.header["settings"]
    with gradient_pass(stage) as work:
        gradients, margins = gradients_and_margins(
            work, work.checkpoints[-1], stage.lake.read_table(stage.shown("targets", "plain"))
        )
    pi = 1 / (1 + np.exp(-margins))
    assert distance(found.vectors[-1], added(gradients, pi / pi.sum())) < 1e-5


def test_one_group_changes_nothing(project, tmp_path):
    one = project.copy(tmp_path / "copy")
    rows = make_rows(4, 300, "reverse")
    hashes = []
    for group in ("only", None):
        write_lines(one.folder / "plain" / "target.jsonl", [{**row, "group": group} for row in rows])
        upto_directions(one)
        hashes.append(one.stage.shown("target_directions", "plain", "less").content_hash)
    assert hashes[0] == hashes[1]
