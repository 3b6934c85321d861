"""Exact properties of the paper's functions, over random batches and in two real processes."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import torchrun_coefficients
from support.runs import torchrun

from aem_exp import aem

ENTROPIES = st.lists(st.floats(0, 12, width=32), min_size=2, max_size=24)
LAMBDAS = st.floats(0.05, 4)


def one_group(values):
    return torch.tensor(values), torch.zeros(len(values), dtype=torch.long)


def one_spread_group(values, least=1e-2):
    assume(max(values) - min(values) >= least)
    return one_group(values)


@pytest.mark.parametrize(
    ("entropies", "lam", "alpha"),
    [
        ((0.2, 0.5, 0.8, 1.1), 1.0, (1.5397, 1.1033, 0.7905, 0.5664)),
        ((0.0, 0.5, 1.0), 1.0, (1.519441, 0.921588, 0.558971)),
        ((0.0, 0.5, 1.0), 2.0, (1.995723, 0.734185, 0.270092)),
        ((0.0, 0.5, 1.0), -1.0, (0.558971, 0.921588, 1.519441)),
    ],
)
def test_worked_numbers(entropies, lam, alpha):
    torch.testing.assert_close(aem.coefficients(*one_group(entropies), lam), torch.tensor(alpha), atol=6e-5, rtol=0)


@given(ENTROPIES, LAMBDAS)
def test_the_mean_over_a_group_is_one(values, lam):
    assert aem.coefficients(*one_spread_group(values), lam, 0).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@given(ENTROPIES, LAMBDAS)
def test_higher_entropy_means_a_smaller_coefficient(values, lam):
    entropy_R, group_R = one_spread_group(values)
    order = entropy_R.argsort()
    steps = aem.coefficients(entropy_R, group_R, lam, 0)[order].diff()
    apart = entropy_R[order].diff() > 1e-4 * (max(values) - min(values))
    assert (steps <= 0).all()
    assert (steps[apart] < 0).all()


@pytest.mark.slow
@given(ENTROPIES, LAMBDAS)
def test_the_ratio_of_the_extremes_is_e_to_the_lambda(values, lam):
    alpha_R = aem.coefficients(*one_spread_group(values), lam, 0)
    assert (alpha_R.max() / alpha_R.min()).item() == pytest.approx(math.exp(lam), rel=1e-5)


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=16, unique=True), LAMBDAS, st.floats(0.1, 5), st.floats(0, 10)
)
def test_an_increasing_affine_change_has_no_effect(values, lam, scale, shift):
    entropy_R, group_R = one_group([v / 100 for v in values])
    moved = aem.coefficients(entropy_R * scale + shift, group_R, lam, 0)
    torch.testing.assert_close(moved, aem.coefficients(entropy_R, group_R, lam, 0), atol=3e-3, rtol=1e-3)


@pytest.mark.slow
@given(ENTROPIES, st.permutations(range(6)))
def test_responses_may_come_in_any_order(values, order):
    assume(len(values) >= 6)
    entropy_R, group_R = torch.tensor(values), torch.tensor([i % 2 for i in range(len(values))])
    index = torch.tensor([*order, *range(6, len(values))])
    permuted = aem.coefficients(entropy_R[index], group_R[index], 1, 0)
    torch.testing.assert_close(permuted, aem.coefficients(entropy_R, group_R, 1, 0)[index])


@given(ENTROPIES)
def test_lambda_zero_is_the_identity_bit_for_bit(values):
    entropy_R, group_R = one_group(values)
    advantage = torch.randn(1, len(values))
    alpha_R = aem.coefficients(entropy_R, group_R, 0.0, 0)
    assert torch.equal(alpha_R, torch.ones(len(values)))
    assert torch.equal(aem.modulate(advantage, alpha_R, torch.arange(len(values))[None]), advantage)


@pytest.mark.slow
@given(ENTROPIES)
def test_signs_and_zeros_are_kept(values):
    advantage = torch.tensor([[-1.0, 0.0, 2.0] * len(values)])[:, : len(values)]
    alpha_R = aem.coefficients(*one_group(values), 1, 0)
    modulated = aem.modulate(advantage, alpha_R, torch.arange(len(values))[None])
    assert torch.equal(modulated.sign(), advantage.sign())


def test_groups_are_independent():
    entropy_R = torch.tensor([0.2, 0.5, 0.8, 1.1, 3.0, 9.0])
    group_R = torch.tensor([7, 7, 7, 7, 2, 2])
    alone = aem.coefficients(entropy_R[:4], group_R[:4])
    torch.testing.assert_close(aem.coefficients(entropy_R, group_R)[:4], alone)


@pytest.mark.parametrize(
    ("values", "gate", "flat"),
    [
        ((0.5,), 0.0, True),
        ((0.5, 0.5), 0.0, True),
        ((0.5, 0.55), 0.1, True),
        ((0.5, 0.65), 0.1, False),
        ((0.5, 0.55), 0.0, False),
    ],
)
def test_the_gate(values, gate, flat):
    alpha_R = aem.coefficients(*one_group(values), 1.0, gate)
    assert torch.equal(alpha_R, torch.ones(len(values))) is flat
    assert aem.gated(*one_group(values), gate).tolist() == [flat]


def test_one_outlier_brings_all_others_close_to_one():
    alpha_R = aem.coefficients(*one_group([0.5] * 200 + [3.0]), 1.0)
    assert alpha_R[0].item() == pytest.approx(1.003, abs=5e-4)


def test_alpha_is_a_constant_for_the_optimiser():
    entropy_R = torch.tensor([0.1, 0.9], requires_grad=True)
    assert not aem.coefficients(entropy_R, torch.zeros(2, dtype=torch.long)).requires_grad


def test_responses_are_numbered_in_row_major_order():
    mask_NT = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert aem.responses(mask_NT).tolist() == [
        [-1, 0, 0, -1, 1],
        [2, -1, -1, 3, 3],
        [-1, -1, -1, -1, -1],
        [4, 4, 4, 4, 4],
    ]


@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_padding_has_no_effect(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    mask_NT = (torch.rand(4, 7, generator=generator) < 0.6).long()
    entropy_NT = torch.rand(4, 7, generator=generator)
    padded = torch.nn.functional.pad(mask_NT, (0, columns, 0, rows))
    noise = torch.full(padded.shape, float("nan"))
    noise[:4, :7] = entropy_NT
    plain = aem.response_entropy(entropy_NT, aem.responses(mask_NT))
    assert torch.equal(aem.response_entropy(noise, aem.responses(padded)), plain)


def test_each_response_has_a_row():
    response_NT = aem.responses(torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]))
    assert aem.response_rows(response_NT).tolist() == [0, 0, 2, 2]
    assert aem.response_rows(aem.responses(torch.zeros(2, 3))).tolist() == []


def test_response_entropy_is_the_mean_over_own_tokens():
    mask_NT = torch.tensor([[0, 1, 1, 0, 1]])
    entropy_NT = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]])
    assert aem.response_entropy(entropy_NT, aem.responses(mask_NT)).tolist() == [1.5, 4.0]


def test_modulate_takes_one_advantage_per_row_or_per_token():
    response_NT = torch.tensor([[0, 0, -1, 1]])
    alpha_R = torch.tensor([2.0, 0.5])
    expected = torch.tensor([[6.0, 6.0, 3.0, 1.5]])
    assert torch.equal(aem.modulate(torch.tensor([3.0]), alpha_R, response_NT), expected)
    assert torch.equal(aem.modulate(torch.full((1, 4), 3.0), alpha_R, response_NT), expected)


def test_a_batch_without_responses():
    response_NT = aem.responses(torch.zeros(2, 3))
    alpha_R = aem.coefficients(aem.response_entropy(torch.rand(2, 3), response_NT), torch.zeros(0, dtype=torch.long))
    assert torch.equal(aem.modulate(torch.ones(2), alpha_R, response_NT), torch.ones(2, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: aem.responses(torch.ones(3)),
        lambda: aem.response_rows(torch.zeros(3).long()),
        lambda: aem.response_entropy(torch.rand(2, 1), torch.zeros(2, 3).long()),
        lambda: aem.coefficients(torch.rand(3), torch.zeros(1).long()),
        lambda: aem.gated(torch.rand(3), torch.zeros(3, 1).long()),
        lambda: aem.modulate(torch.ones(1, 3), torch.ones(1), torch.zeros(2, 3).long()),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(AssertionError):
        call()


@pytest.mark.slow
def test_groups_may_be_split_over_ranks(tmp_path: Path):
    """Two gloo processes have interleaved halves of each group; after gathering they compute the result of one process."""
    done = torchrun(torchrun_coefficients)
    assert done.returncode == 0, done.stderr[-2000:]
