"""States at which responses are sampled: turns of played episodes, with the exact tokens in front of the response."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp.config import Env
from aem_exp.core import disk

if TYPE_CHECKING:
    from aem_exp.rollout.sampling.base import Sample, Sampler
    from aem_exp.rollout.types import Trajectory

STATES = "states.json"


@dataclass(frozen=True)
class SampledState:
    """A state at which responses are sampled."""

    task: str
    """id of the task"""
    member: int
    """the repeat of the task whose episode passed through the state"""
    turn: int
    """index of the turn in this episode"""
    prompt: list[int]
    """ids of all tokens in front of the response"""
    budget: int
    """maximum number of tokens of a response"""


def pick_state(trajectory: "Trajectory", env: Env) -> list[SampledState]:
    """Choose one turn of an episode, with equal probability; an empty list if the episode crashed or has no turn."""
    from aem_exp.rollout.sampling.base import keyed_generator
    from aem_exp.rollout.types import Ending

    t = trajectory
    if t.ended == Ending.CRASHED or not t.responses:
        return []
    turn = int(keyed_generator(("proxy", t.task.id, t.member)).integers(len(t.responses)))
    return [state_of_turn(t, turn, env)]


def state_of_turn(trajectory: "Trajectory", turn: int, env: Env) -> SampledState:
    """The state of one turn of an episode."""
    t = trajectory
    prompt = list(t.responses[turn].prompt)
    if env.history == "full":
        before = [token for r in t.responses[:turn] for token in (*r.prompt, *r.sample.ids)]
        prompt = before + prompt
    return SampledState(t.task.id, t.member, turn, prompt, min(env.response_tokens, env.context_tokens - len(prompt)))


def sample_at_states(
    states: Sequence[SampledState], samples: int, sampler: "Sampler", purpose: str = "proxy"
) -> "list[list[Sample]]":
    """Sample `samples` responses at each state. The samples of a state do not depend on the other states."""
    slots = [(state, k) for state in states for k in range(samples)]
    sampled = sampler.session().generate(
        range(len(slots)),
        [state.prompt for state, _ in slots],
        [(purpose, state.task, state.member, state.turn, k) for state, k in slots],
        [state.budget for state, _ in slots],
    )
    return [sampled[i * samples : (i + 1) * samples] for i in range(len(states))]


def read_states(folder: Path) -> list[SampledState]:
    """Read the states of a folder.

    Raises:
        DamagedFileError: the file has another content.
    """
    try:
        return [SampledState(**state) for state in json.loads((folder / STATES).read_text())]
    except (ValueError, TypeError) as error:
        raise disk.damaged_file_error(folder / STATES, error) from error
