"""The types of a rollout: an episode to play, the policy's responses, and the resulting trajectory."""

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
    """its next prompt and response would not fit into `env.context_tokens`"""
    CRASHED = "crashed"
    """the environment failed; the reason is in `Trajectory.error`"""


@dataclass(frozen=True)
class Episode:
    """One episode to play."""

    task: Task
    draw: int
    """id of its group: the episodes of one draw of a task form a group"""
    member: int
    """index within the group"""
    key: tuple
    """seeds the sampling of its responses"""


@dataclass
class Response:
    """What the policy generated in one turn, with the environment's reply."""

    prompt: list[int]
    """ids of the tokens in front of the response that are not in the row yet: the whole prompt (`window`), or the tokens since
    the previous response (`full`)"""
    sample: Sample
    """the sampled tokens"""
    observation: str
    """the observation that it responds to"""
    text: str
    """the decoded tokens, as given to the environment"""
    reward: float = 0.0
    valid: bool = True
    """whether the environment could parse it as an action"""
    metrics: dict[str, float] = field(default_factory=dict)
    """the environment's metrics of this turn (see `Turn`)"""
    entropy: float | None = None
    """mean token entropy in nats; None if the sampler does not measure it"""
    advantage: float | None = None
    """advantage before modulation; None until the credit of its step is recorded"""
    alpha: float | None = None
    """coefficient of the modulation; None until the credit of its step is recorded, or without modulation"""


@dataclass
class Trajectory:
    """A played episode."""

    task: Task
    draw: int
    """id of its group: the episodes of one draw of a task form a group"""
    member: int
    """index within the group"""
    responses: list[Response] = field(default_factory=list)
    """one per turn"""
    ended: Ending | Literal[""] = ""
    """why it ended; empty while it is played"""
    error: str = ""
    """why the environment crashed; empty otherwise"""
    goal: str = ""
    """the goal of the episode, as stated by the environment at the start"""

    @property
    def ret(self) -> float:
        """Return of the episode: the exactly rounded sum of its rewards, so that their order does not matter."""
        return math.fsum(r.reward for r in self.responses)

    @property
    def won(self) -> float:
        """Metric `won` of the last turn: 1 if the episode succeeded, else 0."""
        return self.responses[-1].metrics.get("won", 0.0) if self.responses else 0.0

    @property
    def score(self) -> float | None:
        """Metric `score` of the last turn, from 0 to 1; None in environments that report only `won`."""
        return self.responses[-1].metrics.get("score") if self.responses else None

    @property
    def habits(self) -> dict[str, float]:
        """The other metrics of the environment, each averaged over the turns that report it."""
        values: dict[str, list[float]] = {}
        for response in self.responses:
            for name, value in response.metrics.items():
                if name not in OUTCOME_METRICS:
                    values.setdefault(name, []).append(value)
        return {name: sum(of_turns) / len(of_turns) for name, of_turns in values.items()}

    @property
    def tokens(self) -> int:
        """Number of generated tokens."""
        return sum(len(r.sample.ids) for r in self.responses)
