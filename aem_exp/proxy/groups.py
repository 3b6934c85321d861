"""States of real rollout groups, and the coefficients that AEM has there.

Training tasks are played in groups, like in a training step. In each group, some responses are chosen, all with equal
probability. Each chosen response is one of the samples that the policy could have given at its state. So at this state other
samples are drawn, and each in turn takes the place of the response in the group: its alpha is the coefficient that AEM would have
given it there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.config import Experiment
from aem_exp.core import disk
from aem_exp.core.errors import RunError
from aem_exp.envs import World
from aem_exp.evaluate.states import SampledState, state_of_turn

if TYPE_CHECKING:
    from aem_exp.rollout.play import Rollout
    from aem_exp.rollout.sampling.base import Sampler
    from aem_exp.rollout.types import Episode, Trajectory

GROUPS = "groups.json"
STATES_PER_GROUP = 4  # at most


@dataclass(frozen=True)
class GroupState:
    """The place of a state in its group."""

    group: int
    """index of the group"""
    response: int
    """index of the response that is replaced, among all responses of the group"""
    turns: int
    """number of turns of its episode"""


@dataclass(frozen=True)
class PlayedGroups:
    """The groups, and the chosen states."""

    entropies: list[list[float]]
    """mean token entropy of all responses of each group, in nats"""
    states: list[GroupState]
    """one for each sampled state, in the same order"""


def count_groups(states: int) -> int:
    """Number of groups that are played for this number of states."""
    return -(-states // STATES_PER_GROUP)


def play_groups(
    experiment: Experiment, world: World, states: int, rollout: "Rollout", sampler: "Sampler"
) -> tuple[list[SampledState], PlayedGroups]:
    """Play groups of training tasks, and choose states.

    Raises:
        RunError: no episode could be played.
    """
    from aem_exp.rollout.sampling.base import keyed_generator
    from aem_exp.rollout.types import Ending

    played = rollout.play(_draw_groups(experiment, world, count_groups(states)), sampler)
    by_group: dict[int, list[Trajectory]] = {}
    for t in played:
        if t.ended != Ending.CRASHED and t.responses:
            by_group.setdefault(t.draw, []).append(t)
    chosen, entropies, places = list[SampledState](), list[list[float]](), list[GroupState]()
    for members in by_group.values():
        responses = [(t, turn) for t in members for turn in range(len(t.responses))]
        wanted = min(states - len(chosen), STATES_PER_GROUP, len(responses))
        rng = keyed_generator(("proxy groups", members[0].draw))
        for index in sorted(rng.choice(len(responses), wanted, replace=False).tolist()):
            t, turn = responses[index]
            chosen.append(state_of_turn(t, turn, experiment.env))
            places.append(GroupState(len(entropies), index, len(t.responses)))
        entropies.append([t.responses[turn].entropy or 0.0 for t, turn in responses])
    if not chosen:
        raise RunError("no episode of the training tasks could be played", "env")
    return chosen, PlayedGroups(entropies, places)


def _draw_groups(experiment: Experiment, world: World, groups: int) -> list["Episode"]:
    """The episodes of groups of training tasks; the same for all policies."""
    from aem_exp.rollout.sampling.base import keyed_generator
    from aem_exp.rollout.types import Episode

    tasks = world.tasks("train")
    rng = keyed_generator(("proxy groups", experiment.seed))
    chosen = rng.choice(len(tasks), groups, replace=groups > len(tasks))
    return [
        Episode(tasks[int(index)], draw, member, ("proxy groups", experiment.seed, draw, member))
        for draw, index in enumerate(chosen)
        for member in range(experiment.trainer.group_size)
    ]


def write_groups(folder: Path, played: PlayedGroups) -> None:
    disk.write_atomically(folder / GROUPS, json.dumps(asdict(played)))


def read_groups(folder: Path) -> PlayedGroups:
    """Read the groups of a folder.

    Raises:
        DamagedFileError: the file has another content.
    """
    content = disk.read_json(folder / GROUPS, "entropies", "states")
    try:
        return PlayedGroups(content["entropies"], [GroupState(**state) for state in content["states"]])
    except TypeError as error:
        raise disk.damaged_file_error(folder / GROUPS, error) from error


def summarise_groups(
    sampled: Sequence[dict[str, Any]], played: PlayedGroups, gates: dict[str, float], lam: float
) -> dict[str, Any]:
    """The statistics of the samples at states of groups, for each gate."""
    import numpy as np
    import torch

    from aem_exp.proxy import statistics
    from aem_exp.training import diagnostics

    samples = len(sampled[0]["entropy"])
    entropy_R, surprisal_R, tokens_R = (
        torch.tensor([v for s in sampled for v in s[key]], dtype=torch.float64)
        for key in ("entropy", "surprisal", "tokens")
    )
    state_R = torch.arange(len(sampled)).repeat_interleave(samples)
    relative_R = diagnostics.relative_surprisal(surprisal_R, entropy_R * tokens_R, state_R)
    turn_S = np.array([s["turn"] for s in sampled], float)
    facts = {
        "relative_R": relative_R.numpy(),
        "entropy_R": (entropy_R * tokens_R).view(-1, samples).mean(1).repeat_interleave(samples).numpy(),
        "tokens_R": tokens_R.numpy(),
        "turn_R": turn_S.repeat(samples),
        "position_R": (turn_S / [place.turns for place in played.states]).repeat(samples),
        "state_R": state_R.numpy(),
        "group_S": np.array([place.group for place in played.states]),
    }
    alphas = {name: replaced_coefficients(sampled, played, gate, lam) for name, gate in gates.items()}
    out: dict[str, Any] = {
        name: statistics.group_validity(np.array(alpha_R), **facts) | {"open": float(np.mean(np.array(alpha_R) != 1))}
        for name, alpha_R in alphas.items()
    }
    variances = {
        name: float(value_R.view(-1, samples).var(1).mean())
        for name, value_R in (("surprisal", surprisal_R), ("token_entropies", entropy_R * tokens_R))
    }
    return {"states": len(sampled), "groups": len(played.entropies), "variance_within_states": variances, **out}


def replaced_coefficients(
    sampled: Sequence[dict[str, Any]], played: PlayedGroups, gate: float, lam: float
) -> list[float]:
    """Alpha of each sample in the group of its state, in which it takes the place of the played response."""
    import torch

    from aem_exp import aem

    out: list[float] = []
    for state, place in zip(sampled, played.states, strict=True):
        group = torch.tensor(played.entropies[place.group])
        samples = len(state["entropy"])
        groups = group.repeat(samples, 1)
        groups[:, place.response] = torch.tensor(state["entropy"])
        scope = torch.arange(samples).repeat_interleave(len(group))
        alphas = aem.coefficients(groups.flatten(), scope, lam, gate).view(samples, -1)
        out += alphas[:, place.response].tolist()
    return out
