"""Which candidates are tried."""

import numpy as np

from prism_assets.trust.sample import random_halves, spread_over_scores


def test_the_sample_spans_the_scores_of_both_strategies_evenly():
    rng = np.random.default_rng(0)
    # Nearly all scores near zero, a few far up: a random sample would miss them.
    prism = np.concatenate([rng.normal(0, 0.01, 950), rng.uniform(0.1, 1, 50)])
    uniform = rng.permutation(prism)
    chosen = spread_over_scores({"prism": prism, "uniform": uniform}, 24)
    assert len(chosen) == len(set(chosen)) == 24
    for scores in (prism, uniform):
        assert scores.argmax() in chosen and scores.argmin() in chosen
        # Twelve levels over a range of about one: no gap above 0.1 is left without a candidate.
        assert np.diff(np.sort(scores[chosen])).max() < 0.15
    assert (prism[chosen] > 0.1).sum() >= 9 > 24 * 50 / 1000


def test_a_small_pool_is_tried_as_a_whole_and_ties_are_no_trouble():
    assert spread_over_scores({"prism": np.zeros(5), "uniform": np.zeros(5)}, 9).tolist() == [0, 1, 2, 3, 4]
    assert len(spread_over_scores({"prism": np.zeros(50), "uniform": np.ones(50)}, 9)) == 9
    assert spread_over_scores({"prism": np.arange(4.0)}, 0).tolist() == []


def test_subsets_are_different_halves_and_the_same_for_a_seed():
    masks = random_halves(12, 21, seed=3)
    assert masks.shape == (12, 21) and (masks.sum(axis=1) == 10).all()
    assert len({mask.tobytes() for mask in masks}) == 12
    assert np.array_equal(masks, random_halves(12, 21, seed=3)) and not np.array_equal(
        masks, random_halves(12, 21, seed=4)
    )
    # Every row is in about half of them.
    assert 0.35 < random_halves(200, 21, seed=0).mean(axis=0).min() < 0.65
