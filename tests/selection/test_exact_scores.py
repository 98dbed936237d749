"""Exact re-ranking and the curvature correction, against explicit gradients and dense linear algebra."""

import numpy as np
import pytest
import torch

from prism_assets.gradients.sketch import DirectionProducts
from prism_assets.selection.direction import curvature_coefficients


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    """Re-ranked selections from a sketch of 64 dimensions, two checkpoints. Copy it before changing it."""
    from prism_assets.plots import canvas

    made = make_project(
        tmp_path_factory.mktemp("rerank") / "project",
        warmup={"checkpoints": 2},
        features={"sketch_dim": 64},
        selection={"budget": 8, "rerank": 3},
        seeds=[0],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        made.run()
    return made


def explicit_rows(project):
    """Preconditioned per-example gradients of every candidate, by checkpoint: id -> vector [P], and mean rates [C]."""
    from prism_assets.corpus.token_tables import from_table
    from prism_assets.features.gradient_pass import gradient_pass

    lake = project.lake
    tables = [lake.get("candidates", head["fingerprint"]) for head in lake.heads("candidates")]
    found, rates = [], []
    with gradient_pass(project.stage) as work:
        for checkpoint in work.checkpoints:
            engine, preconditioner = work.at(checkpoint), work.preconditioner(checkpoint)
            rows = {}
            for artifact in tables:
                table = lake.read_table(artifact)
                ids = table["id"].to_pylist()
                for positions, gradients in engine.per_example_gradients(from_table(table)):
                    for at, position in enumerate(positions):
                        one = {name: value[at] * preconditioner.diagonal(name) for name, value in gradients.items()}
                        rows[ids[position]] = {name: value.double() for name, value in one.items()}
            found.append(rows)
            rates.append(checkpoint.mean_learning_rate)
    return found, np.array(rates) / sum(rates)


def inner(left, right):
    return sum(float((left[name].double() * right[name].double()).sum()) for name in left)


@pytest.mark.parametrize("strategy", ["prism", "uniform"])
def test_selected_scores_are_exact_and_in_order(project, strategy):
    from prism_assets.selection.direction_artifacts import load_direction
    from prism_assets.selection.query import query_index

    rows, rates = explicit_rows(project)
    direction = project.lake.get(
        "target_directions", project.selection(strategy).header["inputs"]["direction"]["fingerprint"]
    )
    vectors = load_direction(project.lake, direction).vectors

    def exact(name):
        return sum(
            rate * inner(vector, one[name]) / (inner(vector, vector) * inner(one[name], one[name])) ** 0.5
            for rate, vector, one in zip(rates, vectors, rows, strict=True)
        )

    selected = project.selected(strategy)
    assert project.selection(strategy).notes["shortlist"] >= 24
    scores = [row["score"] for row in selected]
    np.testing.assert_allclose(scores, [exact(row["id"]) for row in selected], atol=2e-6)
    assert scores == sorted(scores, reverse=True)
    # They are the best of the 24 that the sketch puts first.
    shortlist = query_index(project.stage, target="plain", strategy=strategy, k=24)
    best = sorted((row["id"] for row in shortlist), key=exact, reverse=True)[:8]
    assert [row["id"] for row in selected] == best


def test_a_shortlist_of_the_whole_pool_is_the_exact_ranking(project, tmp_path):
    whole = project.copy(tmp_path / "whole").configure(selection={"rerank": 100})
    whole.run()
    exact = project.copy(tmp_path / "exact").configure(features={"sketch_dim": "exact"}, selection={"rerank": 0})
    exact.run()
    found, expected = whole.selected("prism"), exact.selected("prism")
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in expected], atol=1e-3)


def test_reranked_selections_do_not_depend_on_the_order_of_arrival(project, tmp_path, make_project):
    from conftest import make_rows

    late = project.copy(tmp_path / "late")
    late.add("shard2", make_rows(20, 12))
    late.run()
    at_once = make_project(
        tmp_path / "at_once", warmup={"checkpoints": 2}, features={"sketch_dim": 64},
        selection={"budget": 8, "rerank": 3}, seeds=[0],
    )  # fmt: skip
    at_once.run()  # the same warm-up: it is drawn from the first two shards
    at_once.add("shard2", make_rows(20, 12))
    for path in (at_once.settings.storage.root / "cache" / "scores").rglob("*"):
        if path.is_file():
            path.unlink()
    at_once.run()
    for strategy in ("prism", "uniform", "less"):
        assert late.selection(strategy).content_hash == at_once.selection(strategy).content_hash


def test_an_exact_score_is_computed_once(project, tmp_path, monkeypatch):
    from prism_assets.selection import exact_scores

    copy = project.copy(tmp_path / "copy").configure(selection={"budget": 6})
    asked = []
    monkeypatch.setattr(exact_scores, "gradient_pass", lambda *arguments: asked.append(arguments))
    copy.run()
    assert not asked and len(copy.selected("prism")) == 6


def test_direction_products_are_inner_products():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    directions = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]
    gradients = {name: torch.randn(6, *shape, generator=generator) for name, shape in shapes.items()}
    products = DirectionProducts([directions[0], {"b": directions[1]["b"]}], torch.device("cpu"), torch.float64)
    out = torch.zeros(6, 2, dtype=torch.float64)
    for name, value in gradients.items():
        products.add_(out, name, value.double())
    for row in range(6):
        expected = inner(directions[0], {name: value[row] for name, value in gradients.items()})
        assert out[row, 0].item() == pytest.approx(expected, rel=1e-6)
        assert out[row, 1].item() == pytest.approx(float(directions[1]["b"] @ gradients["b"][row]), rel=1e-5)


# -- curvature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_coefficients_give_the_damped_inverse(damping):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 40))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    target = rng.normal(size=40)
    fisher = rows.T @ rows / 12
    expected = np.linalg.solve(fisher + damping * np.trace(fisher) * np.eye(40), target)
    found = target - rows.T @ curvature_coefficients(rows, rows @ target, damping)
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine == pytest.approx(1, abs=1e-9)


def test_a_corrected_direction_is_the_damped_inverse_of_explicit_gradients(project, tmp_path):
    from prism_assets.selection.direction_artifacts import load_direction

    copy = project.copy(tmp_path / "fisher").configure(
        features={"sketch_dim": "exact"}, curvature={"kind": "fisher", "damping": 0.002}, selection={"rerank": 0}
    )
    copy.run()
    plain = project.copy(tmp_path / "plain").configure(features={"sketch_dim": "exact"}, selection={"rerank": 0})
    plain.run()
    rows, _ = explicit_rows(copy)
    sample = copy.lake.read_table(copy.stage.shown("warmup_sample"))["id"].to_pylist()

    def direction(one):
        inputs = one.selection("prism").header["inputs"]["direction"]
        return load_direction(one.lake, one.lake.get("target_directions", inputs["fingerprint"])).vectors

    for found, raw, by_id in zip(direction(copy), direction(plain), rows, strict=True):
        names = sorted(raw)
        flat = lambda vector, names=names: torch.cat([vector[name].double().flatten() for name in names]).numpy()  # noqa: E731
        unit = np.stack([flat(by_id[one]) for one in sample])
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        damped = unit.T @ unit / len(unit) + 0.002 * np.eye(unit.shape[1])
        # λ (F + λI)⁻¹ t = t − correction: the correction alone is compared, the rest is t itself.
        expected = flat(raw) - 0.002 * np.linalg.solve(damped, flat(raw))
        assert np.linalg.norm(flat(raw) - flat(found) - expected) < 0.01 * np.linalg.norm(expected)


def test_a_correction_for_an_optimiser_without_a_diagonal_is_refused(project, tmp_path):
    from prism_assets.errors import SettingsError

    copy = project.copy(tmp_path / "copy").configure(
        features={"optimizer": "adam_step"}, curvature={"kind": "fisher", "damping": 0.1}
    )
    with pytest.raises(SettingsError, match="curvature.kind fisher needs features.optimizer sgd or adam"):
        copy.settings  # noqa: B018


# -- sums of log-probabilities -----------------------------------------------------------------------------------


def test_summed_scores_weigh_targets_by_their_whole_probability(project, tmp_path):
    copy = project.copy(tmp_path / "sum").configure(preference={"score": "sum", "temperature": 5.0})
    copy.run()
    lake = copy.lake
    features = next(lake.get("target_features", one["fingerprint"]) for one in lake.heads("target_features"))
    targets = next(lake.get("targets", one["fingerprint"]) for one in lake.heads("targets"))
    means = np.array([one[-1] for one in lake.read_table(features)["score"].to_pylist()])
    tokens = np.array([sum(mask) for mask in lake.read_table(targets)["loss_mask"].to_pylist()])
    expected = np.exp(means * tokens / 5)
    weights = lake.read_table(
        next(lake.get("target_weights", one["fingerprint"]) for one in lake.heads("target_weights"))
    )
    np.testing.assert_allclose(weights["prism"].to_numpy(), expected / expected.sum(), rtol=1e-6)


def test_an_explanation_of_a_corrected_or_summed_score_still_adds_up(project, tmp_path):
    from prism_assets.explanation.explainer import Explainer

    corrected = {"curvature": {"kind": "fisher", "damping": 0.002}}
    for number, sections in enumerate((corrected, {"preference": {"score": "sum", "temperature": 5.0}})):
        copy = project.copy(tmp_path / str(number)).configure(**sections, selection={"rerank": 0})
        copy.run()
        top = copy.selected("prism")[0]
        with Explainer(copy.stage, target="plain") as explainer:
            found = explainer.explain(top["id"])
        assert found.score == pytest.approx(top["score"], abs=1e-6)
        assert (found.curvature is not None) == ("curvature" in sections) and abs(found.rounding) < 1e-5
        *parts, total = (row[3] for row in found.score_rows())
        assert sum(parts) == pytest.approx(total, abs=1e-6) and total == pytest.approx(found.exact_score)
