"""From trajectories to rows, which a trainer sees: one per turn, or one per trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from aem_exp.rollout.types import Trajectory


@dataclass
class Row:
    """What the trainer sees: a prompt, then a completion."""

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    """1 on the tokens of the completion that the policy sampled, 0 on the others."""
    logps: list[float]
    """The sampler's log-prob of each token of the completion, 0 where it sampled none; empty where it gives none."""
    entropies: list[float]
    """The sampler's entropy at each token of the completion, in nats, as `logps`."""
    trajectory: int
    """The index of its trajectory among those of the step."""
    turns: list[int]
    """The turns whose responses it holds, in order."""


def build_rows(trajectories: Sequence[Trajectory], history: str) -> list[Row]:
    """The rows of a step, trajectory by trajectory and turn by turn."""
    out: list[Row] = []
    for index, trajectory in enumerate(trajectories):
        turns = [
            Row(r.prompt, r.sample.ids, [1] * len(r.sample.ids), r.sample.logps, r.sample.entropies, index, [turn])
            for turn, r in enumerate(trajectory.responses)
        ]
        out += [_merge_turns(turns)] if history == "full" and turns else turns
    return out


def _merge_turns(turns: list[Row]) -> Row:
    """One row of all turns: what stood between two responses becomes part of the completion, masked."""
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
