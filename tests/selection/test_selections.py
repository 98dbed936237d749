"""Every strategy through the graph: budgets, what they may not see, arrivals; new ones against slow computations."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_baselines import slow_mmr, slow_turns

from conftest import make_rows, save_tiny_model
from prism_assets.errors import LakeError
from prism_assets.ops.gc import plan
from prism_assets.ops.pipeline import steps_of
from prism_assets.selection.query import query_index
from prism_assets.selection.selection_inputs import selection_inputs
from prism_assets.selection.strategies import STRATEGIES as EVERY_STRATEGY

NEW = ("perplexity", "bm25", "rds", "prism-mmr")
UP_TO_SELECTION = steps_of("select")


def select(project):
    """Everything up to the selections: how many artefacts each step made."""
    results = project.run_steps(UP_TO_SELECTION)
    return {result.step.title: result.computed for result in results}


pytestmark = pytest.mark.usefixtures("blank_plots")


STRATEGIES = {name: one for name, one in EVERY_STRATEGY.items() if not one.by_label}  # labels are for removal


def build(make_project, folder, sources=None):
    project = make_project(folder, strategies=list(STRATEGIES), warmup={"checkpoints": 2})
    for number in range(2):
        rows = make_rows(20, 10 + number)
        project.add(f"shard{number}", [{**row, "source": sources or row["source"]} for row in rows])
    return project


@pytest.fixture(scope="module")
def selected(make_project, tmp_path_factory):
    """A project with a selection of every strategy and two checkpoints. Copy it before changing it."""
    project = build(make_project, tmp_path_factory.mktemp("selected") / "project")
    select(project)
    return project


def ids_of(project, strategy):
    return [row["id"] for row in project.selected(strategy)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_fills_the_budget_with_different_rows(selected, strategy):
    rows = project_rows(selected)
    ids = ids_of(selected, strategy)
    assert len(ids) == len(set(ids)) == (len(rows) if strategy == "full" else 8)
    assert set(ids) <= set(rows)


def project_rows(project):
    """id -> row of the pool. The pool of these tests has no duplicates and no contamination."""
    lake = project.lake
    rows = [row for one in lake.artifacts("candidates") for row in lake.read_table(one).to_pylist()]
    return {row["id"]: row for row in rows}


def test_sources_influence_no_strategy(selected, make_project, tmp_path):
    other = build(make_project, tmp_path / "project", sources="all from one place")
    select(other)
    assert {row["source"] for row in other.selected("prism")} == {"all from one place"}
    for strategy in STRATEGIES:
        assert ids_of(other, strategy) == ids_of(selected, strategy), strategy


def test_the_order_of_arrival_changes_no_selection(selected, tmp_path):
    late = {"aaa": make_rows(12, 50, "reverse"), "zzz": make_rows(12, 51)}
    hashes = set()
    for arrivals in ([["zzz"], ["aaa"]], [["aaa", "zzz"]]):
        project = selected.copy(tmp_path / f"in {len(arrivals)}")
        for names in arrivals:
            for name in names:
                project.add(name, late[name])
            select(project)
        after = {name: project.selection(name).content_hash for name in STRATEGIES}
        for name in NEW:
            assert after[name] != selected.selection(name).content_hash, "the arrivals must matter, or nothing is shown"
        hashes.add(tuple(after.values()))
    assert len(hashes) == 1


def test_nothing_is_made_twice(selected, tmp_path, monkeypatch):
    from prism_assets.selection import representations

    project = selected.copy(tmp_path / "project")
    assert set(select(project).values()) == {0}
    # The hidden states are there: another budget makes none.
    monkeypatch.setattr(representations, "_hidden_states", None)
    project.configure(strategies=["rds"], selection={"budget": 5})
    assert select(project)["Selection"] == 1 and len(ids_of(project, "rds")) == 5


# -- each new one, from what is stored ---------------------------------------------------------------------------


def feature_rows(project):
    """id -> stored features, read with pyarrow from the block files."""
    folder = project.settings.storage.root / "artifacts" / "feature_blocks"
    return {row["id"]: row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()}


def test_perplexity_selects_around_the_median(selected):
    log_probs = {name: row["mean_log_prob"][-1] for name, row in feature_rows(selected).items()}
    by_perplexity = sorted(log_probs, key=lambda one: (-log_probs[one], one))
    assert set(ids_of(selected, "perplexity")) == set(by_perplexity[16:24])
    assert min(log_probs.values()) < -0.1


def test_mmr_is_that_of_the_formula_with_mean_cosines_over_checkpoints(selected):
    features = feature_rows(selected)
    ids = sorted(features)
    scores = {row["id"]: row["score"] for row in everything(selected, "prism")}
    warmup = next(iter(selected.lake.artifacts("warmup_checkpoints")))
    rates = np.array(
        [one["mean_learning_rate"] for one in json.loads(selected.lake.local(warmup, "checkpoints.json").read_text())]
    )
    blocks = np.array([features[one]["vector"] for one in ids]).reshape(len(ids), 2, -1)
    vectors = np.concatenate([np.sqrt(rates[k] / rates.sum()) * blocks[:, k] for k in range(2)], axis=1)
    order = slow_mmr([scores[one] for one in ids], vectors, ids, 8)
    assert ids_of(selected, "prism-mmr") == [ids[row] for row in order]
    assert ids_of(selected, "prism-mmr") != ids_of(selected, "prism")
    for row in selected.selected("prism-mmr"):
        assert row["score"] == pytest.approx(scores[row["id"]], abs=1e-6)


def everything(project, strategy):
    """The whole pool in a strategy's order."""
    return query_index(project.stage, target="plain", strategy=strategy, k=10**6)


def test_rds_is_that_of_the_definition(selected):
    lake = selected.lake
    model = selected.model.base()

    def representation(row):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        hidden = found.hidden_states[-1][0].double().numpy()
        mean = np.average(hidden, axis=0, weights=np.arange(1, len(hidden) + 1))
        return mean / np.linalg.norm(mean)

    rows = project_rows(selected)
    ids = sorted(rows)
    candidates = np.array([representation(rows[one]) for one in ids])
    (table,) = lake.artifacts("targets")
    targets = np.array([representation(row) for row in lake.read_table(table).to_pylist()])
    assert ids_of(selected, "rds") == [ids[row] for row in slow_turns(candidates @ targets.T, ids, 8)]


def test_an_arrival_computes_the_hidden_states_of_its_own_shard_alone(selected, tmp_path):
    project = selected.copy(tmp_path / "project")
    before = {one.fingerprint for one in project.lake.artifacts("hidden_states")}
    assert len(before) == 3  # two shards and the targets
    assert {one.notes["rows"] for one in project.lake.artifacts("hidden_states")} == {20, 6}
    project.add("late", make_rows(7, 60))
    select(project)
    made = [one for one in project.lake.artifacts("hidden_states") if one.fingerprint not in before]
    assert [one.notes["rows"] for one in made] == [7]
    lineage = project.selection("rds").header["lineage"]["hidden_states"]
    assert {one["fingerprint"] for one in lineage} == before | {made[0].fingerprint}
    assert project.selection("rds").header["inputs"]["model"]["table"] == "base_model"
    removed = plan(project.lake, min_age=0).artifacts
    assert any(one.table == "selection" for one in removed)  # those before the arrival
    assert not any(one.table == "hidden_states" for one in removed)


def test_hidden_states_belong_to_a_model(selected, tmp_path):
    """Other weights under the same tokenizer give other hidden states; before a run, the old selection is stale."""
    project = selected.copy(tmp_path / "project")
    save_tiny_model(project.folder / "model", seed=5)
    with pytest.raises(LakeError, match="does not know today's model"):
        selection_inputs(project.stage, "plain", STRATEGIES["rds"])
    project.configure(strategies=["rds"])
    select(project)
    assert len(list(project.lake.artifacts("hidden_states"))) == 6
    assert ids_of(project, "rds") != ids_of(selected, "rds")


def test_two_files_of_equal_content_change_no_selection(selected, tmp_path):
    """They share one table of candidates, whose rows count once."""
    copy = selected.copy(tmp_path / "copy")
    (copy.inbox / "zz-again.jsonl").write_bytes((copy.inbox / "shard0.jsonl").read_bytes())
    select(copy)
    for strategy in STRATEGIES:
        assert ids_of(copy, strategy) == ids_of(selected, strategy), strategy
