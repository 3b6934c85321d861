"""Decides which groups a step trains on: DAPO's dynamic sampling (arXiv 2503.14476), or RAGEN-2's filter (arXiv 2604.06268).

All advantages of a group with equal returns are 0. DAPO removes such groups from the step, and more rounds can be played until
enough other groups exist. RAGEN-2 keeps only the groups with the largest spread of returns (`keep_varied_groups`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Final, NamedTuple

from aem_exp.rollout.types import Ending, Trajectory
from aem_exp.training.credit import AssignedCredit, counted_return

VARIANCE_MARGIN: Final = 0.01  # RAGEN-2's code subtracts it from the sum of standard deviations that must be reached


@dataclass(frozen=True)
class DynamicSampling:
    """Settings of dynamic sampling."""

    groups: int = 0
    """number of groups that a step needs; more may be trained"""
    drop_equal: bool = False
    """remove groups with equal returns"""
    rounds: int = 1
    """maximum number of rounds per step"""
    keep_variance: float | None = None
    """share of the summed standard deviations that the kept groups reach, see `keep_varied_groups`; None: no such filter"""


class PlayedStep(NamedTuple):
    """The trajectories of a step."""

    kept: list[Trajectory]
    """trajectories of the groups that the step trains on"""
    dropped: list[Trajectory]
    """trajectories of removed groups"""
    rounds: int
    """number of rounds that were played"""


def play_rounds(
    play_round: Callable[[int], list[Trajectory]], sampling: DynamicSampling, mask_truncated: bool
) -> PlayedStep:
    """Play rounds until there are enough groups with unequal returns; with `keep_variance`, play one round.

    If the maximum number of rounds gives too few, the last round keeps its groups with equal returns, as in verl-agent. If a
    round completes exactly the needed number, its groups with equal returns are dropped. verl-agent keeps them in this case:
    their advantages are 0, but they count in a mean over tokens and in the KL and entropy terms.

    Args:
        play_round: plays the round with this index (from 0).
        mask_truncated: see `CreditRules.mask_truncated`.
    """
    if sampling.keep_variance is not None:
        return PlayedStep(*keep_varied_groups(play_round(0), sampling.keep_variance, mask_truncated), 1)
    kept: list[Trajectory] = []
    dropped: list[Trajectory] = []
    for number in range(sampling.rounds):
        played, equal = play_round(number), list[Trajectory]()
        if sampling.drop_equal:
            played, equal = drop_uninformative_groups(played, mask_truncated)
        kept, dropped = kept + played, dropped + equal
        if len({t.draw for t in kept}) >= sampling.groups:
            break
    else:
        if sampling.rounds > 1 or not kept:
            kept, dropped = kept + equal, dropped[: len(dropped) - len(equal)]
    return PlayedStep(kept, dropped, number + 1)


def drop_uninformative_groups(
    played: Sequence[Trajectory], mask_truncated: bool = False
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Split trajectories into those of informative groups and the others.

    A group is not informative if its returns are all equal, or if fewer than two of its trajectories did not crash.

    Returns:
        (kept, dropped)
    """
    returns = _returns_by_group(played, mask_truncated)
    informative = {draw for draw, values in returns.items() if len(set(values)) > 1}
    return _split(played, informative)


def keep_varied_groups(
    played: Sequence[Trajectory], share: float, mask_truncated: bool = False
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Split trajectories into those of the groups with the largest spread of returns, and the others.

    RAGEN-2's filter (arXiv 2604.06268), as its code does it: the score of a group is the sample standard deviation of its
    returns, although its option is called variance. The groups with the largest scores are kept until their sum reaches `share`
    of the sum of all scores, minus 0.01. A group with equal returns is never kept. If the sum of all scores is at most
    0.01 / `share`, no group is kept. The margin of 0.01 does not depend on the scale of the returns.

    Relation to DAPO's filter (`drop_uninformative_groups`): this filter keeps the same groups if and only if the smallest score
    above 0 exceeds (1 - share) x sum + 0.01; otherwise it keeps fewer. With returns of 0 and 1, scores are nearly equal, so for a
    share of 0.9 the two are the same only in steps with less than about ten groups of unequal returns.

    Returns:
        (kept, dropped)
    """
    returns = _returns_by_group(played, mask_truncated)
    score = {draw: stdev(values) if len(set(values)) > 1 else 0.0 for draw, values in returns.items()}
    needed = share * sum(score.values()) - VARIANCE_MARGIN
    chosen: set[int] = set()
    reached = 0.0
    for draw in sorted(score, key=lambda draw: -score[draw]):
        if reached >= needed or score[draw] <= 0:
            break
        chosen.add(draw)
        reached += score[draw]
    return _split(played, chosen)


def loss_scale(sampling: DynamicSampling, credit: AssignedCredit) -> float:
    """The factor of the loss: the share of groups that `keep_variance` kept; 1 without this filter.

    The loss of a step with few kept groups is then not larger than that of a step with many. In RAGEN-2's code, the factor is an
    option that is off by default, and it scales only the advantages. Here it scales the whole loss, so that the KL term and the
    entropy bonus do not gain weight. The section of the paper was not available to us.
    """
    if sampling.keep_variance is None:
        return 1.0
    played, dropped = ({t.draw for t in part} for part in (credit.played, credit.dropped))
    return 1 - len(dropped) / max(1, len(played))


def _returns_by_group(played: Sequence[Trajectory], mask_truncated: bool) -> dict[int, list[float]]:
    """The counted returns of each group, without trajectories that crashed or have no response."""
    returns: dict[int, list[float]] = {}
    for t in played:
        survived = t.ended != Ending.CRASHED and t.responses
        returns.setdefault(t.draw, []).extend([counted_return(t, mask_truncated)] if survived else [])
    return returns


def _split(played: Sequence[Trajectory], chosen: set[int]) -> tuple[list[Trajectory], list[Trajectory]]:
    return [t for t in played if t.draw in chosen], [t for t in played if t.draw not in chosen]
