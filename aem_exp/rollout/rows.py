"""Converts trajectories to the rows of a trainer: one row per turn (`window`) or one per trajectory (`full`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from aem_exp.rollout.types import Trajectory


@dataclass
class Row:
    """One training sequence: a prompt, then a completion of T tokens."""

    prompt: list[int]
    """token ids"""
    completion: list[int]
    """token ids, length T: the responses, and with full history the template and observation tokens between them"""
    mask: list[int]
    """length T: 1 on tokens that the policy sampled, 0 on template and observation tokens"""
    logps: list[float]
    """length T: the sampler's log-prob of each token, 0 where `mask` is 0; empty if the sampler reports none"""
    entropies: list[float]
    """length T: the sampler's entropy at each token in nats, 0 where `mask` is 0; empty if the sampler reports none"""
    trajectory: int
    """index of its trajectory in the list given to `build_rows`"""
    turns: list[int]
    """indices of the turns whose responses it contains, in order"""


def build_rows(trajectories: Sequence[Trajectory], history: str) -> list[Row]:
    """Build the rows of trajectories, ordered by trajectory, then by turn."""
    out: list[Row] = []
    for index, trajectory in enumerate(trajectories):
        turns = [
            Row(r.prompt, r.sample.ids, [1] * len(r.sample.ids), r.sample.logps, r.sample.entropies, index, [turn])
            for turn, r in enumerate(trajectory.responses)
        ]
        out += [_merge_turns(turns)] if history == "full" and turns else turns
    return out


def _merge_turns(turns: list[Row]) -> Row:
    """Merge all turns into one row; the tokens between two responses become masked tokens of the completion."""
    row = replace(turns[0], turns=[t.turns[0] for t in turns])
    for turn in turns[1:]:
        gap = [0] * len(turn.prompt)
        row.completion = row.completion + turn.prompt + turn.completion
        row.mask = row.mask + gap + turn.mask
        if turn.logps:
            row.logps = row.logps + [0.0 for _ in gap] + turn.logps
        if turn.entropies:
            row.entropies = row.entropies + [0.0 for _ in gap] + turn.entropies
    return row
