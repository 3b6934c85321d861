"""Credit assignment: from what was played to one advantage per response.

Every estimator has the same shape, whatever the history, so that a row of many turns and a row of one turn take the same
path: `estimator(played, *, over, ...) -> advantage_R`. Shapes: M trajectories, R responses (turns), G groups.

`over` names the population that a response's score is compared with: `trajectories` of the group (each counts once), or
`turns` of the group (each trajectory counts as often as it has turns: the verl-agent reference). A group with a single
survivor, or none, has nothing to compare: its advantage is 0.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from aem_exp.values import NOT_NEGATIVE, SHARE

Eps = Annotated[float, NOT_NEGATIVE]
Over = Literal["trajectories", "turns"]


@dataclass(frozen=True)
class Played:
    """What an estimator sees of a step. The responses of a trajectory follow each other in the order of its turns.

    Attributes:
        return_M: episode return, without penalties; 0 for a trajectory that leaves the loss and still counts in the mean.
        group_M: group of each trajectory, 0..G-1.
        trajectory_R: index into M of the trajectory that owns each response.
        reward_R: reward of the turn.
        penalty_R: what this very response loses (an invalid action); it enters the response's own score only.
        state_R: id of what the response answered to; equal where the same group met the same observation.
    """

    return_M: Tensor
    group_M: Tensor
    trajectory_R: Tensor
    reward_R: Tensor
    penalty_R: Tensor
    state_R: Tensor

    @property
    def group_R(self) -> Tensor:
        return self.group_M[self.trajectory_R]

    @property
    def score_R(self) -> Tensor:
        return self.return_M[self.trajectory_R] - self.penalty_R

    def population(self, over: Over) -> tuple[Tensor, Tensor]:
        """The values that statistics are taken over, and their groups."""
        return (self.score_R, self.group_R) if over == "turns" else (self.return_M, self.group_M)


def group_normalised(played: Played, *, over: Over = "trajectories", eps: Eps = 1e-6) -> Tensor:
    """GRPO (arXiv 2402.03300): (score - mean of the group) / (sample standard deviation of the group + eps).

    A group without spread has no scale to divide by: there, what remains of a score (a penalty) stays as it is.
    """
    mean_G, std_G, count_G = _statistics(*played.population(over))
    group_R = played.group_R
    return _compared(played.score_R - mean_G[group_R], count_G[group_R], std_G[group_R], eps)


def group_centred(played: Played, *, over: Over = "trajectories") -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): score - mean of the group."""
    mean_G, _, count_G = _statistics(*played.population(over))
    return _compared(played.score_R - mean_G[played.group_R], count_G[played.group_R])


def leave_one_out(played: Played, *, over: Over = "trajectories") -> Tensor:
    """RLOO (arXiv 2402.14740): score - mean of the others; what is left out is the trajectory, or the one turn."""
    mean_G, _, count_G = _statistics(*played.population(over))
    group_R, score_R = played.group_R, played.score_R
    own_R = score_R if over == "turns" else played.return_M[played.trajectory_R]
    others_R = (mean_G[group_R] * count_G[group_R] - own_R) / (count_G[group_R] - 1).clamp(min=1)
    return _compared(score_R - others_R, count_G[group_R])


def batch_whitened(
    played: Played, *, over: Over = "trajectories", eps: Eps = 1e-6, group_baseline: bool = False
) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): scores whitened over the whole batch.

    With `group_baseline`, the mean of its group is subtracted from a score first (the paper's REINFORCE++-baseline).
    """
    value, group = played.population(over)
    score_R, alone_R = played.score_R, torch.full_like(played.trajectory_R, 2)
    if group_baseline:
        mean_G, _, count_G = _statistics(value, group)
        value, score_R, alone_R = value - mean_G[group], score_R - mean_G[played.group_R], count_G[played.group_R]
    mean, std, count = _statistics(value, torch.zeros_like(group))
    return _compared(score_R - mean, count.expand_as(alone_R).minimum(alone_R), std, eps)


def step_compared(
    played: Played,
    *,
    over: Over = "trajectories",
    eps: Eps = 1e-6,
    norm: Literal["std", "mean"] = "std",
    gamma: Annotated[float, SHARE] = 0.95,
    omega: Annotated[float, NOT_NEGATIVE] = 1.0,
) -> Tensor:
    """GiGPO (arXiv 2505.10978): the episode's advantage, plus omega times that of the step among steps at the same state.

    Steps of a group that answered to the same observation are compared by discounted return; a state that was met once
    adds nothing. `norm`: divide both by their standard deviations (ALFWorld), or by nothing (WebShop).
    """
    episode_R = group_normalised(played, over=over, eps=eps) if norm == "std" else group_centred(played, over=over)
    value_R = discounted(played.reward_R, played.trajectory_R, gamma) - played.penalty_R
    mean_S, std_S, count_S = _statistics(value_R, played.state_R)
    state_R = played.state_R
    scale = (std_S[state_R], eps) if norm == "std" else ()
    return episode_R + omega * _compared(value_R - mean_S[state_R], count_S[state_R], *scale)


def discounted(reward_R: Tensor, trajectory_R: Tensor, gamma: float) -> Tensor:
    """Return from each turn to the end of its trajectory, later rewards weighing gamma less per turn."""
    out, later, owner = reward_R.tolist(), 0.0, -1
    owners = trajectory_R.tolist()
    for r in reversed(range(len(out))):
        later = out[r] + (gamma * later if owners[r] == owner else 0.0)
        out[r], owner = later, owners[r]
    return reward_R.new_tensor(out)


def _statistics(value: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sample standard deviation and count of each group."""
    groups = int(group.max()) + 1 if len(group) else 0
    count_G = torch.bincount(group, minlength=groups)
    mean_G = value.new_zeros(groups).index_add_(0, group, value) / count_G.clamp(min=1)
    squares_G = value.new_zeros(groups).index_add_(0, group, (value - mean_G[group]) ** 2)
    return mean_G, (squares_G / (count_G - 1).clamp(min=1)).sqrt(), count_G


def _compared(excess_R: Tensor, count_R: Tensor, std_R: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """What a score has over its population, in its standard deviations where it has one; 0 where it stands alone."""
    if std_R is not None:
        excess_R = excess_R / torch.where(std_R > eps, std_R + eps, 1.0)
    return torch.where(count_R < 2, 0.0, excess_R)
