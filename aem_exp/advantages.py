"""Credit assignment: the estimators that compute one advantage per response from the returns of a step.

All estimators have the signature `estimator(batch, *, over, ...) -> advantage_R`, independent of the history: rows with many
turns and rows with one turn use the same code. Shapes: M trajectories, R responses (turns), G groups.

| function | baseline |
|---|---|
| `group_normalised` | GRPO, DAPO, GSPO |
| `group_centred` | Dr. GRPO |
| `leave_one_out` | RLOO, DeepSWE |
| `batch_whitened` | REINFORCE++, with or without its group baseline |
| `step_compared` | GiGPO, SAMPO |
| `peer_valued` | GAGPO, a reconstruction |
| `outcome_weighted` | W-REINFORCE |

`over` is the population with which the score of a response is compared. `trajectories`: each trajectory of the group counts
once. `turns`: each trajectory counts once per turn, as in verl-agent.

Two rules apply to all estimators that compare, which is all but `outcome_weighted`. First, a trajectory that is alone in its
group has nothing to compare with, so its advantages are 0, for any number of turns. Second, equal values have an advantage of
exactly 0. To ensure this, statistics are computed in float64, and a population whose largest and smallest values are equal has
this value as its mean and a standard deviation of 0. Without this rule, a rounding error would be divided by a standard
deviation of the same size, and equal returns would get advantages of the order of 1.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from aem_exp.core.typed import FRACTION, FROM_0_TO_1, NOT_NEGATIVE

Eps = Annotated[float, NOT_NEGATIVE]
Over = Literal["trajectories", "turns"]


@dataclass(frozen=True)
class StepBatch:
    """The input of an estimator: one step. The responses of a trajectory are adjacent and in the order of its turns."""

    return_M: Tensor
    """episode return, without penalties; 0 for a trajectory that is excluded from the loss but counts in the mean"""
    group_M: Tensor
    """group of each trajectory, 0..G-1"""
    trajectory_R: Tensor
    """index into M: the trajectory of each response"""
    reward_R: Tensor
    """reward of the turn"""
    penalty_R: Tensor
    """penalty of this response (for an invalid action); it changes only the score of this response"""
    state_R: Tensor
    """id of the observation before the response; equal for equal observations in the same group"""

    def __post_init__(self) -> None:
        shapes_M = self.return_M.shape, self.group_M.shape
        shapes_R = self.trajectory_R.shape, self.reward_R.shape, self.penalty_R.shape, self.state_R.shape
        assert self.return_M.ndim == 1 and len(set(shapes_M)) == 1, shapes_M
        assert self.trajectory_R.ndim == 1 and len(set(shapes_R)) == 1, shapes_R

    @property
    def group_R(self) -> Tensor:
        """Group of each response."""
        return self.group_M[self.trajectory_R]

    @property
    def score_R(self) -> Tensor:
        """Score of each response: the return of its trajectory minus its own penalty."""
        return self.return_M[self.trajectory_R] - self.penalty_R

    @property
    def alone_R(self) -> Tensor:
        """Whether a response belongs to a trajectory that is alone in its group."""
        return (torch.bincount(self.group_M) < 2)[self.group_R]

    def population(self, over: Over) -> tuple[Tensor, Tensor]:
        """The values over which statistics are computed, and their groups."""
        return (self.score_R, self.group_R) if over == "turns" else (self.return_M, self.group_M)


def group_normalised(batch: StepBatch, *, over: Over = "trajectories", eps: Eps = 1e-6) -> Tensor:
    """GRPO (arXiv 2402.03300): (score - mean of the group) / (sample standard deviation of the group + eps).

    In a group without spread, the difference (which comes from a penalty) is not divided.

    Args:
        over: the population with which a score is compared: `trajectories` or `turns` of the group.
        eps: term that is added to the standard deviation.
    """
    group = _Statistics(*batch.population(over))
    return _advantage(batch, group.scaled(group.excess(batch.score_R, batch.group_R), batch.group_R, eps))


def group_centred(batch: StepBatch, *, over: Over = "trajectories") -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): score - mean of the group.

    Args:
        over: the population with which a score is compared: `trajectories` or `turns` of the group.
    """
    group = _Statistics(*batch.population(over))
    return _advantage(batch, group.excess(batch.score_R, batch.group_R))


def leave_one_out(batch: StepBatch, *, over: Over = "trajectories") -> Tensor:
    """RLOO (arXiv 2402.14740): score - mean of the others: all but its own trajectory, or all but its own turn.

    For n values, own - mean of the others = n / (n - 1) * (own - mean of all).

    Args:
        over: the population with which a score is compared: `trajectories` or `turns` of the group.
    """
    group, group_R = _Statistics(*batch.population(over)), batch.group_R
    own_R = batch.score_R if over == "turns" else batch.return_M[batch.trajectory_R]
    count_R = group.count_G[group_R]
    excess_R = group.excess(own_R, group_R) * count_R / (count_R - 1).clamp(min=1)
    return _advantage(batch, batch.score_R - own_R + excess_R)


def batch_whitened(
    batch: StepBatch, *, over: Over = "trajectories", eps: Eps = 1e-6, group_baseline: bool = False
) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): scores, whitened over the whole batch.

    Args:
        over: the population that is whitened: trajectories or turns.
        eps: term that is added to the standard deviation.
        group_baseline: first subtract the mean of its group from each score (REINFORCE++-baseline in the paper).
    """
    value, group = batch.population(over)
    whole, whole_R = torch.zeros_like(group), torch.zeros_like(batch.trajectory_R)
    if not group_baseline:
        all_scores = _Statistics(value, whole)
        alone_R = torch.full_like(batch.alone_R, len(batch.return_M) < 2)
        scaled_R = all_scores.scaled(all_scores.excess(batch.score_R, whole_R), whole_R, eps)
        return _advantage(batch, scaled_R, alone_R)
    groups = _Statistics(value, group)
    centred = _Statistics(
        groups.excess(value, group), whole
    )  # the mean is 0; subtracting it would add a rounding error
    return _advantage(batch, centred.scaled(groups.excess(batch.score_R, batch.group_R), whole_R, eps))


def step_compared(
    batch: StepBatch,
    *,
    over: Over = "trajectories",
    eps: Eps = 1e-6,
    norm: Literal["std", "mean"] = "std",
    gamma: Annotated[float, FRACTION] = 0.95,
    omega: Annotated[float, NOT_NEGATIVE] = 1.0,
) -> Tensor:
    """GiGPO (arXiv 2505.10978): the advantage of the episode plus omega times the advantage of the turn at its state.

    Turns of a group with the same observation are compared by their discounted return; a state that occurs once adds 0.

    Args:
        over: the population with which a score is compared: `trajectories` or `turns` of the group.
        eps: term that is added to the standard deviation.
        norm: `std` divides both advantages by their standard deviations (ALFWorld); `mean` does not divide (WebShop).
        gamma: discount factor per turn.
        omega: weight of the advantage of the turn.
    """
    episode_R = group_normalised(batch, over=over, eps=eps) if norm == "std" else group_centred(batch, over=over)
    value_R = discounted(batch.reward_R, batch.trajectory_R, gamma) - batch.penalty_R
    state = _Statistics(value_R, batch.state_R)
    step_R = state.excess(value_R, batch.state_R)
    if norm == "std":
        step_R = state.scaled(step_R, batch.state_R, eps)
    return _advantage(batch, episode_R + omega * step_R)


def peer_valued(
    batch: StepBatch,
    *,
    gamma: Annotated[float, FRACTION] = 0.95,
    lam: Annotated[float, FROM_0_TO_1] = 0.95,
    norm: Literal["std", "none"] = "std",
    eps: Eps = 1e-6,
) -> Tensor:
    """GAGPO (arXiv 2605.13217), a reconstruction: GAE over turns, with the value of a state estimated from its peers.

    V(s) is the mean discounted return of all turns of the group with the observation s, so no critic is needed:

        delta_r = reward_r + gamma V(s of the next turn; 0 after the last) - V(s_r)
        A_r     = delta_r + gamma lam A of the next turn

    Then A is normalised over all turns of the group. The end of a trajectory counts as terminal, also if it was truncated. With
    lam = 1 and norm = `none`, A is the turn term of `step_compared` with norm = `mean`. In a state that occurs once, V is the
    turn's own return.

    Only the abstract and summaries of the paper were available: its lambda, the kind of its standard deviation, and its treatment
    of penalties are not known. Here, the penalty of a turn is subtracted from its own A before the normalisation.

    Args:
        gamma: discount factor per turn.
        lam: lambda of GAE; the value of the paper is not known.
        norm: `std` subtracts the mean of the group and divides by its sample standard deviation; `none` does neither.
        eps: term that is added to the standard deviation.
    """
    reward_R = batch.reward_R.double()
    value_R = _Statistics(discounted(reward_R, batch.trajectory_R, gamma), batch.state_R).mean_G[batch.state_R]
    next_value_R = torch.zeros_like(value_R)
    next_value_R[:-1] = value_R[1:] * (batch.trajectory_R[1:] == batch.trajectory_R[:-1])
    delta_R = reward_R + gamma * next_value_R - value_R
    advantage_R = discounted(delta_R, batch.trajectory_R, gamma * lam) - batch.penalty_R
    if norm == "std":
        group = _Statistics(advantage_R, batch.group_R)
        advantage_R = group.scaled(group.excess(advantage_R, batch.group_R), batch.group_R, eps)
    return _advantage(batch, advantage_R)


def outcome_weighted(
    batch: StepBatch,
    *,
    positive: Annotated[float, NOT_NEGATIVE] = 0.1,
    success_above: float = 0.0,
) -> Tensor:
    """W-REINFORCE (arXiv 2506.01347, Eq. 9): `positive` for a turn of a successful trajectory, -1 for one of a failed trajectory.

    There is no baseline, so an advantage does not depend on the group. A trajectory is a success if its return is above
    `success_above`. An environment with partial rewards needs a higher threshold: below its full reward, above all others. The
    penalty of a turn is subtracted.

    Args:
        positive: weight of successes (lambda in the paper): 1 is REINFORCE with rewards +1 and -1; 0 trains only failures.
        success_above: a return above this value is a success.
    """
    failed_M = torch.full_like(batch.return_M, -1.0)
    return failed_M.masked_fill(batch.return_M > success_above, positive)[batch.trajectory_R] - batch.penalty_R


def discounted(reward_R: Tensor, trajectory_R: Tensor, gamma: float) -> Tensor:
    """Discounted return of each turn until the end of its trajectory; each later turn has a factor of gamma."""
    assert reward_R.ndim == 1 and reward_R.shape == trajectory_R.shape, (reward_R.shape, trajectory_R.shape)
    out, later, owner = reward_R.tolist(), 0.0, -1
    owners = trajectory_R.tolist()
    for r in reversed(range(len(out))):
        later = out[r] + (gamma * later if owners[r] == owner else 0.0)
        out[r], owner = later, owners[r]
    return reward_R.new_tensor(out)


class _Statistics:
    """Count, mean and sample standard deviation of each group of a population, in float64."""

    def __init__(self, value: Tensor, group: Tensor):
        assert value.ndim == 1 and value.shape == group.shape, (value.shape, group.shape)
        groups = int(group.max()) + 1 if len(group) else 0
        value = value.double()
        self.count_G = torch.bincount(group, minlength=groups)
        zero_G = value.new_zeros(groups)
        low_G, high_G = (zero_G.scatter_reduce(0, group, value, how, include_self=False) for how in ("amin", "amax"))
        self.mean_G = zero_G.index_add(0, group, value) / self.count_G.clamp(min=1)
        self.mean_G = torch.where(
            low_G == high_G, low_G, self.mean_G
        )  # exact: a computed mean of equal values can be rounded
        squares_G = zero_G.index_add(0, group, (value - self.mean_G[group]) ** 2)
        self.std_G = (squares_G / (self.count_G - 1).clamp(min=1)).sqrt()

    def excess(self, value: Tensor, group: Tensor) -> Tensor:
        """The difference of each value from the mean of its group."""
        return value - self.mean_G[group]

    def scaled(self, excess: Tensor, group: Tensor, eps: float) -> Tensor:
        """The differences in units of the standard deviation of their group; unchanged in a group without spread."""
        return excess / torch.where(self.std_G > 0, self.std_G + eps, 1.0)[group]


def _advantage(batch: StepBatch, excess_R: Tensor, alone_R: Tensor | None = None) -> Tensor:
    """The advantages in the precision of the returns; 0 for a response that has nothing to compare with."""
    alone_R = batch.alone_R if alone_R is None else alone_R
    return torch.where(alone_R, 0.0, excess_R).to(batch.return_M.dtype)
