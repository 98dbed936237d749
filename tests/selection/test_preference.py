"""Preference weights against the formulas written out with autograd and with plain numpy."""

import numpy as np
import pytest
import torch

from prism_assets.selection.preference import effective_number, margin_scale, preference_weights

KINDS = ("plain", "pairs")
FORMS = (("plain", "softplus"), ("pairs", "softplus"), ("pairs", "sigmoid"))


def phi(kind, objective, scores, temperature):
    """φ as the method defines it, in autograd's own operations."""
    scaled = scores / temperature
    if kind == "plain":
        return torch.exp(scaled)
    return temperature * torch.nn.functional.softplus(scaled) if objective == "softplus" else torch.sigmoid(scaled)


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_weights_objective_and_z_are_those_of_the_derivative_of_j(kind, form, temperature):
    values = np.random.default_rng(0).normal(-1, 1.5, size=7)
    scores = torch.tensor(values, requires_grad=True)
    objective = phi(kind, form, scores, temperature).mean()
    (slopes,) = torch.autograd.grad(objective, scores)  # φ′(s_j) / m
    found = preference_weights(values, kind, temperature, form)
    np.testing.assert_allclose(found.objective, objective.item(), rtol=1e-12)
    np.testing.assert_allclose(np.exp(found.log_z), slopes.sum().item(), rtol=1e-12)
    np.testing.assert_allclose(found.weights, (slopes / slopes.sum()).numpy(), rtol=1e-12)
    preferred = torch.exp if kind == "plain" else torch.sigmoid
    np.testing.assert_allclose(found.preferences, preferred(scores / temperature).detach().numpy(), rtol=1e-12)
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)


def test_weights_of_pairs_are_the_published_ones():
    """π = p̄(y⁺)/(p̄(y⁺) + p̄(y⁻)) of length-normalised likelihoods, and J = −mean log(1 − π)."""
    wanted, unwanted = np.array([-2.0, -0.5, -1.0, -0.1]), np.array([-1.0, -0.5, -3.0, -2.5])
    preference = np.exp(wanted) / (np.exp(wanted) + np.exp(unwanted))
    found = preference_weights(wanted - unwanted, "pairs")
    np.testing.assert_allclose(found.weights, preference / preference.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.preferences, preference, rtol=1e-12)
    assert found.objective == pytest.approx(-np.log(1 - preference).mean(), rel=1e-12)


def test_the_shares_of_margins_are_those_of_the_table_in_the_docs():
    margins = np.array([-3.0, -1.0, 0.0, 1.0, 3.0])
    published = preference_weights(margins, "pairs").weights
    np.testing.assert_array_equal(published.round(2), [0.02, 0.11, 0.20, 0.29, 0.38])
    former = preference_weights(margins, "pairs", margin_scale(margins), "sigmoid").weights
    np.testing.assert_array_equal(former.round(2), [0.11, 0.25, 0.28, 0.25, 0.11])


def test_plain_weights_prefer_what_is_near_and_the_sigmoid_what_is_undecided():
    plain = preference_weights(np.array([-0.1, -1.0, -5.0]), "plain", 1.0).weights
    assert plain[0] > plain[1] > plain[2]
    settled, undecided, hopeless = preference_weights(np.array([6.0, 0.0, -6.0]), "pairs", 1.0, "sigmoid").weights
    assert undecided > 0.9 and settled == pytest.approx(hopeless)


def test_a_high_temperature_is_uniform_and_a_low_one_takes_the_best():
    scores = np.array([-0.5, -1.0, -4.0])
    np.testing.assert_allclose(preference_weights(scores, "plain", 1e6).weights, 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(preference_weights(scores, "plain", 1e-2).weights, [1, 0, 0], atol=1e-12)


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("level", [-1e4, -800.0])
def test_far_scores_underflow_to_no_nan(kind, form, level):
    """exp(-1e4) is 0 in any float: the weights come from differences, as if all scores were shifted."""
    offsets = np.array([0.0, -1.0, -2.0])
    found = preference_weights(level + offsets, kind, 1.0, form)
    np.testing.assert_allclose(found.weights, np.exp(offsets) / np.exp(offsets).sum(), rtol=1e-9)
    # φ′ is exp(s) in all forms so far out, so log Z = level + log mean exp(offsets).
    assert found.log_z == pytest.approx(level + np.log(np.exp(offsets).mean()), rel=1e-12)
    assert np.isfinite(found.objective) and np.isfinite(found.preferences).all()


def test_one_hopeless_target_among_good_ones_gets_weight_zero():
    found = preference_weights(np.array([-0.5, -0.5, -1e4]), "plain", 1.0)
    np.testing.assert_array_equal(found.weights, [0.5, 0.5, 0.0])
    pairs = preference_weights(np.array([0.0, 1e4, -1e4]), "pairs", 1.0, "sigmoid")
    np.testing.assert_array_equal(pairs.weights, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(pairs.preferences, [0.5, 1.0, 0.0])
    published = preference_weights(np.array([0.0, 1e4, -1e4]), "pairs", 1.0)
    np.testing.assert_allclose(published.weights, [1 / 3, 2 / 3, 0.0], rtol=1e-12)
    assert published.objective == pytest.approx((np.log(2) + 1e4) / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "temperature", "says"),
    [
        ([0.0, np.nan], 1.0, "finite"),
        ([0.0, -np.inf], 1.0, "finite"),
        ([], 1.0, "non-empty"),
        ([[0.0]], 1.0, "vector"),
        ([0.0], 0.0, "positive"),
        ([0.0], -1.0, "positive"),
        ([0.0], np.nan, "positive"),
        ([0.0], np.inf, "finite"),
    ],
)
def test_what_has_no_weights_is_refused(scores, temperature, says):
    with pytest.raises(ValueError, match=says):
        preference_weights(np.array(scores), "plain", temperature)


def test_effective_number_is_kishs():
    assert effective_number(np.full(8, 1 / 8)) == pytest.approx(8)
    assert effective_number(np.array([1.0, 0, 0])) == pytest.approx(1)
    assert effective_number(np.array([0.5, 0.25, 0.25])) == pytest.approx(1 / (0.25 + 2 / 16))
    assert effective_number(np.array([2.0, 1.0, 1.0])) == pytest.approx(1 / (0.25 + 2 / 16))


def test_the_scale_of_margins_is_their_spread_about_zero_and_withstands_outliers():
    rng = np.random.default_rng(1)
    margins = rng.normal(0, 0.02, size=4001)
    assert margin_scale(margins) == pytest.approx(0.02, rel=0.05)
    margins[:400] = 1e3
    assert margin_scale(margins) == pytest.approx(0.02, rel=0.2)
    # At τ = 1 such margins hardly move the weights of the sigmoid; at the default they do.
    spread = {
        tau: np.ptp(preference_weights(np.array([0.0, 0.04]), "pairs", tau, "sigmoid").weights)
        for tau in (1.0, margin_scale(np.array([0.02, -0.02])))
    }
    assert spread.pop(1.0) < 1e-3 < 0.2 < min(spread.values())


def test_margins_without_spread_have_the_scale_one():
    assert margin_scale(np.zeros(3)) == 1.0
    assert margin_scale(np.array([])) == 1.0
