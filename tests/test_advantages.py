"""Credit assignment against numbers made by hand."""

import pytest
import torch

from aem_exp.advantages import group_centred, group_normalised, leave_one_out

# Two groups: {A, B} and {C}. A won in 3 turns, B lost in 1 turn, C is alone with 2 turns. A's second turn was invalid.
RETURN_M = torch.tensor([1.0, 0.0, 1.0])
GROUP_M = torch.tensor([0, 0, 1])
TRAJECTORY_R = torch.tensor([0, 0, 0, 1, 2, 2])
FREE_R = torch.zeros(6)
PENALTY_R = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.0])


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
        # A trajectory alone in its group has no other to be compared with, but its turns have each other: both won.
        (group_normalised, "trajectories", FREE_R, [0.70710, 0.70710, 0.70710, -0.70710, 0, 0]),
        (group_normalised, "turns", FREE_R, [0.5, 0.5, 0.5, -1.5, 0, 0]),  # mean 3/4, sample std 1/2
    ],
)
def test_by_hand(estimator, over, penalty_R, expected):
    advantage_R = estimator(RETURN_M, penalty_R, TRAJECTORY_R, GROUP_M, over=over)
    torch.testing.assert_close(advantage_R, torch.tensor(expected, dtype=torch.float32), atol=2e-5, rtol=0)


def test_rloo_is_grpo_without_std_times_a_constant():
    """r_i - mean = (G - 1) / G * (r_i - mean of the others)."""
    return_M, group_M = torch.rand(12), torch.arange(12) // 4
    each = (return_M, torch.zeros(12), torch.arange(12), group_M)
    torch.testing.assert_close(leave_one_out(*each) * 3 / 4, group_centred(*each))


def test_a_penalty_in_a_group_without_spread_stays_what_it_is():
    """Both won, one turn was invalid: there is no standard deviation to divide by, and none of the penalty is blown up."""
    advantage_R = group_normalised(
        torch.ones(2), torch.tensor([0.0, 0.1, 0.0]), torch.tensor([0, 0, 1]), torch.zeros(2).long()
    )
    torch.testing.assert_close(advantage_R, torch.tensor([0.0, -0.1, 0.0]))


def test_equal_returns_teach_nothing():
    for estimator in (group_normalised, group_centred, leave_one_out):
        advantage_R = estimator(torch.ones(4), torch.zeros(4), torch.arange(4), torch.zeros(4, dtype=torch.long))
        assert torch.equal(advantage_R, torch.zeros(4))
