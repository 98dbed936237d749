"""Curvature on the target side, against dense linear algebra on explicit gradients."""

import numpy as np
import pytest
import torch

from prism_assets.corpus.token_tables import from_table
from prism_assets.errors import SettingsError
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.ops.pipeline import steps_of
from prism_assets.selection.curvature import chosen_damping, datainf_inverse
from prism_assets.selection.direction_artifacts import load_direction


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


# -- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.01, 0.1, 10.0])
def test_datainf_is_the_mean_of_dense_inverses_layer_by_layer(damping):
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3), "b": (4,)}
    rows = {name: rng.normal(size=(7, *shape)) for name, shape in shapes.items()}
    vector = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}

    def batches():
        for start in (0, 3, 6):  # the last batch has one row
            yield {name: torch.from_numpy(value[start : start + 3]) for name, value in rows.items()}

    found, opposite = datainf_inverse([vector, {name: -one for name, one in vector.items()}], batches, 7, damping)
    for name, shape in shapes.items():
        flat, target = rows[name].reshape(7, -1), vector[name].numpy().ravel()
        lam = damping * (flat**2).mean()
        inverses = [np.linalg.inv(np.outer(one, one) + lam * np.eye(flat.shape[1])) for one in flat]
        np.testing.assert_allclose(found[name].numpy().ravel(), np.mean(inverses, axis=0) @ target, rtol=1e-9)
        assert found[name].shape == shape
        assert torch.equal(found[name], -opposite[name])


def test_a_layer_without_gradients_is_left_out():
    zeros = {"a": torch.zeros(3, 2), "b": torch.ones(3, 2)}
    (found,) = datainf_inverse([{"a": torch.ones(2), "b": torch.ones(2)}], lambda: iter([zeros]), 3, 0.1)
    assert found["a"].tolist() == [0, 0] and torch.isfinite(found["b"]).all()


def dense_quality(own, other, target, damping):
    """(tᵀx)²/(xᵀFx) with x = (F_A + λI)⁻¹ t, everything dense."""
    x = target
    if np.isfinite(damping):
        x = np.linalg.solve(own.T @ own / len(own) + damping * np.eye(len(target)), target)
    return np.log((target @ x) ** 2 / (x @ (other.T @ other / len(other)) @ x))


@pytest.mark.parametrize("noise", [0.05, 1.0, 30.0])
def test_the_damping_is_the_one_that_serves_the_other_half_best(noise):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(24, 3)) @ rng.normal(size=(3, 30)) + noise * rng.normal(size=(24, 30))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    target = rng.normal(size=30)
    grid = (1e-4, 1e-2, 1.0, float("inf"))
    expected = {
        damping: sum(dense_quality(*halves, target, damping) for halves in
                     ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])))
        for damping in grid
    }  # fmt: skip
    assert chosen_damping(rows, target, grid) == max(expected, key=expected.get)


def test_strong_curvature_in_common_asks_for_little_damping_and_noise_for_much():
    rng = np.random.default_rng(4)
    common = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 50))
    common /= np.linalg.norm(common, axis=1, keepdims=True)
    target = rng.normal(size=50)
    noise = rng.normal(size=(40, 50))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert chosen_damping(common, target) < chosen_damping(noise, target)
    assert chosen_damping(common[:1], target) == float("inf")


# -- in a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(
        tmp_path_factory.mktemp("curvature") / "project",
        strategies=["prism"],
        seeds=[0],
        features={"sketch_dim": "exact", "optimizer": "sgd"},
        warmup={"checkpoints": 2},
    )
    upto_directions(project)
    return project


def upto_directions(project):
    steps = steps_of("run")
    return project.run_steps(steps[: [step.title for step in steps].index("Target directions") + 1])


def vectors_of(project):
    artifact = project.stage.shown("target_directions", "plain", "prism")
    return artifact, load_direction(project.lake, artifact).vectors


def flat(vector):
    return torch.cat([vector[name].double().flatten() for name in sorted(vector)]).numpy()


def test_datainf_in_a_run_is_that_of_explicit_gradients(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "datainf"})
    upto_directions(one)
    artifact, corrected = vectors_of(one)
    assert artifact.notes["dampings"] == [0.1, 0.1]
    stage = one.stage
    sample = from_table(stage.lake.read_table(stage.shown("warmup_sample")))
    _, raw = vectors_of(project)
    with gradient_pass(stage) as work:
        for k, checkpoint in enumerate(work.checkpoints):
            engine = work.at(checkpoint)
            rows = [engine.weighted_gradient([example], np.ones(1)).gradient for example in sample]
            expected = {}
            for name, tensor in raw[k].items():
                layer = np.stack([row[name].double().numpy().ravel() for row in rows])
                lam = 0.1 * (layer**2).mean()
                target = tensor.double().numpy().ravel()
                # (g gᵀ + λI)⁻¹ t by a dense solve for each row.
                solved = [np.linalg.solve(np.outer(g, g) + lam * np.eye(len(g)), target) for g in layer]
                expected[name] = torch.from_numpy(np.mean(solved, axis=0)).view(tensor.shape)
            assert cosine(flat(corrected[k]), flat(expected)) > 1 - 1e-6
            assert cosine(flat(corrected[k]), flat(raw[k])) < 0.99


def test_adams_diagonal_on_the_target_side(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "adam"})
    upto_directions(one)
    _, raw = vectors_of(project)
    _, corrected = vectors_of(one)
    with gradient_pass(one.stage) as work:
        for k, checkpoint in enumerate(work.checkpoints):
            moments = checkpoint.exp_avg_sq
            expected = {
                name: tensor / ((moments[name] / (1 - checkpoint.betas[1] ** checkpoint.optimizer_step)).sqrt()
                                + checkpoint.eps)
                for name, tensor in raw[k].items()
            }  # fmt: skip
            assert cosine(flat(corrected[k]), flat(expected)) > 1 - 1e-9


def test_the_chosen_damping_is_noted_and_the_run_finds_its_results_again(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "fisher"})
    upto_directions(one)
    artifact, _ = vectors_of(one)
    assert len(artifact.notes["dampings"]) == 2
    assert artifact.header["settings"]["curvature"] == {"kind": "fisher", "damping": "auto"}
    assert all(result.computed == 0 for result in upto_directions(one))


def test_adam_does_not_count_twice(project, tmp_path):
    copy = project.copy(tmp_path / "copy").configure(features={"optimizer": "adam"}, curvature={"kind": "adam"})
    with pytest.raises(SettingsError, match="it would count twice"):
        copy.settings  # noqa: B018
