"""Influence by raw rows, from what is stored of unit rows, against gradients that are computed again."""

import numpy as np
import pytest

from prism_assets.corpus.token_tables import from_table
from prism_assets.errors import SettingsError
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.gradients.vectors import inner
from prism_assets.selection.direction_artifacts import load_direction
from prism_assets.selection.exact_scores import exact_scores
from prism_assets.selection.pool import indexed_pool
from prism_assets.settings import from_mapping


@pytest.fixture(scope="module")
def project(two_versions, tmp_path_factory):
    """Features without a sketch, at two checkpoints."""
    return two_versions.copy(tmp_path_factory.mktemp("row_scale") / "copy").configure(features={"sketch_dim": "exact"})


def scaled(project, scale):
    stage = project.stage
    return stage.with_settings(selection=stage.settings.selection.model_copy(update={"row_scale": scale}))


def by_hand(stage, direction, rows, by_sum):
    """Σ_k η̄_k ⟨t_k/‖t_k‖, D_k ∇s_i⟩ with ∇s_i from one backward pass a row, of the mean or of the sum."""
    vectors, norms = direction.vectors, direction.norms
    examples = from_table(rows)
    tokens = np.array([example.loss_mask.sum() for example in examples])
    found = np.zeros(len(examples))
    with gradient_pass(stage) as work:
        rates = np.array([one.mean_learning_rate for one in work.checkpoints])
        for k, checkpoint in enumerate(work.checkpoints):
            engine, preconditioner = work.at(checkpoint), work.preconditioner(checkpoint)
            for position, example in enumerate(examples):
                gradient = engine.weighted_gradient([example], np.ones(1)).gradient
                row = {name: tensor * preconditioner.diagonal(name) for name, tensor in gradient.items()}
                found[position] += rates[k] / rates.sum() * inner(vectors[k], row) / norms[k]
    return found * tokens if by_sum else found


@pytest.mark.parametrize("target", ["plain", "pairs"])
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_scaled_scores_are_those_of_raw_gradients(project, scale, target):
    stage = scaled(project, scale)
    pool = indexed_pool(stage)
    artifact = stage.shown("target_directions", target, "prism")
    direction = load_direction(stage.lake, artifact)
    expected = by_hand(stage, direction, pool.rows_at(np.arange(pool.size)), scale == "sum")
    spread = np.ptp(expected)
    np.testing.assert_allclose(pool.influence(direction.query), expected, atol=2e-3 * spread)  # rows are float16
    np.testing.assert_allclose(exact_scores(pool, artifact, np.arange(pool.size)), expected, atol=1e-5 * spread)
    cosines = pool.scores(direction.query)
    assert np.corrcoef(cosines, expected)[0, 1] < 0.999  # the scale matters
    unit = indexed_pool(scaled(project, "unit"))
    np.testing.assert_array_equal(unit.influence(direction.query), cosines)


@pytest.mark.parametrize("rerank", [0, 2])
def test_a_selection_by_summed_gradients_is_the_top_of_their_scores(project, tmp_path, rerank):
    one = project.copy(tmp_path / "copy")
    before = one.selected("prism")
    one.configure(selection={"row_scale": "sum", "rerank": rerank}).run(["plain"])
    stage = one.stage
    pool = indexed_pool(stage)
    direction = load_direction(stage.lake, stage.shown("target_directions", "plain", "prism"))
    expected = dict(zip(pool.ids, by_hand(stage, direction, pool.rows_at(np.arange(pool.size)), True), strict=True))
    selected = one.selected("prism")
    assert [row["id"] for row in selected] == sorted(expected, key=lambda id_: -expected[id_])[: len(selected)]
    assert [row["id"] for row in selected] != [row["id"] for row in before]
    assert one.selection("prism").header["settings"]["row_scale"] == "sum"


def test_rows_of_a_preconditioner_that_is_not_linear_have_no_length(project):
    content = {**project.content, "features": {"optimizer": "adam_step"}, "selection": {"row_scale": "sum"}}
    with pytest.raises(SettingsError, match="row_scale sum needs features.optimizer sgd or adam"):
        from_mapping(content, project.config)
