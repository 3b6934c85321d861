"""Which groups a step trains on: DAPO's dynamic sampling (arXiv 2503.14476).

A group whose returns are all equal has no advantages. Such groups may leave the step, and more rounds may be played until
there are enough others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aem_exp.rollout.types import Ending, Trajectory
from aem_exp.training.credit import counted_return


@dataclass(frozen=True)
class DynamicSampling:
    """The groups that a step trains on, and the rounds of play that it may need for them."""

    groups: int = 0
    """number of groups that a step should train on"""
    drop_equal: bool = False
    """groups of equal returns leave the step"""
    rounds: int = 1
    """rounds of play per step, at most"""


class PlayedStep(NamedTuple):
    """The trajectories of a step."""

    kept: list[Trajectory]
    dropped: list[Trajectory]
    """those of groups that leave the step"""
    rounds: int
    """number of rounds that were played"""


def play_rounds(
    play_round: Callable[[int], list[Trajectory]], sampling: DynamicSampling, mask_truncated: bool
) -> PlayedStep:
    """Play rounds until there are enough informative groups.

    Where all rounds together have too few, the last one is kept whole, as in verl-agent. A round that brings exactly as many as
    are needed ends the play and its equal groups are dropped; verl-agent keeps them in that case. They have no advantage, but
    count in a mean over tokens, and get the KL and entropy terms.
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
    """Split off the groups that teach nothing: equal returns, or fewer than two trajectories that did not crash."""
    returns: dict[int, list[float]] = {}
    for t in played:
        survived = t.ended != Ending.CRASHED and t.responses
        returns.setdefault(t.draw, []).extend([counted_return(t, mask_truncated)] if survived else [])
    informative = {draw for draw, values in returns.items() if len(set(values)) > 1}
    return [t for t in played if t.draw in informative], [t for t in played if t.draw not in informative]
