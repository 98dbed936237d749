"""Strategies that keep the targets apart, each against a slow version of its definition."""

import itertools

import numpy as np
import pytest
from test_strategies import FakePool

from prism_assets.selection.strategies import STRATEGIES, TargetScores
from prism_assets.selection.strategies.per_target import round_robin, saturating_coverage, shares


@pytest.fixture
def influences():
    return np.random.default_rng(0).normal(0.02, 0.1, (60, 5)).astype(np.float32)


IDS = [f"id {number:03d}" for number in range(60)]
VALUE = np.array([0.5, 0.2, 0.15, 0.1, 0.05])


def coverage(rows, influences, value):
    served = np.maximum(influences[list(rows)], 0).astype(np.float64).sum(axis=0)
    return float(value @ np.log(1 + served))


def test_coverage_takes_at_each_step_the_row_that_raises_it_most(influences):
    found = saturating_coverage(influences, VALUE, IDS, 20)
    chosen: list[int] = []
    for row, gain in zip(found.order.tolist(), found.scores.tolist(), strict=True):
        before = coverage(chosen, influences, VALUE)
        gains = {one: coverage([*chosen, one], influences, VALUE) - before for one in range(60) if one not in chosen}
        assert gains[row] == pytest.approx(max(gains.values()), abs=1e-9)
        assert gain == pytest.approx(gains[row], abs=1e-6)
        chosen.append(row)


def test_coverage_reaches_its_guarantee_against_the_best_of_all_sets(influences):
    few = influences[:12]
    best = max(coverage(rows, few, VALUE) for rows in itertools.combinations(range(12), 4))
    found = saturating_coverage(few, VALUE, IDS[:12], 4).order.tolist()
    assert coverage(found, few, VALUE) >= (1 - 1 / np.e) * best


def test_coverage_serves_a_small_target_before_it_serves_a_large_one_twice_over():
    """Two skills: many rows for the first, whose share is larger. A plain ranking takes no row of the second."""
    rows = np.zeros((40, 2), np.float32)
    rows[:30, 0], rows[30:, 1] = 0.5, 0.5
    value = np.array([0.8, 0.2])
    plain = np.argsort(-(rows @ value), kind="stable")[:20]
    covered = saturating_coverage(rows, value, IDS[:40], 20).order
    assert (plain >= 30).sum() == 0
    # Equal marginal gains: .8 / (1 + x/2) = .2 / (1 + y/2) with x + y = 20 has y = 2.8.
    assert (covered >= 30).sum() in (2, 3)


def test_ties_of_coverage_break_by_id_whatever_the_order_of_the_rows(influences):
    twice = np.concatenate([influences[:10], influences[:10]])
    names = [f"b {n}" for n in range(10)] + [f"a {n}" for n in range(10)]
    expected = [names[row] for row in saturating_coverage(twice, VALUE, names, 12).order]
    shuffled = np.random.default_rng(1).permutation(20)
    found = saturating_coverage(twice[shuffled], VALUE, [names[row] for row in shuffled], 12).order
    assert [names[shuffled[row]] for row in found] == expected
    assert expected[0].startswith("a")


def test_round_robin_gives_each_target_its_quota_and_its_best_rows(influences):
    quotas = np.array([4.0, 2.0, 2.0, 1.0, 1.0])
    order = round_robin(influences, quotas, IDS, 30)
    assert len(set(order.tolist())) == 30
    turns = np.zeros(5)
    left = set(range(60))
    for at, row in enumerate(order.tolist()):
        target = int(np.argmax(quotas / 10 * (at + 1) - turns))
        assert row == max(left, key=lambda one, target=target: influences[one, target])
        turns[target] += 1
        left.remove(row)
    np.testing.assert_array_less(np.abs(turns - 3 * quotas), 1.0001)


def test_round_robin_takes_every_row_once_where_more_are_wanted_than_there_are(influences):
    assert sorted(round_robin(influences, VALUE, IDS, 1000).tolist()) == list(range(60))


def test_shares_are_the_lengths_of_the_terms_of_the_direction():
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=(2, 5, 11)) * rng.uniform(0.1, 5, (2, 5, 1))
    scores = rng.normal(-1, 1, (2, 5))
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    lengths = np.linalg.norm(weights[..., None] * gradients, axis=2)
    expected = (lengths / lengths.sum(axis=1, keepdims=True)).mean(axis=0)
    found = shares(TargetScores(scores, np.linalg.norm(gradients, axis=2), "plain", 1.0, scores[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_less_max_is_the_best_subtask_mean(influences):
    groups = ["a", "b", "a", "", "b"]
    found = STRATEGIES["less-max"].rank(FakePool(ids=IDS, influences=influences, target_groups=groups))
    scores = [max((row[0] + row[2]) / 2, (row[1] + row[4]) / 2, row[3]) for row in influences.astype(float)]
    assert found.order.tolist() == sorted(range(60), key=lambda row: -scores[row])
    np.testing.assert_allclose(found.scores, sorted(scores, reverse=True), atol=1e-6)


def test_less_max_without_subtasks_is_less(influences):
    found = STRATEGIES["less-max"].rank(FakePool(ids=IDS, influences=influences, target_groups=[""] * 5))
    assert found.order.tolist() == np.argsort(-influences.mean(axis=1), kind="stable").tolist()


def test_length_prefers_long_completions_and_then_small_ids():
    found = STRATEGIES["length"].rank(FakePool(ids=["b", "a", "c"], completion_tokens=np.array([5, 5, 9])))
    assert found.order.tolist() == [2, 1, 0]
