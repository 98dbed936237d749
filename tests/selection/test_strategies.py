"""Strategies: their weights, budgets, ties, and what an arrival does to a random order."""

import itertools

import numpy as np
import pytest

from prism_assets.selection.ordering import cut, order_by_score
from prism_assets.selection.strategies import STRATEGIES, TargetScores
from prism_assets.selection.strategies.plain import keyed_hash
from prism_assets.settings import STRATEGIES as STRATEGY_NAMES


@pytest.fixture
def targets():
    rng = np.random.default_rng(0)
    return TargetScores(
        rng.normal(-1, 1, (2, 5)), rng.uniform(0.1, 3, (2, 5)), "plain", 0.7, np.array([0.1, -0.2, 0.4])
    )


class FakePool:
    """A pool whose columns are given."""

    def __init__(self, **columns):
        self.seed, self.wanted = columns.pop("seed", 0), columns.pop("wanted", 10**9)
        for name, value in columns.items():
            setattr(self, name, value if name in ("ids", "completion_tokens") else lambda value=value: value)


def test_the_settings_know_exactly_the_strategies_there_are():
    assert set(STRATEGY_NAMES) == set(STRATEGIES)
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name and strategy.description
        assert (strategy.weigh is None) != (strategy.rank is None)
        assert strategy.needs_direction == (name in ("prism", "prism-sigmoid", "uniform", "less", "prism-unit"))


def test_prism_weights_are_a_softmax_per_checkpoint(targets):
    expected = np.exp(targets.scores / 0.7)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(STRATEGIES["prism"].weigh(targets), expected, rtol=1e-12)


def test_prism_weights_of_pairs_are_the_models_preference_and_those_of_the_sigmoid_its_slope(targets):
    pairs = targets._replace(kind="pairs")
    preference = 1 / (1 + np.exp(-targets.scores / 0.7))
    found = STRATEGIES["prism"].weigh(pairs)
    np.testing.assert_allclose(found, preference / preference.sum(axis=1, keepdims=True), rtol=1e-10)
    slope = preference * (1 - preference)
    found = STRATEGIES["prism-sigmoid"].weigh(pairs)
    np.testing.assert_allclose(found, slope / slope.sum(axis=1, keepdims=True), rtol=1e-10)
    unit = STRATEGIES["prism-unit"].weigh(pairs)
    np.testing.assert_allclose(unit, STRATEGIES["prism"].weigh(pairs) / targets.norms, rtol=1e-12)


def test_without_a_temperature_prism_takes_1_and_the_sigmoid_the_scale_of_the_margins(targets):
    pairs = targets._replace(kind="pairs", given_temperature=None)
    np.testing.assert_array_equal(
        STRATEGIES["prism"].weigh(pairs), STRATEGIES["prism"].weigh(pairs._replace(given_temperature=1.0))
    )
    scale = 1.4826 * np.median([0.1, 0.2, 0.4])
    np.testing.assert_array_equal(
        STRATEGIES["prism-sigmoid"].weigh(pairs),
        STRATEGIES["prism-sigmoid"].weigh(pairs._replace(given_temperature=scale)),
    )
    plain = targets._replace(given_temperature=None)
    np.testing.assert_array_equal(STRATEGIES["prism-sigmoid"].weigh(plain), STRATEGIES["prism"].weigh(plain))


def test_uniform_weights_are_equal_and_sum_to_one(targets):
    np.testing.assert_array_equal(STRATEGIES["uniform"].weigh(targets), np.full((2, 5), 0.2))


def test_less_weights_make_the_mean_of_unit_gradients(targets):
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(2, 5, 11))
    norms = np.linalg.norm(gradients, axis=2)
    weights = STRATEGIES["less"].weigh(targets._replace(norms=norms))
    expected = (gradients / norms[..., None]).mean(axis=1)
    np.testing.assert_allclose(np.einsum("cm,cmd->cd", weights, gradients), expected, rtol=1e-12)


# -- budgets -----------------------------------------------------------------------------------------------------


def longest_prefix(tokens, amount):
    """By trying every prefix."""
    return max((n for n in range(len(tokens) + 1) if sum(tokens[:n]) <= amount), default=0)


def test_a_token_budget_takes_the_longest_prefix_that_fits():
    rng = np.random.default_rng(2)
    for _ in range(50):
        tokens = rng.integers(1, 20, size=15)
        amount = int(rng.integers(tokens[0], 200))
        assert cut(tokens, kind="tokens", amount=amount, pool_rows=15) == longest_prefix(tokens.tolist(), amount)


def test_a_token_budget_stops_at_the_first_row_that_does_not_fit():
    """A shorter row further down is not taken in its place: the ranking is what counts."""
    assert cut(np.array([5, 50, 1, 1]), kind="tokens", amount=10, pool_rows=4) == 1


def test_a_token_budget_is_met_exactly():
    assert cut(np.array([5, 5, 5]), kind="tokens", amount=10, pool_rows=3) == 2
    assert cut(np.array([5, 5, 5]), kind="tokens", amount=9, pool_rows=3) == 1


def test_a_token_budget_below_the_first_row_is_an_error_that_says_so():
    with pytest.raises(
        ValueError, match=r"budget of 4 tokens does not hold even the first row \(5 completion tokens\)"
    ):
        cut(np.array([5, 1]), kind="tokens", amount=4, pool_rows=2)


@pytest.mark.parametrize(("amount", "rows"), [(3, 3), (10, 10), (11, 10)])
def test_a_budget_of_rows_is_at_most_the_pool(amount, rows):
    assert cut(np.ones(10), kind="rows", amount=amount, pool_rows=10) == rows


@pytest.mark.parametrize(
    ("share", "pool", "rows"), [(0.05, 100, 5), (0.05, 109, 5), (0.05, 112, 6), (0.001, 100, 1), (1.0, 100, 100)]
)
def test_a_share_is_one_of_the_pool_not_of_what_is_shown(share, pool, rows):
    assert cut(np.ones(min(pool, 100)), kind="share", amount=share, pool_rows=pool) == rows


def test_ties_break_by_id():
    scores = np.array([0.5, 0.9, 0.5, 0.5, 0.9], dtype=np.float32)
    ids = ["c", "z", "a", "b", "y"]
    expected = sorted(range(5), key=lambda row: (-scores[row], ids[row]))
    assert order_by_score(scores, ids).tolist() == expected == [4, 1, 2, 3, 0]


def test_a_ranking_does_not_depend_on_the_order_of_the_rows():
    scores, ids = np.array([0.1, 0.1, 0.3, 0.1]), np.array(["b", "a", "d", "c"])
    orders = {
        tuple(ids[list(p)][order_by_score(scores[list(p)], ids[list(p)])]) for p in itertools.permutations(range(4))
    }
    assert orders == {("d", "a", "b", "c")}


# -- random ------------------------------------------------------------------------------------------------------


def random_order(ids, seed=0):
    return [ids[row] for row in order_by_score(keyed_hash(ids, seed), ids)]


def test_random_keeps_the_order_of_the_old_rows_when_new_ones_arrive():
    old = [f"old {number}" for number in range(200)]
    new = [f"new {number}" for number in range(50)]
    before, after = random_order(old), random_order([*new, *old])
    assert [one for one in after if one in set(old)] == before
    # A budget of 5% of the pool loses only the places that arrivals win.
    kept = set(before[:10]) & set(after[:12])
    assert len(kept) >= 12 - sum(one in new for one in after[:12]) - 2


def test_random_depends_on_the_seed_and_on_nothing_else():
    ids = [f"id {number}" for number in range(100)]
    assert random_order(ids, 1) == random_order(ids[::-1], 1) != random_order(ids, 2)


def test_random_is_uniform():
    keys = keyed_hash([f"id {number}" for number in range(4000)], 0)
    assert ((keys >= 0) & (keys < 1)).all()
    counts = np.histogram(keys, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


def test_full_takes_everything_in_the_order_of_the_ids():
    found = STRATEGIES["full"].rank(FakePool(ids=["b", "a", "c"]))
    assert found.order.tolist() == [1, 0, 2] and found.scores is None
    assert STRATEGIES["full"].whole_pool and not STRATEGIES["random"].whole_pool


def test_prism_unit_weighs_as_prism_and_normalises_as_less():
    targets = TargetScores(np.array([[-0.5, -2.0, -1.0]]), np.array([[3.0, 0.5, 2.0]]), "plain", 1.0, np.zeros(3))
    expected = np.exp(targets.scores) / np.exp(targets.scores).sum() / targets.norms
    np.testing.assert_allclose(STRATEGIES["prism-unit"].weigh(targets), expected, rtol=1e-12)
