"""Properties of each variant of the modulation; those of the paper's coefficients are in test_aem."""

from functools import cache

import pytest
import torch

from aem_exp import aem
from aem_exp.config import load
from aem_exp.rollout.sampling.base import keyed_generator
from aem_exp.training import diagnostics, modulation
from aem_exp.training.modulation import ModulationVariant

ENTROPY_R = torch.tensor([0.2, 0.5, 0.8, 1.1, 0.3, 0.9, 0.4])
GROUP_R = torch.tensor([0, 0, 0, 0, 1, 1, 1])
TRAJECTORY_R = torch.tensor([0, 0, 1, 1, 2, 2, 3])
ADVANTAGE_R = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.5, 0.5, 0.0])


@cache
def modulation_config(name):
    return load([f"modulation={name}"]).modulation


def alphas(name, seed=0):
    """The coefficients of a config in `conf/modulation`, and the term that it adds to the advantages."""
    block = modulation_config(name)
    lam = torch.tensor(block.lam["value"]).item()
    variant = ModulationVariant(**{key: getattr(block, key) for key in vars(ModulationVariant())})
    scope_R = modulation.scope_ids(variant, GROUP_R, TRAJECTORY_R)
    alpha_R = modulation.variant_coefficients(variant, ENTROPY_R, scope_R, lam, block.gate, keyed_generator((seed,)))
    alpha_R = modulation.filter_by_entropy_effect(variant, ADVANTAGE_R, alpha_R)
    return alpha_R, modulation.advantage_bonus(variant, ADVANTAGE_R, alpha_R, ENTROPY_R, TRAJECTORY_R)


def test_aem_is_the_variant_without_differences_from_the_paper():
    alpha_R, added = alphas("aem")
    assert torch.equal(alpha_R, aem.coefficients(ENTROPY_R, GROUP_R))
    assert added is None


def test_reversed_gives_large_coefficients_to_high_entropy():
    alpha_R, _ = alphas("reversed")
    assert torch.equal(alpha_R[:4].argsort(), ENTROPY_R[:4].argsort())
    torch.testing.assert_close(alpha_R[:4].max() / alpha_R[:4].min(), torch.tensor(1.0).exp())


@pytest.mark.parametrize(("name", "lam"), [("lam_half", 0.5), ("aem", 1.0), ("lam_2", 2.0), ("lam_4", 4.0)])
def test_lambda_is_the_logarithm_of_the_range(name, lam):
    alpha_R, _ = alphas(name)
    torch.testing.assert_close((alpha_R[:4].max() / alpha_R[:4].min()).log(), torch.tensor(lam))


def test_shuffled_permutes_the_coefficients_within_each_group():
    alpha_R, paper_R = alphas("shuffled")[0], alphas("aem")[0]
    for group in (0, 1):
        shuffled_R, original_R = alpha_R[group == GROUP_R], paper_R[group == GROUP_R]
        assert torch.equal(shuffled_R.sort().values, original_R.sort().values)
    assert not torch.equal(alpha_R, paper_R)
    assert torch.equal(alpha_R, alphas("shuffled")[0])
    assert len({tuple(alphas("shuffled", seed)[0].tolist()) for seed in range(20)}) > 5


@pytest.mark.slow
def test_shuffled_is_uncorrelated_with_entropy_over_many_seeds():
    every = torch.stack([alphas("shuffled", seed)[0][:4] for seed in range(4000)])
    torch.testing.assert_close(every.mean(0), torch.ones(4), atol=0.03, rtol=0)


@pytest.mark.parametrize(("name", "scope_R"), [("trajectory", TRAJECTORY_R), ("batch", torch.zeros(7).long())])
def test_each_scope_has_its_own_range_and_mean(name, scope_R):
    alpha_R, _ = alphas(name)
    assert torch.equal(alpha_R, aem.coefficients(ENTROPY_R, scope_R))
    for scope in scope_R.unique():
        torch.testing.assert_close(alpha_R[scope_R == scope].mean(), torch.tensor(1.0))


def test_ungated_modulates_groups_of_nearly_equal_entropies():
    close = torch.tensor([0.5, 0.5001])
    variant, one_group = ModulationVariant(), torch.zeros(2).long()
    assert torch.equal(
        modulation.variant_coefficients(variant, close, one_group, 1.0, 0.1, keyed_generator(())), torch.ones(2)
    )
    assert modulation_config("ungated").gate == 0
    assert not torch.equal(
        modulation.variant_coefficients(variant, close, one_group, 1.0, 0.0, keyed_generator(())), torch.ones(2)
    )


def test_raising_and_lowering_split_the_responses_without_changing_coefficients():
    """In group 0, alpha decreases through 1, and A is positive in the first half. The last response has A = 0."""
    paper_R, _ = alphas("aem")
    sides = [
        modulation.filter_by_entropy_effect(ModulationVariant(keep=keep), ADVANTAGE_R, paper_R)
        for keep in ("raising", "lowering")
    ]
    for side_R in sides:
        assert torch.equal(side_R[side_R != 0], paper_R[side_R != 0])
    raising, lowering = ((side_R != 0).tolist() for side_R in sides)
    assert raising == [False, False, False, False, False, True, False]
    assert lowering == [True, True, True, True, True, False, False]
    assert torch.equal(modulation.filter_by_entropy_effect(ModulationVariant(), ADVANTAGE_R, paper_R), paper_R)


def test_changing_the_sign_of_advantages_swaps_raising_and_lowering():
    paper_R, _ = alphas("aem")
    for keep, other in (("raising", "lowering"), ("lowering", "raising")):
        failed_R = modulation.filter_by_entropy_effect(ModulationVariant(keep=keep), -ADVANTAGE_R, paper_R)
        assert torch.equal(
            failed_R, modulation.filter_by_entropy_effect(ModulationVariant(keep=other), ADVANTAGE_R, paper_R)
        )


def test_gated_responses_are_neither_raising_nor_lowering():
    for keep in ("raising", "lowering"):
        assert not modulation.filter_by_entropy_effect(ModulationVariant(keep=keep), ADVANTAGE_R, torch.ones(7)).any()


def test_raising_and_lowering_have_drifts_of_opposite_sign():
    """Here the surprisal is proportional to the entropy."""
    advantage_R, surprisal_R = torch.tensor([1.0, -1.0, 1.0, -1.0]), ENTROPY_R[:4] * 10
    alpha_R = aem.coefficients(ENTROPY_R[:4], GROUP_R[:4])
    signs = {}
    for keep in ("raising", "lowering"):
        kept_R = advantage_R * modulation.filter_by_entropy_effect(ModulationVariant(keep=keep), advantage_R, alpha_R)
        signs[keep] = diagnostics.entropy_drift(kept_R, None, surprisal_R, GROUP_R[:4])["advantage"]
    assert signs["raising"] > 0 > signs["lowering"]


def test_empg_by_hand():
    """Htilde over the batch is (Hbar - 0.2) / 0.9; alpha = exp(-Htilde) / mean; the bonus uses the next response."""
    alpha_R, added_R = alphas("empg")
    scaled = [0.0, 1 / 3, 2 / 3, 1.0, 1 / 9, 7 / 9, 2 / 9]
    clarity = torch.exp(-torch.tensor(scaled))
    torch.testing.assert_close(alpha_R, clarity / clarity.mean())
    bonus = 0.05 * torch.tensor([clarity[1], 0, clarity[3], 0, clarity[5], 0, 0])
    expected = ADVANTAGE_R * alpha_R + bonus
    torch.testing.assert_close(ADVANTAGE_R * alpha_R + added_R, expected - expected.mean())


@pytest.mark.parametrize("name", ["empg", "empg_scaling"])
def test_empg_has_mean_zero_and_may_change_signs(name):
    alpha_R, added_R = alphas(name)
    total = ADVANTAGE_R * alpha_R + added_R
    torch.testing.assert_close(total.mean(), torch.tensor(0.0), atol=1e-7, rtol=0)
    assert total[6] != 0  # its advantage was 0


def test_empg_scaling_has_no_bonus():
    alpha_R, added_R = alphas("empg_scaling")
    torch.testing.assert_close(added_R, -(ADVANTAGE_R * alpha_R).mean().expand(7))
