"""Decides which groups a step trains on: DAPO's dynamic sampling (arXiv 2503.14476).

All advantages of a group with equal returns are 0. Such groups can be removed from the step, and more rounds can be played until
enough other groups exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aem_exp.rollout.types import Ending, Trajectory
from aem_exp.training.credit import counted_return


@dataclass(frozen=True)
class DynamicSampling:
    """Settings of dynamic sampling."""

    groups: int = 0
    """number of groups that a step needs; more may be trained"""
    drop_equal: bool = False
    """remove groups with equal returns"""
    rounds: int = 1
    """maximum number of rounds per step"""


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
    """Play rounds until there are enough groups with unequal returns.

    If the maximum number of rounds gives too few, the last round keeps its groups with equal returns, as in verl-agent. If a
    round completes exactly the needed number, its groups with equal returns are dropped. verl-agent keeps them in this case:
    their advantages are 0, but they count in a mean over tokens and in the KL and entropy terms.

    Args:
        play_round: plays the round with this index (from 0).
        mask_truncated: see `CreditRules.mask_truncated`.
    """
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
    returns: dict[int, list[float]] = {}
    for t in played:
        survived = t.ended != Ending.CRASHED and t.responses
        returns.setdefault(t.draw, []).extend([counted_return(t, mask_truncated)] if survived else [])
    informative = {draw for draw, values in returns.items() if len(set(values)) > 1}
    return [t for t in played if t.draw in informative], [t for t in played if t.draw not in informative]
