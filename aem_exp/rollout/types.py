"""What is played: an episode to play, the responses of the policy in it, and the trajectory that they make."""

import math
from dataclasses import dataclass, field

from aem_exp.envs import Task
from aem_exp.rollout.sampling.base import Sample

CRASHED, CONTEXT, TURNS, OVER, STOPPED = "crashed", "context", "turns", "over", "stopped"


OUTCOME_METRICS = ("won", "score")  # metrics of a turn that speak of the episode


@dataclass(frozen=True)
class Episode:
    """One game to be played."""

    task: Task
    draw: int
    """Which draw of the step it belongs to: the episodes of one draw are a group."""
    member: int
    """Its number in the group."""
    key: tuple
    """What seeds its sampling."""


@dataclass
class Response:
    """What the policy generated in one turn, and what came of it."""

    prompt: list[int]
    """The tokens in front of it that are not in the row yet: all with a window, those since the last response otherwise."""
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
    """The mean entropy of its tokens, in nats, where the sampler knows it."""
    advantage: float | None = None
    """The advantage before modulation, once the step's credit is assigned."""
    alpha: float | None = None
    """What modulation multiplied the advantage by, once the step's credit is assigned."""


@dataclass
class Trajectory:
    """An episode as it was played."""

    task: Task
    draw: int
    """Which draw of the step it belongs to: the episodes of one draw are a group."""
    member: int
    """Its number in the group."""
    responses: list[Response] = field(default_factory=list)
    ended: str = ""
    """How it ended: over (by the rules), stopped (by the world, before that), turns, context, or crashed."""
    error: str = ""
    """What crashed it."""
    goal: str = ""
    """What the episode asks for, as the world said at its start."""

    @property
    def ret(self) -> float:
        """The episode's return: the sum of its rewards, rounded once; the same rewards in another order are the same return."""
        return math.fsum(r.reward for r in self.responses)

    @property
    def won(self) -> float:
        return self.responses[-1].metrics.get("won", 0.0) if self.responses else 0.0

    @property
    def score(self) -> float | None:
        """How well it went, from 0 to 1, in worlds that know more than won or lost."""
        return self.responses[-1].metrics.get("score") if self.responses else None

    @property
    def habits(self) -> dict[str, float]:
        """The world's other numbers, each the mean over the turns that have it."""
        by_name: dict[str, list[float]] = {}
        for response in self.responses:
            for name, value in response.metrics.items():
                if name not in OUTCOME_METRICS:
                    by_name.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in by_name.items()}

    @property
    def tokens(self) -> int:
        return sum(len(r.sample.ids) for r in self.responses)
