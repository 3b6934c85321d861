"""What is played: an episode to play, the responses of the policy in it, and the trajectory that they make."""

import math
from dataclasses import dataclass, field

from aem_exp.envs import Task
from aem_exp.rollout.sampling.base import Sample

CRASHED, CONTEXT, TURNS, OVER, STOPPED = "crashed", "context", "turns", "over", "stopped"


OUTCOME_METRICS = ("won", "score")  # metrics of a turn that speak of the episode


@dataclass(frozen=True)
class Episode:
    """One game to be played: `draw` names its group, `key` seeds its sampling."""

    task: Task
    draw: int
    member: int
    key: tuple


@dataclass
class Response:
    """What the policy said in one turn, and what came of it.

    `prompt` holds the tokens in front of it that are not in the row yet: all of them with a window, those since the
    previous response with full history. `entropy` is the mean over its tokens, in nats, where the sampler knows it;
    `advantage` (before modulation) and `alpha` are known once the step's credit is assigned.
    """

    prompt: list[int]
    sample: Sample
    observation: str
    text: str
    reward: float = 0.0
    valid: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    advantage: float | None = None
    alpha: float | None = None


@dataclass
class Trajectory:
    """An episode as it was played. `ended`: over (by the rules), stopped (by the world, before that), turns, context, or
    crashed (with `error`).

    `goal` is what it asked for, as the world said at its start.
    """

    task: Task
    draw: int
    member: int
    responses: list[Response] = field(default_factory=list)
    ended: str = ""
    error: str = ""
    goal: str = ""

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
        told: dict[str, list[float]] = {}
        for response in self.responses:
            for name, value in response.metrics.items():
                if name not in OUTCOME_METRICS:
                    told.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in told.items()}

    @property
    def tokens(self) -> int:
        return sum(len(r.sample.ids) for r in self.responses)
