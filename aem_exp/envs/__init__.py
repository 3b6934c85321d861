"""The contract between the framework and an environment.

A `World` lists the tasks of each split and makes environments. A `TextEnv` plays one episode at a time: it parses the policy's
responses, applies its own rules and pays its own rewards. It takes all randomness from the task, so that all members of a
group play the same game.

A minimal world, in a file `guess.py`:

    from collections.abc import Sequence
    from random import Random

    from aem_exp.envs import LazyTasks, Task, Turn


    class GuessEnv:
        goal = "guess a number from 1 to 8"

        def parse(self, response: str) -> str:
            return response.strip()

        def reset(self, task: Task) -> Turn:
            self.number = Random(task.seed).randint(1, 8)
            return Turn("Guess a number from 1 to 8.", metrics={"won": 0.0})

        def step(self, response: str) -> Turn:
            guess = self.parse(response)
            if not guess.isdecimal():
                return Turn("Answer with a number.", valid=False, metrics={"won": 0.0})
            won = int(guess) == self.number
            hint = "higher" if int(guess) < self.number else "lower"
            return Turn("right" if won else hint, reward=float(won), terminated=won, metrics={"won": float(won)})

        def close(self) -> None:
            pass


    class GuessWorld:
        fingerprint = "guess-1"  # raise the number when the rules change
        splits = ("train", "dev", "test")

        def tasks(self, split: str) -> Sequence[Task]:
            first_seed = 10**6 * self.splits.index(split)  # no seed is in two splits
            return LazyTasks(500, lambda index: Task(f"{split}-{index}", seed=first_seed + index))

        def env(self) -> GuessEnv:
            return GuessEnv()

Its config, `env/guess.yaml` in a folder that `--config-dir` names:

    name: guess
    make: {_target_: guess.GuessWorld}
    history: full
    max_turns: 4
    response_tokens: 8
    context_tokens: 256
    prompt: {first: "{observation}", next: "{observation}"}

Before a run, the framework checks the world against this contract and plays two episodes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, overload

from aem_exp.core.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One task of a split."""

    id: str
    """A name that no other task of the world has."""
    seed: int = 0
    """The environment's only source of randomness."""
    kind: str = ""
    """The type of the task. Evaluation also reports results for each kind."""
    payload: dict[str, Any] = field(default_factory=dict)
    """Further data for the environment. JSON must preserve it: dicts with string keys, lists, strings, numbers, bools, None."""


@dataclass(frozen=True)
class Turn:
    """The state of an episode after a reset or a step."""

    observation: str
    """The text that the policy reads."""
    reward: float = 0.0
    """The reward of this step; 0.0 after a reset."""
    terminated: bool = False
    """The episode ended by the environment's own rules (won or lost)."""
    truncated: bool = False
    """The environment stopped the episode early, for example at a time limit."""
    valid: bool = True
    """The response had the form of an action."""
    actions: tuple[str, ...] | None = None
    """The admissible actions; None if the environment does not list them."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers to log.

    - `won` (0 or 1) is the success that evaluation reports; set it in every turn of a step. `score` (0 to 1) is a finer measure
      of success. For both, the value of the last turn counts for the episode.
    - Names that begin with `end_` are metrics of the episode, too. Only the last turn has them.
    - All other metrics belong to their turn and are averaged over turns.
    """

    @property
    def done(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or self.truncated


class TextEnv(Protocol):
    """One environment. It plays one episode at a time; `reset` starts the next episode.

    `reset` and `step` may raise: the trajectory is then excluded from the loss, and a new environment replaces this one.
    """

    goal: str
    """The goal of the current episode, in the environment's own words. `reset` sets it if it depends on the task."""

    def parse(self, response: str) -> str:
        """The action in a response, without thinking and tags, as later prompts quote it. Must not raise for any text."""

    def reset(self, task: Task) -> Turn:
        """Start an episode of a task and return its first observation."""

    def step(self, response: str) -> Turn:
        """Carry out the action in a response."""

    def close(self) -> None:
        """Release resources."""


class World(Protocol):
    """The tasks of each split, and environments for them. A `conf/env/*.yaml` names the class as `make._target_`.

    Optional attributes and methods:

    - `own_process = True`: step the environments in a worker process even if `launch.workers` is 0.
    - `external = True`: an environment starts a program (a JVM, a container, a sandbox) or connects to a server. The check
      before a run then plays no episode (see `aem_exp.jobs.world_check`).
    - `prepare(say, **keywords)`: a class method that downloads or builds data; `keywords` are those of `make`, and `say`
      prints a line. `python -m aem_exp.prepare` calls it.
    - `words() -> Iterable[str]`: the vocabulary of a small policy (see `aem_exp.tiny`).
    - `expert(env, random: Random, noise: float, shyness: float) -> str`: the response of a scripted expert, which a small
      policy learns to imitate. With probability `noise` it acts at random; with probability `shyness` it replaces a decisive
      action by a worse one.
    - `oracle(env) -> str`: the response of an expert that knows the solution.
    - `forgeries(task) -> Sequence[aem_exp.envs.audit.Forgery]`: episodes with a known result, for the audit of the grader.
    - `random_action(env, random: Random) -> str`: the response of the random agent, if turns do not list actions.
    - `episodes_at_once: int`: the largest number of episodes that evaluation and demonstrations play at the same time. Useful if
      an environment needs much memory.
    - `rehearse() -> TextEnv`: an environment for demonstrations, which need no reward. Useful if scoring is slow.
    """

    fingerprint: str
    """Must change whenever the same task id could play differently (rules, grammar, data). Runs with different fingerprints
    are never compared."""
    splits: tuple[str, ...]
    """`train`, and the names of the panels (held-out splits)."""

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, as a list or another sequence such as `LazyTasks`; the same ones in every process."""

    def env(self) -> TextEnv:
        """A new environment."""


def fingerprint_of(name: str, settings: Any) -> str:
    """The fingerprint of a world with these settings, which JSON can represent."""
    return f"{name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"


def split_sizes(
    default: Mapping[str, int], sizes: Mapping[str, int] | None, limit: int | None = None
) -> dict[str, int]:
    """The number of tasks of each split: the default, replaced by `sizes`.

    Raises:
        ConfigError: a split of `sizes` does not exist, or its size is below 1 or above `limit`.
    """
    merged = {**default, **(sizes or {})}
    for split, size in merged.items():
        if split not in default or size < 1 or (limit is not None and size > limit):
            bounds = "at least 1 task" if limit is None else f"1 to {limit} tasks"
            raise ConfigError(
                f"env.make.sizes.{split}", size, f"the splits are {', '.join(default)}; each has {bounds}"
            )
    return merged


class LazyTasks(Sequence[Task]):
    """A sequence of tasks that are built on access.

    Args:
        count: the number of tasks.
        draw: builds the task of an index. It must return the same task every time.
    """

    def __init__(self, count: int, draw: Callable[[int], Task]) -> None:
        self._size, self._draw = count, draw

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._draw(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(index)
        return self._draw(index % self._size)
