"""What worker processes gain where environments wait, and cost where they do not. Medians of interleaved rounds.

Thirty-two episodes of five turns in lock-step. An environment that sleeps 50 ms per call stands for one that waits for a
browser or a container; one that sleeps not at all shows what a request costs.

.venv/bin/python tests/bench/workers.py
"""

import statistics
import time
from pathlib import Path

from aem_exp.envs import Task, Turn
from aem_exp.envs.executor import EnvExecutor, SerialExecutor
from aem_exp.envs.workers import WorkerPool

EPISODES, TURNS = 32, 5


class Waiting:
    """A world and its environment: every reset and step takes `seconds`."""

    fingerprint, goal = "waiting", "wait"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{slot}", slot) for slot in range(EPISODES)]

    def env(self) -> "Waiting":
        return Waiting(self.seconds)

    def parse(self, response: str) -> str:
        return response

    def reset(self, task: Task) -> Turn:
        return self.step(task.id)

    def step(self, response: str) -> Turn:
        time.sleep(self.seconds)
        return Turn(f"you said {response}", actions=("wait", "go on"), metrics={"won": 0.0})

    def close(self) -> None: ...


def play(stage: EnvExecutor, world: Waiting) -> float:
    """Seconds that one batch of episodes takes."""
    start = time.perf_counter()
    replies = stage.reset(dict(enumerate(world.tasks("train"))))
    for _ in range(TURNS):
        replies = stage.step(dict.fromkeys(replies, "wait"))
    assert not any(reply.error for reply in replies.values())
    return time.perf_counter() - start


def main(rounds: int = 3) -> None:
    for seconds in (0.05, 0.0):
        world, make = Waiting(seconds), {"_target_": f"{Path(__file__).stem}.Waiting", "seconds": seconds}
        stages: dict[str, EnvExecutor] = {"Serial": SerialExecutor(world)}
        stages |= {f"Workers({count})": WorkerPool(make, count, 60.0) for count in (16, 32)}
        first = {name: play(stage, world) for name, stage in stages.items()}  # processes start
        times: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(rounds):
            for name, stage in stages.items():
                times[name].append(play(stage, world))
        base = statistics.median(times["Serial"])
        print(f"{seconds * 1000:.0f} ms per call, {EPISODES} episodes of {TURNS} turns")
        for name, stage in stages.items():
            median = statistics.median(times[name])
            each = 1000 * median / (EPISODES * (TURNS + 1))
            print(
                f"  {name:<12} {median:7.3f} s  {each:6.2f} ms per call  {base / median:6.2f} x  first {first[name]:6.2f} s"
            )
            stage.close()


if __name__ == "__main__":
    main()
