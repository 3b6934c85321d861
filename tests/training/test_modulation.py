"""Properties of each variant of the modulation; those of the paper's coefficients are in test_aem."""

import pytest
import torch
from support.credits import measured_credit, modulated_credit, modulation_config

from aem_exp import aem
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.base import keyed_generator
from aem_exp.training import diagnostics
from aem_exp.training.controls import select_units

ENTROPY = [0.2, 0.5, 0.8, 1.1, 0.3, 0.9, 0.4]
ADVANTAGE = [1.0, 1.0, -1.0, -1.0, 0.5, 0.5, 0.0]
ENTROPY_R, ADVANTAGE_R = torch.tensor(ENTROPY), torch.tensor(ADVANTAGE)
GROUP_R = torch.tensor([0, 0, 0, 0, 1, 1, 1])
TRAJECTORY_R = torch.tensor([0, 0, 1, 1, 2, 2, 3])
CREDIT = measured_credit([2, 2, 2, 1], ADVANTAGE, ENTROPY, group=[0, 0, 1, 1])


def modulated(name, seed=0, credit=CREDIT):
    return modulated_credit(name, seed, credit)


def alphas(name, seed=0):
    """The coefficients, and the term that is added to the advantages."""
    credit = modulated(name, seed)
    added_R = credit.final_advantage_U - credit.advantage_U * credit.alpha_U
    return credit.alpha_U, added_R if added_R.abs().max() > 1e-7 else None


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


@pytest.mark.parametrize(
    ("name", "scope_R"),
    [
        ("trajectory", TRAJECTORY_R),
        ("batch", torch.zeros(7).long()),
        ("turn", torch.tensor([0, 1, 0, 1, 2, 3, 2])),  # turns 0 and 1 of each group
    ],
)
def test_each_scope_has_its_own_range_and_mean(name, scope_R):
    alpha_R, _ = alphas(name)
    assert torch.equal(alpha_R, aem.coefficients(ENTROPY_R, scope_R))
    for scope in scope_R.unique():
        torch.testing.assert_close(alpha_R[scope_R == scope].mean(), torch.tensor(1.0))


def test_ungated_modulates_groups_of_nearly_equal_entropies():
    close = measured_credit([2], [1.0, -1.0], [0.5, 0.5001])
    assert torch.equal(modulated("aem", credit=close).alpha_U, torch.ones(2))
    assert modulation_config("ungated").gate == 0
    assert not torch.equal(modulated("ungated", credit=close).alpha_U, torch.ones(2))


def test_gate_complement_modulates_only_the_groups_that_the_gate_closes():
    """The three groups span 0.9, 0.05 and 0 nats."""
    credit = measured_credit([2, 2, 2], [1.0, -1.0] * 3, [0.2, 1.1, 0.5, 0.55, 0.7, 0.7], group=[0, 1, 2])
    alpha_U = modulated("gate_complement", credit=credit).alpha_U
    assert torch.equal(alpha_U[[0, 1, 4, 5]], torch.ones(4))
    expected = aem.coefficients(torch.tensor([0.5, 0.55]), torch.zeros(2).long(), gate=0.0)
    torch.testing.assert_close(alpha_U[2:4], expected)
    gated = modulated("aem", credit=credit)
    assert gated.metrics["aem/gated_share"] == pytest.approx(2 / 3)
    assert modulated("gate_complement", credit=credit).metrics["aem/gated_share"] == pytest.approx(2 / 3)


def select(keep, advantage_R, alpha_R, scope_R=GROUP_R):
    return select_units(keep, False, advantage_R, alpha_R, scope_R, keyed_generator(()))


def test_raising_and_lowering_split_the_responses_without_changing_coefficients():
    """In group 0, alpha decreases through 1, and A is positive in the first half. The last response has A = 0."""
    paper_R, _ = alphas("aem")
    sides = [alphas(keep)[0] for keep in ("raising", "lowering")]
    for side_R in sides:
        assert torch.equal(side_R[side_R != 0], paper_R[side_R != 0])
    raising, lowering = ((side_R != 0).tolist() for side_R in sides)
    assert raising == [False, False, False, False, False, True, False]
    assert lowering == [True, True, True, True, True, False, False]


def test_changing_the_sign_of_advantages_swaps_raising_and_lowering():
    paper_R, _ = alphas("aem")
    for keep, other in (("raising", "lowering"), ("lowering", "raising")):
        assert torch.equal(select(keep, -ADVANTAGE_R, paper_R), select(other, ADVANTAGE_R, paper_R))


def test_gated_responses_are_neither_raising_nor_lowering():
    for keep in ("raising", "lowering"):
        assert not select(keep, ADVANTAGE_R, torch.ones(7)).any()


def test_raising_and_lowering_have_drifts_of_opposite_sign():
    """Here the surprisal is proportional to the entropy."""
    advantage_R, surprisal_R = torch.tensor([1.0, -1.0, 1.0, -1.0]), ENTROPY_R[:4] * 10
    alpha_R = aem.coefficients(ENTROPY_R[:4], GROUP_R[:4])
    signs = {}
    for keep in ("raising", "lowering"):
        kept_R = advantage_R * alpha_R * select(keep, advantage_R, alpha_R, GROUP_R[:4])
        signs[keep] = diagnostics.entropy_drift(kept_R, None, surprisal_R, surprisal_R, GROUP_R[:4])["advantage"]
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


def test_scope_state_by_hand():
    """Each state of two responses has alpha = 2 / (1 + 1/e) and 2 / (1 + e)."""
    credit = measured_credit([2, 2], [1.0, 1.0, -1.0, -1.0], [0.2, 0.8, 0.5, 1.1], observations=["a", "b", "a", "b"])
    expected = torch.tensor([1.4621, 1.4621, 0.5379, 0.5379])
    torch.testing.assert_close(modulated("state", credit=credit).alpha_U, expected, atol=1e-4, rtol=0)
    assert modulated("state", credit=credit).metrics["aem/alone_share"] == 0
    alone = modulated("state")  # all observations differ
    assert torch.equal(alone.alpha_U, torch.ones(7))
    assert alone.metrics["aem/alone_share"] == alone.metrics["aem/gated_share"] == 1


def test_equal_observations_of_different_groups_are_different_states():
    credit = measured_credit([1, 1], [1.0, -1.0], [0.2, 0.9], group=[0, 1], observations=["a", "a"])
    assert torch.equal(modulated("state", credit=credit).alpha_U, torch.ones(2))


def test_scope_task_type_compares_groups_and_needs_types():
    credit = measured_credit(
        [1, 1, 1], [1.0, -1.0, 1.0], [0.2, 0.9, 0.5], group=[0, 1, 2], kinds=["heat", "heat", "cool"]
    )
    expected = aem.coefficients(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0, 0, 1]))
    assert torch.equal(modulated("task_type", credit=credit).alpha_U, expected)
    with pytest.raises(RunError, match=r"no type \(`Task.kind`\)"):
        modulated("task_type")


def test_rank_is_a_rescaling_that_an_outlier_does_not_change():
    for outlier in (1.1, 50.0):
        credit = measured_credit([4], [1.0, 1.0, -1.0, -1.0], [0.2, 0.5, 0.5, outlier])
        weight = torch.exp(-torch.tensor([0.0, 1.5, 1.5, 3.0]) / 3)  # ties share the mean of their ranks
        torch.testing.assert_close(modulated("rank", credit=credit).alpha_U, weight / weight.mean())
    close = measured_credit([2], [1.0, -1.0], [0.5, 0.5001])
    assert torch.equal(modulated("rank", credit=close).alpha_U, torch.ones(2))  # the gate acts on nats


@pytest.mark.parametrize(("name", "signal"), [("length_signal", [9, 2, 2, 5]), ("turn_signal", [0, 1, 0, 1])])
def test_control_signals_replace_the_entropy(name, signal):
    credit = measured_credit([2, 2], [1.0, 1.0, -1.0, -1.0], [0.2, 0.5, 0.8, 1.1], tokens=[9, 2, 2, 5])
    expected = aem.coefficients(torch.tensor(signal).float(), torch.zeros(4).long(), gate=0.0)
    assert torch.equal(modulated(name, credit=credit).alpha_U, expected)


def test_noise_signal_depends_on_the_seed_only():
    credits = [modulated("noise_signal", seed, credit) for seed in (0, 0, 1) for credit in (CREDIT,)]
    assert torch.equal(credits[0].alpha_U, credits[1].alpha_U)
    assert not torch.equal(credits[0].alpha_U, credits[2].alpha_U)
    torch.testing.assert_close((credits[0].alpha_U[:4].max() / credits[0].alpha_U[:4].min()).log(), torch.tensor(1.0))
