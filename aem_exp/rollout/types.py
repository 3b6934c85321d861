"""The types of a rollout: an episode to play, the responses of the policy in it, and the trajectory that they make."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from aem_exp.envs import Task
from aem_exp.rollout.sampling.base import Sample

OUTCOME_METRICS = ("won", "score")
"""metrics of a turn that describe the whole episode"""


class Ending(StrEnum):
    """Why an episode ended. The values are those of `episodes.parquet` and of the metrics `train/ended_*`."""

    OVER = "over"
    """the environment terminated it, by its own rules"""
    STOPPED = "stopped"
    """the environment truncated it, before its rules ended it"""
    TURNS = "turns"
    """it reached `env.max_turns`"""
    CONTEXT = "context"
    """its next prompt and response do not fit into `env.context_tokens`"""
    CRASHED = "crashed"
    """the environment failed; `Trajectory.error` says how"""


@dataclass(frozen=True)
class Episode:
    """One episode to play."""

    task: Task
    draw: int
    """the group that it belongs to: one draw of a task"""
    member: int
    """its index in the group"""
    key: tuple
    """seeds the sampling of its responses"""


@dataclass
class Response:
    """What the policy generated in one turn, and what the environment replied."""

    prompt: list[int]
    """tokens in front of the response that are not in the row yet: all of them with a window, those since the previous
    response with full history"""
    sample: Sample
    observation: str
    """The text that it responds to."""
    text: str
    reward: float = 0.0
    valid: bool = True
    """Whether the environment could read it as an action."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The numbers that the environment gave for this turn (see `Turn`)."""
    entropy: float | None = None
    """mean token entropy in nats; None where the sampler does not measure it"""
    advantage: float | None = None
    """advantage before modulation; None until the credit of its step is recorded"""
    alpha: float | None = None
    """coefficient of the modulation; None until then, and where nothing is modulated"""


@dataclass
class Trajectory:
    """An episode as it was played."""

    task: Task
    draw: int
    """Which draw of the step it belongs to: the episodes of one draw are a group."""
    member: int
    """Its number in the group."""
    responses: list[Response] = field(default_factory=list)
    ended: Ending | Literal[""] = ""
    """why it ended; empty while it is played"""
    error: str = ""
    """how the environment failed, where it crashed"""
    goal: str = ""
    """what the episode asks for, as the environment stated it at the start"""

    @property
    def ret(self) -> float:
        """The episode's return: the sum of its rewards, rounded once; the same rewards in another order are the same return."""
        return math.fsum(r.reward for r in self.responses)

    @property
    def won(self) -> float:
        return self.responses[-1].metrics.get("won", 0.0) if self.responses else 0.0

    @property
    def score(self) -> float | None:
        """How well it went, from 0 to 1; None in environments that report only `won`."""
        return self.responses[-1].metrics.get("score") if self.responses else None

    @property
    def habits(self) -> dict[str, float]:
        """The environment's other metrics, each the mean over the turns that have it."""
        values: dict[str, list[float]] = {}
        for response in self.responses:
            for name, value in response.metrics.items():
                if name not in OUTCOME_METRICS:
                    values.setdefault(name, []).append(value)
        return {name: sum(of_turns) / len(of_turns) for name, of_turns in values.items()}

    @property
    def tokens(self) -> int:
        return sum(len(r.sample.ids) for r in self.responses)
