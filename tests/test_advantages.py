"""Credit assignment against numbers made by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from aem_exp.advantages import (
    StepBatch,
    batch_whitened,
    discounted,
    group_centred,
    group_normalised,
    leave_one_out,
    step_compared,
)

# Two groups: {A, B} and {C}. A won in 3 turns, B lost in 1 turn, C is alone with 2 turns. A's second turn was invalid.
RETURN_M = torch.tensor([1.0, 0.0, 1.0])
GROUP_M = torch.tensor([0, 0, 1])
TRAJECTORY_R = torch.tensor([0, 0, 0, 1, 2, 2])
FREE_R = torch.zeros(6)
PENALTY_R = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.0])


def played(return_M, penalty_R, trajectory_R, group_M, reward_R=None, state_R=None):
    """A step in which rewards come with the last turn, and no state is met twice, unless told."""
    last_R = torch.cat([trajectory_R[1:] != trajectory_R[:-1], torch.tensor([True])])
    reward_R = return_M[trajectory_R] * last_R if reward_R is None else reward_R
    state_R = torch.arange(len(trajectory_R)) if state_R is None else state_R
    return StepBatch(return_M, group_M, trajectory_R, reward_R, penalty_R, state_R)


whitened_in_group = partial(batch_whitened, group_baseline=True)
IN_GROUPS = (group_normalised, group_centred, leave_one_out, whitened_in_group, step_compared)


@pytest.mark.parametrize(
    ("estimator", "over", "penalty_R", "expected"),
    [
        (group_centred, "trajectories", FREE_R, [0.5, 0.5, 0.5, -0.5, 0, 0]),
        (group_centred, "trajectories", PENALTY_R, [0.5, 0.4, 0.5, -0.5, 0, 0]),
        (group_centred, "turns", FREE_R, [0.25, 0.25, 0.25, -0.75, 0, 0]),
        (group_centred, "turns", PENALTY_R, [0.275, 0.175, 0.275, -0.725, 0, 0]),  # mean (1 + 0.9 + 1 + 0) / 4 = 0.725
        (leave_one_out, "trajectories", FREE_R, [1, 1, 1, -1, 0, 0]),
        (leave_one_out, "trajectories", PENALTY_R, [1, 0.9, 1, -1, 0, 0]),
        (leave_one_out, "turns", FREE_R, [1 / 3, 1 / 3, 1 / 3, -1, 0, 0]),
        (group_normalised, "trajectories", FREE_R, [0.70710, 0.70710, 0.70710, -0.70710, 0, 0]),
        (group_normalised, "turns", FREE_R, [0.5, 0.5, 0.5, -1.5, 0, 0]),  # mean 3/4, sample std 1/2
        # REINFORCE++ whitens over the batch: returns (1, 0, 1), mean 2/3, sample std sqrt(1/3); turns (1, 1, 1, 0, 1, 1).
        (batch_whitened, "trajectories", FREE_R, [0.57735, 0.57735, 0.57735, -1.15470, 0.57735, 0.57735]),
        (batch_whitened, "trajectories", PENALTY_R, [0.57735, 0.40415, 0.57735, -1.15470, 0.57735, 0.57735]),
        (batch_whitened, "turns", FREE_R, [0.40825, 0.40825, 0.40825, -2.04124, 0.40825, 0.40825]),
        # ... of returns minus their group's mean: (1/2, -1/2, 0), mean 0, sample std 1/2. C is alone in its group.
        (whitened_in_group, "trajectories", FREE_R, [1, 1, 1, -1, 0, 0]),
        # GiGPO where no state is met twice is its episode term.
        (step_compared, "turns", FREE_R, [0.5, 0.5, 0.5, -1.5, 0, 0]),
    ],
)
def test_by_hand(estimator, over, penalty_R, expected):
    advantage_R = estimator(played(RETURN_M, penalty_R, TRAJECTORY_R, GROUP_M), over=over)
    torch.testing.assert_close(advantage_R, torch.tensor(expected, dtype=torch.float32), atol=2e-5, rtol=0)


def test_rloo_is_grpo_without_std_times_a_constant():
    """r_i - mean = (G - 1) / G * (r_i - mean of the others)."""
    return_M, group_M = torch.rand(12), torch.arange(12) // 4
    each = played(return_M, torch.zeros(12), torch.arange(12), group_M)
    torch.testing.assert_close(leave_one_out(each) * 3 / 4, group_centred(each))


def test_gigpo_by_hand():
    """Two trajectories that share their first state, and again a later one; gamma 1/2.

    A: states x, y, x; rewards 0, 0, 1 -> returns 1/4, 1/2, 1.    B: states x, z; rewards 0, 0 -> returns 0, 0.
    State x holds (1/4, 1, 0): mean 5/12, sample std 0.520416. States y and z were met once.
    """
    seen = played(
        torch.tensor([1.0, 0.0]),
        torch.zeros(5),
        torch.tensor([0, 0, 0, 1, 1]),
        torch.zeros(2, dtype=torch.long),
        reward_R=torch.tensor([0.0, 0, 1, 0, 0]),
        state_R=torch.tensor([0, 1, 0, 0, 2]),
    )
    assert discounted(seen.reward_R, seen.trajectory_R, 0.5).tolist() == [0.25, 0.5, 1, 0, 0]
    by_mean = step_compared(seen, norm="mean", gamma=0.5, omega=2.0)
    torch.testing.assert_close(by_mean, torch.tensor([0.5 - 1 / 3, 0.5, 0.5 + 7 / 6, -0.5 - 5 / 6, -0.5]))
    step = torch.tensor([-1 / 6, 0, 7 / 12, -5 / 12, 0]) / 0.520416
    episode = torch.tensor([1.0, 1, 1, -1, -1]) * 0.707107
    torch.testing.assert_close(step_compared(seen, gamma=0.5), episode + step, atol=2e-5, rtol=0)


def test_gigpo_takes_a_penalty_off_the_turns_own_step_return():
    seen = played(
        torch.zeros(2), torch.tensor([0.1, 0.0]), torch.arange(2), torch.zeros(2).long(), state_R=torch.zeros(2).long()
    )
    torch.testing.assert_close(step_compared(seen, norm="mean"), torch.tensor([-0.15, 0.05]))


def test_a_penalty_in_a_group_without_spread_stays_what_it_is():
    """Both won, one turn was invalid: there is no standard deviation to divide by, and none of the penalty is blown up."""
    seen = played(torch.ones(2), torch.tensor([0.0, 0.1, 0.0]), torch.tensor([0, 0, 1]), torch.zeros(2).long())
    torch.testing.assert_close(group_normalised(seen), torch.tensor([0.0, -0.1, 0.0]))


def test_equal_returns_teach_nothing():
    seen = played(torch.ones(4), torch.zeros(4), torch.arange(4), torch.zeros(4, dtype=torch.long))
    for estimator in (group_normalised, group_centred, leave_one_out, batch_whitened, whitened_in_group, step_compared):
        assert torch.equal(estimator(seen), torch.zeros(4))


def test_nothing_was_played():
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for estimator in (group_normalised, group_centred, leave_one_out, batch_whitened, whitened_in_group, step_compared):
        assert len(estimator(StepBatch(nothing, none, none, nothing, nothing, none))) == 0


# Equal values, and a trajectory that is alone in its group.


def test_equal_returns_whose_mean_is_rounded_teach_nothing():
    """In float32 the mean of 13 times 99.9 is not 99.9, and its standard deviation is above eps."""
    seen = played(torch.full((13,), 99.9), torch.zeros(13), torch.arange(13), torch.zeros(13).long())
    for estimator in (*IN_GROUPS, batch_whitened):
        for over in ("trajectories", "turns"):
            assert not estimator(seen, over=over).any(), (estimator, over)


def test_equal_step_returns_teach_nothing():
    """All eight won in three turns, by the same states: nothing tells one step from another."""
    n, zeros = 8, torch.zeros
    seen = StepBatch(
        torch.full((n,), 10.0),
        zeros(n).long(),
        torch.arange(n).repeat_interleave(3),
        torch.tensor([0.0, 0.0, 10.0] * n),
        zeros(3 * n),
        torch.tensor([0, 1, 2] * n),
    )
    assert not step_compared(seen).any()


@pytest.mark.parametrize("over", ["trajectories", "turns"])
@pytest.mark.parametrize("estimator", IN_GROUPS)
def test_a_lone_survivor_has_no_advantage(estimator, over):
    """Its turns have different scores and share a state, but there is no other trajectory to compare it with."""
    penalty_R, state_R = torch.tensor([0.0, 0.1, 0.0, 0.0]), torch.zeros(4).long()
    seen = played(torch.ones(1), penalty_R, torch.zeros(4).long(), torch.zeros(1).long(), state_R=state_R)
    assert not estimator(seen, over=over).any()


def ragged(rng, groups=100):
    """A step of ragged groups with non-dyadic rewards; in a third of the groups, all trajectories are alike."""
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
    """(of - mean) / (sample standard deviation + eps) of each group of `value`, one by one, by NumPy."""
    out = np.zeros(len(of[0]))
    for g in np.unique(group):
        among, own = value[group == g], of[1] == g
        spread = among.std(ddof=1) if len(among) > 1 else 0.0
        if among.max() > among.min():
            out[own] = (of[0][own] - among.mean()) / (spread + eps if eps is not None else 1.0)
    return out


def test_ten_thousand_ragged_groups_agree_with_the_formulas_and_equal_ones_are_zero():
    alike = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gamma = float(rng.uniform(0.5, 1.0))
        return_M, group_M, owner_R, reward_R, state_R = ragged(rng)
        none_R = np.zeros(len(owner_R))
        seen = StepBatch(*map(torch.from_numpy, (return_M, group_M, owner_R, reward_R, none_R, state_R)))
        group_R, score_R = group_M[owner_R], return_M[owner_R]
        lone_R = (np.bincount(group_M) == 1)[group_R]
        step_R = discounted(seen.reward_R, seen.trajectory_R, gamma).numpy()
        for over, value, group in (("trajectories", return_M, group_M), ("turns", score_R, group_R)):
            mean = np.where(lone_R, 0, reference(value, group, (score_R, group_R), None))
            std = np.where(lone_R, 0, reference(value, group, (score_R, group_R), 1e-6))
            step = np.where(lone_R, 0, reference(step_R, state_R, (step_R, state_R), 1e-6))
            expected = {group_centred: mean, group_normalised: std, partial(step_compared, gamma=gamma): std + step}
            for estimator, wanted in expected.items():
                found = estimator(seen, over=over).numpy()
                np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-7)
            single = StepBatch(*(t.float() if t.is_floating_point() else t for t in vars(seen).values()))
            equal_R = np.array([np.ptp(return_M[group_M == g]) == 0 for g in range(100)])[group_R]
            same_R = equal_R & np.array([np.ptp(step_R[state_R == s]) == 0 for s in state_R])
            for estimator in IN_GROUPS:
                zero_R = same_R if estimator is step_compared else equal_R
                assert not any(estimator(each, over=over).numpy()[zero_R].any() for each in (seen, single))
        alike += len(np.unique(group_R[same_R]))
    assert alike > 3000  # lone trajectories among them
