"""A world with slow steps, as in containers and browsers. It imports little, because worker processes import it."""

import time
from random import Random

from aem_exp.envs import Task, Turn

WORDS = [chr(ord("a") + i) for i in range(12)]  # as in `toy`


class DelayedWorld:
    """Plays `turns` turns. Each takes between `low` and `high` seconds, which depends on the task and the turn."""

    fingerprint = "patient"

    def __init__(self, low: float = 0.05, high: float = 0.05, turns: int = 4) -> None:
        self.low, self.high, self.turns = low, high, turns

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{i}", i) for i in range(64)]

    def env(self) -> "DelayedEnv":
        return DelayedEnv(self)


class DelayedEnv:
    goal = "wait"

    def __init__(self, world: DelayedWorld) -> None:
        self.world = world

    def parse(self, response: str) -> str:
        return response[:5]

    def reset(self, task: Task) -> Turn:
        self.seed, self.left = task.seed, self.world.turns
        return Turn("hello " + WORDS[task.seed % 12])

    def step(self, response: str) -> Turn:
        time.sleep(Random(f"{self.seed} {self.left}").uniform(self.world.low, self.world.high))
        self.left -= 1
        return Turn("go " + (response[:1] or "z"), terminated=self.left == 0, metrics={"won": 0.0})

    def close(self) -> None: ...
