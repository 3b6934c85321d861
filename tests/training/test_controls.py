"""What each control of the modulation preserves, what it breaks, and its worked number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.credits import measured_credit, modulated_credit

from aem_exp.rollout.sampling.base import keyed_generator
from aem_exp.training import controls, updates

H = [0.2, 0.5, 0.8, 1.1]
PAPER = torch.tensor([1.5397, 1.1033, 0.7905, 0.5664])  # coefficients of H
TWO_AND_TWO = measured_credit([2, 2], [1.0, 1.0, -1.0, -1.0], H)
ALTERNATING = measured_credit([2, 2], [1.0, -1.0, 1.0, -1.0], H, tokens=[10, 40, 20, 80])
PLACEBOS = ["shuffled_sign", "shuffled_length", "shuffled_turn", "shuffled_state", "shuffled_all"]


def modulated(name, seed=0, credit=TWO_AND_TWO, weight_R=None):
    return modulated_credit(name, seed, credit, weight_R)


counts = st.lists(st.integers(1, 4), min_size=2, max_size=6)


@st.composite
def random_credits(draw):
    """Two groups of windowed trajectories; advantages of one sign need not be equal, observations repeat."""
    turns = draw(counts)
    responses = sum(turns)
    some = lambda values: draw(st.lists(values, min_size=responses, max_size=responses))  # noqa: E731
    return measured_credit(
        turns,
        some(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])),
        some(st.floats(0.0, 2.0, width=32)),
        group=[m % 2 for m in range(len(turns))],
        tokens=some(st.integers(1, 40)),
        observations=some(st.sampled_from("abc")),
    )


def signed_sums(credit, weight_R):
    """Sums of weight * alpha * A over the successes, and over the failures, of each group."""
    value_R = weight_R * credit.alpha_U * credit.advantage_U
    return torch.stack(
        [value_R[(credit.group_R == g) & (credit.advantage_R.sign() == s)].sum() for g in (0, 1) for s in (-1, 1)]
    )


@given(random_credits(), st.sampled_from(PLACEBOS), st.booleans(), st.integers(0, 9))
def test_placebos_keep_the_sums_over_successes_and_failures(credit, name, token_mean, seed):
    """They keep the sums that the loss computes: weighted by tokens, or unweighted."""
    weight_R = updates.response_weights(credit, "dapo" if token_mean else "grpo")
    assert torch.equal(weight_R, credit.tokens_R.float() if token_mean else torch.ones(len(weight_R)))
    paper, placebo = (modulated(each, seed, credit, weight_R) for each in ("aem", name))
    torch.testing.assert_close(signed_sums(placebo, weight_R), signed_sums(paper, weight_R), atol=1e-4, rtol=1e-4)


@given(random_credits(), st.sampled_from(PLACEBOS), st.integers(0, 9))
def test_placebos_permute_within_their_strata(credit, name, seed):
    """Before the sums are matched, each stratum keeps its set of coefficients."""
    key = {
        "shuffled_sign": credit.advantage_R.sign(),
        "shuffled_turn": credit.turn_R,
        "shuffled_state": credit.state_R,
        "shuffled_length": controls.length_bins(credit.tokens_R, credit.group_R),
        "shuffled_all": None,
    }[name]
    if key is None:
        keys = [credit.advantage_R.sign().long(), credit.turn_R, controls.length_bins(credit.tokens_R, credit.group_R)]
        key = controls.combine_ids(keys)
    paper_R = modulated("aem", seed, credit).alpha_U
    stratum_R = controls.combine_ids([credit.group_R, key.long()])
    shuffled_R = controls.shuffle_coefficients(paper_R, stratum_R, keyed_generator((seed,)))
    for stratum in stratum_R.unique():
        chosen = stratum_R == stratum
        assert torch.equal(shuffled_R[chosen].sort().values, paper_R[chosen].sort().values)
    cell_R = controls.combine_ids([credit.group_R, credit.advantage_R.sign().long()])
    mass_R = credit.tokens_R * credit.advantage_R.abs()
    assert torch.equal(modulated(name, seed, credit).alpha_U, controls.match_sums(shuffled_R, paper_R, mass_R, cell_R))


def test_sign_placebo_by_hand():
    """The sum of alpha A is 1.28605 before and after. A free permutation can reverse it."""
    before = (PAPER * TWO_AND_TWO.advantage_R).sum()
    torch.testing.assert_close(before, torch.tensor(1.28605), atol=1e-3, rtol=0)
    results = [modulated("shuffled_sign", seed, TWO_AND_TWO) for seed in range(20)]
    assert {tuple(r.alpha_U[:2].argsort().tolist()) for r in results} == {(0, 1), (1, 0)}
    for result in results:
        torch.testing.assert_close(result.final_advantage_U.sum(), before, atol=1e-4, rtol=0)
    free = [modulated("shuffled", seed, TWO_AND_TWO).final_advantage_U.sum().item() for seed in range(50)]
    assert min(free) == pytest.approx(-1.28605, abs=1e-3)


def test_moved_share_counts_changed_coefficients():
    alone = measured_credit([2, 2], [1.0, 1.0, -1.0, -1.0], H)  # all observations differ
    assert modulated("shuffled_state", 0, alone).metrics["aem/moved_share"] == 0
    assert torch.equal(modulated("shuffled_state", 0, alone).alpha_U, modulated("aem", 0, alone).alpha_U)
    shares = {modulated("shuffled", seed, TWO_AND_TWO).metrics["aem/moved_share"] for seed in range(50)}
    assert shares <= {0.0, 0.5, 0.75, 1.0} and 1.0 in shares


def test_sign_mean_by_hand():
    credit = measured_credit([2, 2], [1.0, -1.0, 1.0, -1.0], H)
    expected = torch.tensor([1.1651, 0.8349, 1.1651, 0.8349])
    torch.testing.assert_close(modulated("sign_mean", credit=credit).alpha_U, expected, atol=1e-4, rtol=0)


@given(random_credits(), st.booleans())
def test_sign_mean_keeps_the_sums_and_knows_only_the_sign(credit, token_mean):
    weight_R = updates.response_weights(credit, "dapo" if token_mean else "grpo")
    paper, mean = (modulated(name, 0, credit, weight_R) for name in ("aem", "sign_mean"))
    torch.testing.assert_close(signed_sums(mean, weight_R), signed_sums(paper, weight_R), atol=1e-4, rtol=1e-4)
    for group in (0, 1):
        for sign in (-1, 1):
            assert len(mean.alpha_U[(credit.group_R == group) & (credit.advantage_R.sign() == sign)].unique()) <= 1


@given(random_credits())
def test_state_mean_keeps_the_sum_of_each_state(credit):
    paper, mean = (modulated(name, 0, credit) for name in ("aem", "state_mean"))
    for state in credit.state_R.unique():
        chosen = credit.state_R == state
        assert len(mean.alpha_U[chosen].unique()) == 1
        sums = [(credit.tokens_R * alpha_U)[chosen].sum() for alpha_U in (paper.alpha_U, mean.alpha_U)]
        torch.testing.assert_close(*sums, atol=1e-4, rtol=1e-5)


def test_weights_of_a_row_mean_over_full_histories():
    """A mean over rows divides the tokens of a response by those of its row."""
    credit = measured_credit([2, 1], [1.0, 1.0, -1.0], H[:3], tokens=[1, 3, 5], history="full")
    torch.testing.assert_close(updates.response_weights(credit, "grpo"), torch.tensor([0.25, 0.75, 1.0]))
    assert updates.response_weights(credit, "dr_grpo").tolist() == [1.0, 3.0, 5.0]


# Selections: the causal check.


def token_mean(credit):
    """The mean over tokens of alpha A, as the loss computes it: sum over tokens in the loss / denominator."""
    return (credit.final_advantage_U * credit.tokens_R)[credit.trained_U].sum().item()


@pytest.mark.parametrize(
    ("name", "denominator", "expected"),
    [("raising", 150, -0.1888), ("raising_mask", 60, -0.4720), ("raising_mask_scaled", 150, -0.1888)],
)
def test_masks_by_hand(name, denominator, expected):
    """`raising` trains units 1 and 2, which have 60 of the 150 tokens."""
    credit = modulated(name, credit=ALTERNATING)
    assert [bool(alpha) for alpha in credit.alpha_U] == [False, True, True, False]
    masked = name != "raising"
    assert int(credit.in_loss_K.sum()) == (60 if masked else 150)
    assert sum(sum(row.mask) for row in updates.mask_rows(credit)) == (60 if masked else 150)
    assert token_mean(credit) / denominator == pytest.approx(expected, abs=1e-4)


def test_select_has_coefficient_one_or_zero():
    assert modulated("raising_select", credit=ALTERNATING).alpha_U.tolist() == [0, 1, 1, 0]
    assert modulated("lowering_select", credit=ALTERNATING).alpha_U.tolist() == [1, 0, 0, 1]


@given(random_credits(), st.sampled_from(["raising", "lowering"]), st.integers(0, 9))
def test_random_selection_has_the_size_of_the_real_one(credit, keep, seed):
    real, random = (modulated(name, seed, credit) for name in (keep, f"{keep}_random"))
    cell_R = controls.combine_ids([credit.group_R, credit.advantage_R.sign().long()])
    for cell in cell_R.unique():
        assert (real.alpha_U[cell_R == cell] > 0).sum() == (random.alpha_U[cell_R == cell] > 0).sum()
    paper_R = modulated("aem", seed, credit).alpha_U
    assert torch.equal(random.alpha_U[random.alpha_U > 0], paper_R[random.alpha_U > 0])


def test_random_selection_is_random():
    chosen = {tuple((modulated("raising_random", seed, ALTERNATING).alpha_U > 0).tolist()) for seed in range(50)}
    assert len(chosen) == 4  # one of two successes, and one of two failures


# Ids and ranks.


def test_ranks_by_hand():
    value, scope = torch.tensor([0.5, 0.2, 0.5, 9.0, 1.0, 1.0]), torch.tensor([7, 7, 7, 7, 3, 3])
    assert controls.rank_within(value, scope).tolist() == [1.5, 0.0, 1.5, 3.0, 0.5, 0.5]


def test_length_bins_are_quarters_of_a_scope_and_ties_share_one():
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 5, 5])
    scope = torch.tensor([0] * 8 + [1] * 2)
    assert controls.length_bins(lengths, scope).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 1, 1]


@given(random_credits())
def test_rank_gives_the_order_of_the_paper(credit):
    rank, paper = (modulated(name, 0, credit).alpha_U for name in ("rank", "aem"))
    for group in (0, 1):
        chosen = credit.group_R == group
        ordered = credit.entropy_R[chosen].argsort()
        assert (rank[chosen][ordered].diff() <= 1e-6).all()
        torch.testing.assert_close(rank[chosen].mean(), paper[chosen].mean(), atol=1e-5, rtol=0)
        assert torch.equal(rank[chosen] == 1, paper[chosen] == 1) or not (paper[chosen] == 1).all()  # the same gate
