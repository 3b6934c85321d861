"""Estimators of the entropy of a response: worked numbers, invariances, and the simulation of their purpose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aem_exp import aem
from aem_exp.training import entropy_estimators as estimators


def flat(responses):
    """Token entropies of several responses as (entropy_K, response_K)."""
    values = [value for tokens in responses for value in tokens]
    ids = [r for r, tokens in enumerate(responses) for _ in tokens]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(ids)


def one_scope(responses):
    return torch.zeros(len(responses), dtype=torch.long)


def test_shrinkage_by_hand():
    mean_R = torch.tensor([0.2, 0.5, 0.8, 1.1], dtype=torch.float64)
    theta_R = estimators.shrink_means(mean_R, 0.36 / torch.tensor([4.0, 25.0, 100.0, 16.0]))
    expected = torch.tensor([0.5158, 0.5434, 0.7945, 0.9875], dtype=torch.float64)
    torch.testing.assert_close(theta_R, expected, atol=2e-4, rtol=0)
    alpha_R = aem.coefficients(theta_R, torch.zeros(4).long())
    torch.testing.assert_close(alpha_R, torch.tensor([1.3962, 1.317, 0.7732, 0.5136]), atol=1e-3, rtol=0)


def test_shrinkage_to_one_value_closes_the_gate():
    """The means differ by less than their noise, so no difference between responses is credible."""
    entropy_K, response_K = flat([[0.0, 2.0], [0.1, 2.0], [0.0, 2.2]])
    theta_R = estimators.estimate_entropy("shrunk", entropy_K, response_K, torch.zeros(3).long())
    assert aem.gated(theta_R, torch.zeros(3).long(), 0.0).all() or theta_R.max() - theta_R.min() < 1e-6


def test_scopes_of_two_responses_are_not_shrunk():
    responses = [[0.1, 0.9], [0.4, 0.6, 1.0]]
    entropy_K, response_K = flat(responses)
    means = torch.tensor([0.5, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(estimators.shrink(entropy_K, response_K, one_scope(responses)), means)


def test_position_residual_by_hand():
    responses = [[1.0, 0.4], [0.8, 0.2, 0.3], [0.6]]
    entropy_K, response_K = flat(responses)
    residual_R = estimators.subtract_positions(entropy_K, response_K, one_scope(responses), kappa=1.0)
    expected = torch.tensor([0.7375, 0.4028, 0.3667], dtype=torch.float64)
    torch.testing.assert_close(residual_R, expected, atol=1e-4, rtol=0)


token_lists = st.lists(st.lists(st.floats(0.0, 3.0, width=32), min_size=1, max_size=6), min_size=1, max_size=8)


@given(token_lists)
def test_mean_is_the_entropy_of_the_paper(responses):
    entropy_K, response_K = flat(responses)
    mean_R = estimators.estimate_entropy("mean", entropy_K, response_K, one_scope(responses))
    expected = torch.tensor([sum(tokens) / len(tokens) for tokens in responses])
    torch.testing.assert_close(mean_R, expected, atol=1e-6, rtol=1e-5)


@given(
    token_lists, st.sampled_from(["shrunk", "residual", "residual_shrunk"]), st.floats(0.5, 2.0), st.floats(0.0, 1.0)
)
def test_estimates_follow_increasing_affine_maps(responses, name, scale, shift):
    """Coefficients do not change under such maps, so they do not depend on the unit of the entropy."""
    entropy_K, response_K = flat(responses)
    scope_R = one_scope(responses)
    plain, mapped = (
        estimators.estimate_entropy(name, values_K, response_K, scope_R)
        for values_K in (entropy_K, scale * entropy_K + shift)
    )
    torch.testing.assert_close(mapped, (scale * plain + shift), atol=2e-3, rtol=2e-3)


@given(token_lists, token_lists, st.sampled_from(["shrunk", "residual", "residual_shrunk"]))
def test_scopes_do_not_affect_each_other(one, other, name):
    entropy_K, response_K = flat([*one, *other])
    scope_R = torch.tensor([0] * len(one) + [1] * len(other))
    both = estimators.estimate_entropy(name, entropy_K, response_K, scope_R)
    alone = [estimators.estimate_entropy(name, *flat(part), one_scope(part)) for part in (one, other)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-5)


@given(token_lists)
def test_shrinkage_of_equal_lengths_keeps_the_coefficients(responses):
    """Equal lengths mean equal noise, so shrinkage is an affine map: it changes nothing but the gate."""
    equal = [(tokens * 4)[:4] for tokens in responses]
    entropy_K, response_K = flat(equal)
    shrunk_R = estimators.estimate_entropy("shrunk", entropy_K, response_K, one_scope(equal))
    plain_R = estimators.estimate_entropy("mean", entropy_K, response_K, one_scope(equal))
    if shrunk_R.max() - shrunk_R.min() > 1e-2 and plain_R.max() - plain_R.min() > 1e-2:
        coefficients = [aem.coefficients(value_R, one_scope(equal), gate=0.0) for value_R in (shrunk_R, plain_R)]
        torch.testing.assert_close(*coefficients, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [False, True])
def test_simulation_of_the_purpose_of_each_estimator(decay):
    """Shrinkage lowers the error of the entropy; residuals remove the correlation of coefficients with length."""
    from bench import entropy_estimators as simulation

    rows = simulation.simulate(groups=60, position_effect=0.5 if decay else 0.0)
    assert rows["shrunk"]["mse"] < 0.5 * rows["mean"]["mse"]
    assert rows["residual"]["alpha_length"] == pytest.approx(0.0, abs=0.04)
    if decay:
        assert rows["mean"]["alpha_length"] > 0.12
        assert rows["residual"]["mse"] < rows["mean"]["mse"]
    for row in rows.values():
        assert row["alpha_truth"] > 0.5
