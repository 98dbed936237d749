"""Why a candidate stands where it stands: parts that sum to the score, ranks, neighbours, earlier versions."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import make_rows
from prism_assets.errors import CannotExplain, LakeError
from prism_assets.explanation.explainer import Explainer
from prism_assets.explanation.parts import rank_of, target_contributions
from prism_assets.features.blocks import read_blocks, vectors_of
from prism_assets.ops.gc import feature_versions
from prism_assets.ops.pipeline import steps_of

# -- the formulas ------------------------------------------------------------------------------------------------


def test_contributions_are_the_score_of_the_weighted_direction():
    generator = np.random.default_rng(0)
    m, c, k = 5, 3, 40
    sketches = generator.normal(size=(m, c, k)).astype(np.float32)
    weights, row = generator.dirichlet(np.ones(m), size=c), generator.normal(size=(c, k)).astype(np.float16)
    norms, rates = generator.uniform(1, 2, c), [3.0, 2.0, 1.0]
    found = target_contributions(sketches, weights, row, norms, rates)
    score = 0.0
    by_target = np.zeros(m)
    for checkpoint in range(c):
        for j in range(m):
            part = weights[checkpoint, j] * float(sketches[j, checkpoint].astype(float) @ row[checkpoint].astype(float))
            by_target[j] += rates[checkpoint] / 6 * part / norms[checkpoint]
        direction = weights[checkpoint] @ sketches[:, checkpoint].astype(float)
        score += rates[checkpoint] / 6 * direction @ row[checkpoint].astype(float) / norms[checkpoint]
    np.testing.assert_allclose(found.values, by_target, rtol=1e-10)
    assert np.isclose(found.values.sum(), score)
    np.testing.assert_allclose(found.weights * found.influences, found.values)
    np.testing.assert_allclose(found.weights, (np.array(rates) / 6) @ weights)


def test_a_target_without_weight_has_an_influence_but_adds_nothing():
    sketches = np.ones((2, 1, 4), np.float32)
    found = target_contributions(sketches, np.array([[1.0, 0.0]]), np.full((1, 4), 0.5, np.float16), [2.0], [1.0])
    assert found.values.tolist() == [1.0, 0.0]
    assert found.influences.tolist() == [1.0, 1.0]


def test_ranks_are_those_of_a_sort_with_ties_by_name():
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 6, 50).astype(np.float32)
    names = np.array([f"{value:04x}" for value in generator.permutation(50)], dtype=object)
    order = sorted(range(50), key=lambda i: (-scores[i], names[i]))
    for rank, position in enumerate(order, start=1):
        assert rank_of(scores[position], names[position], scores, names) == rank


# -- a finished project ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explainer(two_versions):
    """`explainer(target, strategy)` explains sketched scores, without a model."""
    opened = {}

    def get(target="plain", strategy="prism"):
        if (target, strategy) not in opened:
            opened[target, strategy] = open_explainer(two_versions, target=target, strategy=strategy, exact=False)
        return opened[target, strategy]

    return get


def open_explainer(project, **options):
    return Explainer(project.stage, **{"target": "plain", **options})


def direction_of(lake, version, target, strategy):
    tensors = lake.read_tensors(lake.head("target_directions", target, f"{version}/{strategy}"))
    return tensors["query"].numpy().astype(np.float64)


def rows_of(lake, version):
    """Ids and vectors [n, d] of the canonical rows of a version, read from the feature blocks."""
    index = lake.head("candidate_index", None, version)
    pool = lake.get("live_pool", index.notes["pool"])
    excluded = {row["shard"]: set(row["excluded_rows"]) for row in lake.read_table(pool).to_pylist()}
    ids, vectors = [], []
    for one in lake.read_table(index).to_pylist():
        table = read_blocks(lake, lake.get("candidate_features", one["features"]), ["id", "vector"])
        kept = [position for position in range(table.num_rows) if position not in excluded[one["shard"]]]
        ids += table["id"].take(kept).to_pylist()
        vectors.append(vectors_of(table)[kept].astype(np.float64))
    return ids, np.concatenate(vectors)


@pytest.mark.parametrize("target", ["plain", "pairs"])
@pytest.mark.parametrize("strategy", ["prism", "uniform", "less"])
def test_the_parts_sum_to_the_stored_score(two_versions, explainer, target, strategy):
    lake = two_versions.lake
    version = feature_versions(lake)[0].name
    ids, vectors = rows_of(lake, version)
    scores = vectors @ direction_of(lake, version, target, strategy)
    for position in (0, 17):
        found = explainer(target, strategy).explain(ids[position])
        assert found.score == pytest.approx(scores[position], abs=1e-5)
        assert sum(part.contribution for part in found.parts) == pytest.approx(scores[position], abs=1e-5)
        assert found.exact_score is None and abs(found.rounding) < 1e-5
        assert len(found.parts) == (6 if target == "plain" else 4)
        rows = found.score_rows()
        assert sum(row[3] for row in rows[:-1]) == pytest.approx(rows[-1][3], abs=1e-12) and rows[-1][3] == found.score
        assert rows[-1][0] == "score"
        for part in found.parts:
            assert part.weight * part.influence == pytest.approx(part.contribution, abs=1e-12)


@pytest.mark.parametrize("target", ["plain", "pairs"])
def test_the_exact_score_is_that_of_the_version_without_a_sketch(two_versions, target):
    lake = two_versions.lake
    current, exact = (one.name for one in feature_versions(lake))
    ids, vectors = rows_of(lake, exact)
    expected = vectors @ direction_of(lake, exact, target, "prism")
    with open_explainer(two_versions, target=target) as explainer:
        explained = {position: explainer.explain(ids[position]) for position in range(0, 38, 9)}
    errors = []
    for position, found in explained.items():
        assert found.exact_score == pytest.approx(expected[position], abs=2e-3)
        total = sum(part.contribution for part in found.parts) + found.sketch_error
        assert total == pytest.approx(found.exact_score, abs=1e-9)
        rows = found.score_rows()
        assert rows[-1] == ("exact score", None, None, found.exact_score)
        assert sum(row[3] for row in rows[:-1]) == pytest.approx(found.exact_score, abs=1e-9)
        ranked = next(one for one in found.ranks if one.strategy == "prism")
        assert found.score == ranked.score  # one word, one number: the score is what ranks
        errors.append(abs(found.sketch_error))
    assert max(errors) > 0.02  # a sketch of 64 dimensions is a rough one: the exact score is not the sketched one


def test_the_weights_are_the_published_ones(two_versions, explainer):
    lake = two_versions.lake
    version = feature_versions(lake)[0].name
    features = lake.read_table(lake.head("target_features", "plain", version)).to_pylist()
    # Two checkpoints: softmax of the scores at each, mixed by the learning rates that led there.
    warmup = next(iter(lake.artifacts("warmup_checkpoints")))
    rates = [one["mean_learning_rate"] for one in json.loads(lake.local(warmup, "checkpoints.json").read_text())]
    weights = np.exp(np.array([row["score"] for row in features]))
    weights = (weights / weights.sum(axis=0)) @ (np.array(rates) / sum(rates))
    found = {part.id: part.weight for part in explainer().explain("it's-0").parts}
    assert len(rates) == 2 and found == pytest.approx({row["id"]: w for row, w in zip(features, weights, strict=True)})


def test_ranks_are_those_of_the_whole_ranking(two_versions, explainer):
    lake = two_versions.lake
    version = feature_versions(lake)[0].name
    ids, vectors = rows_of(lake, version)
    for position in (3, 20, 37):
        found = {one.strategy: one for one in explainer().explain(ids[position]).ranks}
        assert set(found) == {"prism", "uniform", "less", "random"}
        for strategy in ("prism", "uniform", "less"):
            scores = (vectors @ direction_of(lake, version, "plain", strategy)).astype(np.float32)
            order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))
            assert (found[strategy].rank, found[strategy].of) == (order.index(position) + 1, len(ids))
            assert found[strategy].selected is (found[strategy].rank <= 8)
        assert found["random"].score is None and found["random"].of == len(ids)


def test_the_selected_rows_have_the_ranks_of_the_selection(two_versions, explainer):
    for strategy in ("prism", "random"):
        for row in two_versions.selected(strategy)[::3]:
            ranks = {one.strategy: one for one in explainer().explain(row["id"]).ranks}
            assert (ranks[strategy].rank, ranks[strategy].selected) == (row["rank"], True)


def test_neighbours_are_the_rows_of_largest_inner_product(two_versions, explainer):
    lake = two_versions.lake
    ids, vectors = rows_of(lake, feature_versions(lake)[0].name)
    for position in (5, 30):
        likeness = vectors @ vectors[position] / 2  # two checkpoints
        likeness[position] = -np.inf
        expected = np.argsort(-likeness)[:4]
        found = explainer().explain(ids[position], neighbours=4).neighbours
        assert [one.id for one in found] == [ids[i] for i in expected]
        assert [one.similarity for one in found] == pytest.approx(likeness[expected], abs=1e-5)
        assert all(one.prompt and one.completion for one in found)
    assert explainer().explain(ids[5], neighbours=0).neighbours == []


def test_the_rank_in_the_earlier_version_is_told(two_versions, explainer):
    lake = two_versions.lake
    current, old = (one.name for one in feature_versions(lake))
    ids, vectors = rows_of(lake, old)
    scores = vectors @ direction_of(lake, old, "plain", "prism")
    [earlier] = explainer().explain(ids[11]).earlier
    assert (earlier.version, earlier.of, earlier.note) == (old, len(ids), "")
    assert earlier.rank == 1 + int((scores > scores[11]).sum())
    assert earlier.score == pytest.approx(scores[11], abs=1e-5)


def test_a_candidate_is_found_by_id_prefix_and_record_id(explainer):
    by_record = explainer().explain("it's-7")
    assert by_record.record_id == "it's-7" and by_record.line == 8
    for name in (by_record.id, by_record.id[:8], by_record.id[:8].upper()):
        assert explainer().explain(name).id == by_record.id


def test_a_copy_counts_once_and_says_where_the_other_is(explainer, monkeypatch):
    by_record = explainer().explain("it's-3")
    by_id = explainer().explain(by_record.id)
    for found in (by_record, by_id):
        assert found.shard.startswith("shard0-") and found.row == 3
        assert len(found.notes) == 1 and "shard1-" in found.notes[0]
    # Named by what only the copy is called.
    named = [p._replace(record_id="copy") if p.excluded == "duplicate" else p for p in explainer().places.all]
    monkeypatch.setattr(explainer().places, "all", named)
    assert explainer().explain("copy").shard.startswith("shard0-")


def test_contamination_is_explained(two_versions, explainer):
    lake = two_versions.lake
    pool = lake.head("live_pool", None, lake.heads("live_pool")[0]["scope"])
    manifest = next(row for row in lake.read_table(pool).to_pylist() if "contamination" in row["excluded_reasons"])
    position = manifest["excluded_rows"][manifest["excluded_reasons"].index("contamination")]
    rows = lake.read_table(lake.get("candidates", manifest["candidates_fingerprint"]), ["id"])
    with pytest.raises(CannotExplain, match=r"held-out record of plain \(line 5\).*contamination"):
        explainer().explain(rows["id"][position].as_py())


def test_an_unknown_candidate_is_refused_with_near_ones(explainer):
    with pytest.raises(CannotExplain, match="it's-1"):
        explainer().explain("its-1")
    with pytest.raises(CannotExplain, match="at least 4"):
        explainer().explain("abc")


def test_a_record_id_of_two_candidates_is_ambiguous(explainer, monkeypatch):
    instance = explainer()
    twins = [place._replace(record_id="twin") for place in instance.places.all[:2]]
    monkeypatch.setattr(instance.places, "all", [*twins, *instance.places.all[2:]])
    with pytest.raises(CannotExplain, match="any of these 2") as error:
        instance.explain("twin")
    assert all(place.id in str(error.value) for place in twins)


def test_strategies_without_scores_and_unknown_ones_are_refused(two_versions):
    for name in ("random", "full", "nonsense"):
        with pytest.raises(CannotExplain, match="prism, uniform, less"):
            open_explainer(two_versions, strategy=name)


def test_a_refused_gradient_is_explained_with_its_reason(explainer, monkeypatch):
    instance = explainer()
    stored = instance._stored_row
    monkeypatch.setattr(instance, "_stored_row", lambda place: {**stored(place), "refused": "gradient norm is nan"})
    with pytest.raises(CannotExplain, match="gradient norm is nan"):
        instance.explain("it's-7")


def test_without_the_model_the_sketched_score_is_explained(two_versions, tmp_path):
    project = two_versions.copy(tmp_path / "copy")
    for path in (project.folder / "model").glob("*.safetensors"):
        path.unlink()
    with open_explainer(project) as explainer:
        found = explainer.explain("it's-7")
    assert found.exact_score is None and "model" in found.why_not_exact
    assert found.score_rows()[-1] == ("score", None, None, found.score)
    from prism_assets.errors import ModelError

    with pytest.raises(ModelError):
        open_explainer(project, exact=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adam_step", "adam_less"])
def test_the_exact_score_holds_for_every_preconditioner(make_project, tmp_path, optimizer):
    # Without a sketch what is stored is exact but for half precision.
    features = {"sketch_dim": "exact", "optimizer": optimizer}
    project = make_project(tmp_path / "project", features=features, strategies=["prism"], warmup={"checkpoints": 2})
    project.run_steps(steps_of("run")[:7])
    with open_explainer(project) as explainer:
        for name in [place.id for place in explainer.places.all if place.excluded is None][::15]:
            found = explainer.explain(name)
            assert found.exact_score == pytest.approx(found.score, abs=2e-3)


def test_in_a_selection_that_was_ranked_again_the_exact_rank_is_shown(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["prism", "random"], selection={"rerank": 2.0})
    project.run_steps(steps_of("run")[:7])
    selection = next(step for step in steps_of("run") if "selection" in step.assets)._replace(assets=("selection",))
    project.run_steps([selection])
    rows = {row["id"]: row for row in project.selected("prism")}
    by_sketch = {}
    with open_explainer(project) as explainer:
        for name in [place.id for place in explainer.places.all if place.excluded is None]:
            found = explainer.explain(name)
            shown = next(one for one in found.ranks if one.strategy == "prism")
            assert found.reranked and shown.selected == (name in rows)
            if name in rows:
                assert shown.by == "exact" and shown.rank == rows[name]["rank"]
                assert shown.score == rows[name]["score"] == pytest.approx(found.exact_score, abs=1e-5)
            else:
                assert shown.by == "sketch" and shown.score == found.score
                by_sketch[name] = shown.rank
            # Another strategy without a re-ranked selection is ranked by the sketch as ever.
            assert next(one for one in found.ranks if one.strategy == "uniform").by == "sketch"
            assert next(one for one in found.ranks if one.strategy == "random").by is None
    assert len(rows) == 8 and min(by_sketch.values()) <= 8  # re-ranking has changed what is selected


def test_a_new_version_without_an_index_says_to_run(two_versions, tmp_path):
    project = two_versions.copy(tmp_path / "copy")
    project.configure(features={"sketch_dim": 32})
    with pytest.raises(LakeError, match="prism run"):
        open_explainer(project)


def test_a_candidate_of_a_shard_outside_the_pool_is_named(two_versions, tmp_path):
    project = two_versions.copy(tmp_path / "copy")
    lake = project.lake
    with open_explainer(project, exact=False) as explainer:
        rows = explainer.places.all
        head = next(h for h in lake.heads("candidates") if h["partition"].startswith("shard1"))
        lake.point(lake.get("candidates", head["fingerprint"]), "shard9-000000000000", head["scope"])
        name = next(p.id for p in rows if p.shard.startswith("shard1") and p.excluded is None)
        explainer.places.all = [place for place in rows if place.shard != head["partition"]]
        with pytest.raises(CannotExplain, match="shard9-000000000000.*not in the live pool"):
            explainer.explain(name)


def test_the_command_prints_a_table_and_json(two_versions):
    from prism_assets.cli import app

    def prism(*arguments):
        return CliRunner().invoke(app, ["explain", *arguments, "--config", str(two_versions.config)])

    shown = prism("it's-7", "--target", "plain")
    assert shown.exit_code == 0, shown.output
    assert (
        "sketch error" in shown.output
        and "exact score" in shown.output
        and make_rows(8, 10)[7]["prompt"] in shown.output
    )
    found = json.loads(prism("it's-7", "-t", "plain", "--strategy", "less", "--no-exact", "--json").stdout)
    assert sum(part["contribution"] for part in found["parts"]) == pytest.approx(found["score"], abs=1e-5)
    assert {one["strategy"] for one in found["ranks"]} == {"prism", "uniform", "less", "random"}
    assert prism("it's-7", "--target", "nobody").exit_code == 2
    assert prism("nobody", "--target", "plain").exit_code == 2
