"""Credit assignment: from returns to one advantage per response.

Every estimator has the same shape, whatever the history, so that a row of many turns and a row of one turn take the same
path:

    estimator(return_M, penalty_R, trajectory_R, group_M, *, over, ...) -> advantage_R

Shapes: M trajectories, R responses (turns), G groups.
    return_M      episode return, without penalties
    penalty_R     what this very response loses (an invalid action); it enters the response's own score only
    trajectory_R  index into M of the trajectory that owns each response
    group_M       group of each trajectory, 0..G-1
    over          which population a response's score is compared with: `trajectories` of the group (each counts once), or
                  `turns` of the group (each trajectory counts as often as it has turns: the verl-agent reference)

A group with a single survivor, or none, has nothing to compare: its advantage is 0.
"""

from typing import Literal

import torch
from torch import Tensor

Over = Literal["trajectories", "turns"]


def group_normalised(
    return_M: Tensor,
    penalty_R: Tensor,
    trajectory_R: Tensor,
    group_M: Tensor,
    *,
    over: Over = "trajectories",
    eps: float = 1e-6,
) -> Tensor:
    """GRPO (arXiv 2402.03300): (score - mean of the group) / (sample standard deviation of the group + eps).

    A group without spread has no scale to divide by: there, what remains of a score (a penalty) stays as it is.
    """
    score_R, group_R = return_M[trajectory_R] - penalty_R, group_M[trajectory_R]
    value, group = _population(return_M, score_R, group_M, group_R, over)
    total_G, count_G = _sums(value, group)
    mean_G = total_G / count_G.clamp(min=1)
    squares_G, _ = _sums((value - mean_G[group]) ** 2, group)
    std_G = (squares_G / (count_G - 1).clamp(min=1)).sqrt()
    scale_G = torch.where(std_G > eps, std_G + eps, 1.0)
    return _alone_is_zero((score_R - mean_G[group_R]) / scale_G[group_R], count_G[group_R])


def group_centred(
    return_M: Tensor, penalty_R: Tensor, trajectory_R: Tensor, group_M: Tensor, *, over: Over = "trajectories"
) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): score - mean of the group."""
    score_R, group_R = return_M[trajectory_R] - penalty_R, group_M[trajectory_R]
    total_G, count_G = _sums(*_population(return_M, score_R, group_M, group_R, over))
    return _alone_is_zero(score_R - (total_G / count_G.clamp(min=1))[group_R], count_G[group_R])


def leave_one_out(
    return_M: Tensor, penalty_R: Tensor, trajectory_R: Tensor, group_M: Tensor, *, over: Over = "trajectories"
) -> Tensor:
    """RLOO (arXiv 2402.14740): score - mean of the others; what is left out is the trajectory, or the one turn."""
    score_R, group_R = return_M[trajectory_R] - penalty_R, group_M[trajectory_R]
    total_G, count_G = _sums(*_population(return_M, score_R, group_M, group_R, over))
    own_R = score_R if over == "turns" else return_M[trajectory_R]
    others_R = (total_G[group_R] - own_R) / (count_G[group_R] - 1).clamp(min=1)
    return _alone_is_zero(score_R - others_R, count_G[group_R])


def _population(
    return_M: Tensor, score_R: Tensor, group_M: Tensor, group_R: Tensor, over: Over
) -> tuple[Tensor, Tensor]:
    """The values that the statistics of each group are taken over, and their groups."""
    return (score_R, group_R) if over == "turns" else (return_M, group_M)


def _sums(value: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of the values of each group."""
    groups = int(group.max()) + 1 if len(group) else 0
    return value.new_zeros(groups).index_add_(0, group, value), torch.bincount(group, minlength=groups)


def _alone_is_zero(advantage_R: Tensor, count_R: Tensor) -> Tensor:
    return torch.where(count_R < 2, 0.0, advantage_R)
