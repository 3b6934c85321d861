"""Credit assignment: numbers calculated by hand, and the formulas in NumPy."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_exp.advantages import (
    StepBatch,
    batch_whitened,
    discounted,
    group_centred,
    group_normalised,
    leave_one_out,
    outcome_weighted,
    peer_valued,
    step_compared,
)

# Two groups: {A, B} and {C}. A won in 3 turns, B lost in 1 turn, C is alone in its group and has 2 turns. A's second turn
# was invalid.
RETURN_M = torch.tensor([1.0, 0.0, 1.0])
GROUP_M = torch.tensor([0, 0, 1])
TRAJECTORY_R = torch.tensor([0, 0, 0, 1, 2, 2])
NO_PENALTY_R = torch.zeros(6)
PENALTY_R = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.0])


def make_batch(return_M, penalty_R, trajectory_R, group_M, reward_R=None, state_R=None):
    """A step. By default, rewards come with the last turn, and no state occurs twice."""
    last_R = torch.cat([trajectory_R[1:] != trajectory_R[:-1], torch.tensor([True])])
    reward_R = return_M[trajectory_R] * last_R if reward_R is None else reward_R
    state_R = torch.arange(len(trajectory_R)) if state_R is None else state_R
    return StepBatch(return_M, group_M, trajectory_R, reward_R, penalty_R, state_R)


whitened_in_group = partial(batch_whitened, group_baseline=True)
IN_GROUPS = (group_normalised, group_centred, leave_one_out, whitened_in_group, step_compared)
COMPARING = (*IN_GROUPS, batch_whitened, peer_valued)


@pytest.mark.parametrize(
    ("estimator", "over", "penalty_R", "expected"),
    [
        (group_centred, "trajectories", NO_PENALTY_R, [0.5, 0.5, 0.5, -0.5, 0, 0]),
        (group_centred, "trajectories", PENALTY_R, [0.5, 0.4, 0.5, -0.5, 0, 0]),
        (group_centred, "turns", NO_PENALTY_R, [0.25, 0.25, 0.25, -0.75, 0, 0]),
        (group_centred, "turns", PENALTY_R, [0.275, 0.175, 0.275, -0.725, 0, 0]),  # mean (1 + 0.9 + 1 + 0) / 4 = 0.725
        (leave_one_out, "trajectories", NO_PENALTY_R, [1, 1, 1, -1, 0, 0]),
        (leave_one_out, "trajectories", PENALTY_R, [1, 0.9, 1, -1, 0, 0]),
        (leave_one_out, "turns", NO_PENALTY_R, [1 / 3, 1 / 3, 1 / 3, -1, 0, 0]),
        (group_normalised, "trajectories", NO_PENALTY_R, [0.70710, 0.70710, 0.70710, -0.70710, 0, 0]),
        (group_normalised, "turns", NO_PENALTY_R, [0.5, 0.5, 0.5, -1.5, 0, 0]),  # mean 3/4, sample std 1/2
        # REINFORCE++ whitens over the batch: returns (1, 0, 1), mean 2/3, sample std sqrt(1/3); turns (1, 1, 1, 0, 1, 1).
        (batch_whitened, "trajectories", NO_PENALTY_R, [0.57735, 0.57735, 0.57735, -1.15470, 0.57735, 0.57735]),
        (batch_whitened, "trajectories", PENALTY_R, [0.57735, 0.40415, 0.57735, -1.15470, 0.57735, 0.57735]),
        (batch_whitened, "turns", NO_PENALTY_R, [0.40825, 0.40825, 0.40825, -2.04124, 0.40825, 0.40825]),
        # ... of returns minus their group's mean: (1/2, -1/2, 0), mean 0, sample std 1/2. C is alone in its group.
        (whitened_in_group, "trajectories", NO_PENALTY_R, [1, 1, 1, -1, 0, 0]),
        # GiGPO without repeated states is its episode term.
        (step_compared, "turns", NO_PENALTY_R, [0.5, 0.5, 0.5, -1.5, 0, 0]),
    ],
)
def test_by_hand(estimator, over, penalty_R, expected):
    advantage_R = estimator(make_batch(RETURN_M, penalty_R, TRAJECTORY_R, GROUP_M), over=over)
    torch.testing.assert_close(advantage_R, torch.tensor(expected, dtype=torch.float32), atol=2e-5, rtol=0)


def test_rloo_is_grpo_without_std_times_a_constant():
    """r_i - mean = (G - 1) / G * (r_i - mean of the others)."""
    return_M, group_M = torch.rand(12), torch.arange(12) // 4
    batch = make_batch(return_M, torch.zeros(12), torch.arange(12), group_M)
    torch.testing.assert_close(leave_one_out(batch) * 3 / 4, group_centred(batch))


def test_gigpo_by_hand():
    """Two trajectories with the same first state, which occurs once more later; gamma 1/2.

    A: states x, y, x; rewards 0, 0, 1 -> returns 1/4, 1/2, 1.    B: states x, z; rewards 0, 0 -> returns 0, 0.
    State x has the returns (1/4, 1, 0): mean 5/12, sample std 0.520416. States y and z occur once.
    """
    batch = make_batch(
        torch.tensor([1.0, 0.0]),
        torch.zeros(5),
        torch.tensor([0, 0, 0, 1, 1]),
        torch.zeros(2, dtype=torch.long),
        reward_R=torch.tensor([0.0, 0, 1, 0, 0]),
        state_R=torch.tensor([0, 1, 0, 0, 2]),
    )
    assert discounted(batch.reward_R, batch.trajectory_R, 0.5).tolist() == [0.25, 0.5, 1, 0, 0]
    by_mean = step_compared(batch, norm="mean", gamma=0.5, omega=2.0)
    torch.testing.assert_close(by_mean, torch.tensor([0.5 - 1 / 3, 0.5, 0.5 + 7 / 6, -0.5 - 5 / 6, -0.5]))
    step = torch.tensor([-1 / 6, 0, 7 / 12, -5 / 12, 0]) / 0.520416
    episode = torch.tensor([1.0, 1, 1, -1, -1]) * 0.707107
    torch.testing.assert_close(step_compared(batch, gamma=0.5), episode + step, atol=2e-5, rtol=0)


def test_gigpo_subtracts_a_penalty_from_the_step_return_of_its_turn():
    batch = make_batch(
        torch.zeros(2), torch.tensor([0.1, 0.0]), torch.arange(2), torch.zeros(2).long(), state_R=torch.zeros(2).long()
    )
    torch.testing.assert_close(step_compared(batch, norm="mean"), torch.tensor([-0.15, 0.05]))


def test_a_penalty_in_a_group_without_spread_is_not_scaled():
    """Both trajectories won and one turn was invalid: the standard deviation is 0, so the penalty is not divided by it."""
    batch = make_batch(torch.ones(2), torch.tensor([0.0, 0.1, 0.0]), torch.tensor([0, 0, 1]), torch.zeros(2).long())
    torch.testing.assert_close(group_normalised(batch), torch.tensor([0.0, -0.1, 0.0]))


def test_equal_returns_give_no_advantage():
    batch = make_batch(torch.ones(4), torch.zeros(4), torch.arange(4), torch.zeros(4, dtype=torch.long))
    for estimator in COMPARING:
        assert torch.equal(estimator(batch), torch.zeros(4))


def test_an_empty_step():
    empty, no_ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for estimator in (*COMPARING, outcome_weighted):
        assert len(estimator(StepBatch(empty, no_ids, no_ids, empty, empty, no_ids))) == 0


# GAGPO: a group of three trajectories through the states A, B, C | A, B, B | A, C; two of them get 10 at the end.
# With gamma 0.95, V(A) = (9.025 + 0 + 9.5) / 3, V(B) = (9.5 + 0 + 0) / 3 and V(C) = 10.

THREE = StepBatch(
    return_M=torch.tensor([10.0, 0.0, 10.0], dtype=torch.float64),
    group_M=torch.zeros(3, dtype=torch.long),
    trajectory_R=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
    reward_R=torch.tensor([0, 0, 10, 0, 0, 0, 0, 10], dtype=torch.float64),
    penalty_R=torch.zeros(8, dtype=torch.float64),
    state_R=torch.tensor([0, 1, 2, 0, 1, 1, 0, 2]),
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"norm": "none"}, [2.5492, 6.3333, 0, -5.8888, -3.0162, -3.1667, 3.325, 0]),
        ({"norm": "std"}, [0.6346, 1.5829, -0.0043, -1.48, -0.7601, -0.7978, 0.829, -0.0043]),
        ({"norm": "none", "lam": 0.0}, [-3.1667, 6.3333, 0, -3.1667, -0.1583, -3.1667, 3.325, 0]),
        ({"norm": "none", "lam": 1.0}, [2.85, 6.3333, 0, -6.175, -3.1667, -3.1667, 3.325, 0]),
    ],
    ids=str,
)
def test_gagpo_by_hand(settings, expected):
    expected_R = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(peer_valued(THREE, **settings), expected_R, atol=1e-4, rtol=0)


def test_gagpo_subtracts_a_penalty_from_the_advantage_of_its_turn():
    penalty_R = torch.zeros(8, dtype=torch.float64)
    penalty_R[1] = 0.5
    batch = replace(THREE, penalty_R=penalty_R)
    torch.testing.assert_close(peer_valued(batch, norm="none"), peer_valued(THREE, norm="none") - penalty_R)


@st.composite
def steps(draw):
    """A step of groups whose trajectories pass through few states, with rewards at any turn."""
    turns_GM = draw(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=4), min_size=1, max_size=3))
    turns_M = [turns for group in turns_GM for turns in group]
    group_M = torch.tensor([g for g, group in enumerate(turns_GM) for _ in group])
    trajectory_R = torch.arange(len(turns_M)).repeat_interleave(torch.tensor(turns_M))
    rewards, states = (draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in [len(trajectory_R)] * 2)
    reward_R = torch.tensor(rewards, dtype=torch.float64)
    return_M = torch.zeros(len(turns_M), dtype=torch.float64).index_add(0, trajectory_R, reward_R)
    state_R = group_M[trajectory_R] * 4 + torch.tensor(states)
    return StepBatch(return_M, group_M, trajectory_R, reward_R, torch.zeros_like(reward_R), state_R)


@settings(max_examples=60, deadline=None)
@given(steps(), st.sampled_from([0.5, 0.95, 1.0]))
def test_gagpo_with_lambda_1_is_the_turn_term_of_gigpo(batch, gamma):
    """The values of all later states cancel: A = G - V(s), as GiGPO compares turns without dividing."""
    turn_term_R = step_compared(batch, norm="mean", gamma=gamma) - group_centred(batch)
    torch.testing.assert_close(peer_valued(batch, lam=1.0, gamma=gamma, norm="none"), turn_term_R, atol=1e-9, rtol=0)


def test_w_reinforce_by_hand():
    """A won and has three turns, the second of them invalid; B lost; C won, alone in its group."""
    batch = make_batch(RETURN_M, PENALTY_R, TRAJECTORY_R, GROUP_M)
    torch.testing.assert_close(outcome_weighted(batch), torch.tensor([0.1, 0.0, 0.1, -1.0, 0.1, 0.1]))
    torch.testing.assert_close(outcome_weighted(batch, positive=1.0)[2:4], torch.tensor([1.0, -1.0]))
    assert (outcome_weighted(batch, success_above=1.0) < 0).all(), "a return must be above the threshold"


# Equal values, and a trajectory that is alone in its group.


def test_equal_returns_with_a_rounded_mean_give_no_advantage():
    """In float32 the mean of 13 times 99.9 is not 99.9, and its standard deviation is above eps."""
    batch = make_batch(torch.full((13,), 99.9), torch.zeros(13), torch.arange(13), torch.zeros(13).long())
    for estimator in (*IN_GROUPS, batch_whitened):
        for over in ("trajectories", "turns"):
            assert not estimator(batch, over=over).any(), (estimator, over)


def test_equal_step_returns_give_no_advantage():
    """All eight trajectories won in three turns through the same states: all steps at a state are equal."""
    n, zeros = 8, torch.zeros
    batch = StepBatch(
        torch.full((n,), 10.0),
        zeros(n).long(),
        torch.arange(n).repeat_interleave(3),
        torch.tensor([0.0, 0.0, 10.0] * n),
        zeros(3 * n),
        torch.tensor([0, 1, 2] * n),
    )
    assert not step_compared(batch).any()
    assert not peer_valued(batch).any()


@pytest.mark.parametrize("over", ["trajectories", "turns"])
@pytest.mark.parametrize("estimator", IN_GROUPS)
def test_a_trajectory_alone_in_its_group_has_no_advantage(estimator, over):
    """Its turns have different scores and the same state, but its group has no other trajectory to compare with."""
    penalty_R, state_R = torch.tensor([0.0, 0.1, 0.0, 0.0]), torch.zeros(4).long()
    batch = make_batch(torch.ones(1), penalty_R, torch.zeros(4).long(), torch.zeros(1).long(), state_R=state_R)
    assert not estimator(batch, over=over).any()


def make_ragged_step(rng, groups=100):
    """A step of groups of different sizes with non-dyadic rewards; in a third of the groups all trajectories are equal."""
    trajectories, group_M, state_R = [], [], []
    for group in range(groups):
        alike, turns = rng.random() < 1 / 3, int(rng.integers(1, 9))
        rewards = rng.choice([0.1, 0.7, 10 / 3, 99.9, -0.3], size=turns)
        for _ in range(rng.integers(1, 14)):
            if not alike:
                rewards = rng.choice([0.1, 0.7, 10 / 3, 99.9, -0.3], size=rng.integers(1, 9))
            states = np.arange(turns) if alike else rng.integers(0, 4, size=len(rewards))
            trajectories.append(rewards)
            group_M.append(group)
            state_R.extend(10 * group + states)
    owner = np.repeat(np.arange(len(trajectories)), [len(rewards) for rewards in trajectories])
    returns = [math.fsum(rewards) for rewards in trajectories]
    return np.array(returns), np.array(group_M), owner, np.concatenate(trajectories), np.array(state_R)


def reference(value, group, of, eps):
    """(of - mean) / (sample standard deviation + eps) for each group of `value`, group by group in NumPy."""
    out = np.zeros(len(of[0]))
    for g in np.unique(group):
        among, own = value[group == g], of[1] == g
        spread = among.std(ddof=1) if len(among) > 1 else 0.0
        if among.max() > among.min():
            out[own] = (of[0][own] - among.mean()) / (spread + eps if eps is not None else 1.0)
    return out


@pytest.mark.slow
def test_three_thousand_ragged_groups_match_the_formulas_and_equal_ones_are_zero():
    alike = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        gamma = float(rng.uniform(0.5, 1.0))
        return_M, group_M, owner_R, reward_R, state_R = make_ragged_step(rng)
        none_R = np.zeros(len(owner_R))
        batch = StepBatch(*map(torch.from_numpy, (return_M, group_M, owner_R, reward_R, none_R, state_R)))
        group_R, score_R = group_M[owner_R], return_M[owner_R]
        lone_R = (np.bincount(group_M) == 1)[group_R]
        step_R = discounted(batch.reward_R, batch.trajectory_R, gamma).numpy()
        for over, value, group in (("trajectories", return_M, group_M), ("turns", score_R, group_R)):
            mean = np.where(lone_R, 0, reference(value, group, (score_R, group_R), None))
            std = np.where(lone_R, 0, reference(value, group, (score_R, group_R), 1e-6))
            step = np.where(lone_R, 0, reference(step_R, state_R, (step_R, state_R), 1e-6))
            expected = {group_centred: mean, group_normalised: std, partial(step_compared, gamma=gamma): std + step}
            for estimator, wanted in expected.items():
                advantage_R = estimator(batch, over=over).numpy()
                np.testing.assert_allclose(advantage_R, wanted, rtol=1e-9, atol=1e-7)
            single = StepBatch(*(t.float() if t.is_floating_point() else t for t in vars(batch).values()))
            equal_R = np.array([np.ptp(return_M[group_M == g]) == 0 for g in range(100)])[group_R]
            same_R = equal_R & np.array([np.ptp(step_R[state_R == s]) == 0 for s in state_R])
            for estimator in IN_GROUPS:
                zero_R = same_R if estimator is step_compared else equal_R
                assert not any(estimator(each, over=over).numpy()[zero_R].any() for each in (batch, single))
        alike += len(np.unique(group_R[same_R]))
    assert alike > 900  # including trajectories that are alone in their group
