"""The contract of environments.

A `World` lists the tasks of each split and makes text environments; an environment parses the model's responses, applies its
own rules and pays its own rewards, and takes all randomness from the task, so that all members of a group play the same
game.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, overload

from aem_exp.core.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One task of a split."""

    id: str
    seed: int = 0
    """The environment's only source of randomness."""
    kind: str = ""
    """Its type, by which evaluation breaks results down."""
    payload: dict[str, Any] = field(default_factory=dict)
    """What else the environment needs, as JSON can hold it."""


@dataclass(frozen=True)
class Turn:
    """The state of an episode after a reset or a step."""

    observation: str
    """The text that the policy is shown."""
    reward: float = 0.0
    """The reward of the step (0.0 after a reset)."""
    terminated: bool = False
    """The episode ended by the environment's own rules (won or lost)."""
    truncated: bool = False
    """The environment cut the episode short."""
    valid: bool = True
    """The response had the form of an action."""
    actions: tuple[str, ...] | None = None
    """The admissible actions, if the environment lists them."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers to log. `won` (0 or 1) is the success that evaluation reports and `score` (0 to 1) a finer one; both are of the
    episode, as its last turn has them, and so are those whose names begin with `end_`, which only the last turn has. All
    others are of the turn, and averaged over turns."""

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


class TextEnv(Protocol):
    """One environment, which has one episode at a time and is reused by `reset`.

    `goal` is the goal of this episode in the environment's own words (set by `reset`). `parse` returns the action of a response
    as later prompts quote it, without thinking and tags; it never raises.
    """

    goal: str

    def parse(self, response: str) -> str: ...

    def reset(self, task: Task) -> Turn: ...

    def step(self, response: str) -> Turn: ...

    def close(self) -> None: ...


class World(Protocol):
    """The tasks of each split, and environments for them: what a `conf/env/*.yaml` names with `make._target_`.

    `fingerprint` changes whenever the same task id could play differently (rules, grammar, data); runs with different
    fingerprints are never compared. Optional attributes:

    - `own_process = True`: its environments are stepped in a worker process even if `launch.workers` is 0;
    - `external = True`: an environment starts a program (a JVM, a container, a sandbox) or connects to a server; none is
      then made to try the world before a run (see `dry_run`);
    - `prepare(say, **keywords of make)`: a class method that fetches what it needs;
    - `words() -> Iterable[str]`: the vocabulary of a small policy (see `tiny`);
    - `expert(env, random: Random, noise: float, shyness: float) -> str`: the response of its scripted expert;
    - `oracle(env) -> str`: the response of an expert that knows the solution;
    - `rehearse()`: an environment for demonstrations, which need no reward, if scoring is slow.
    """

    fingerprint: str
    splits: tuple[str, ...]  # train, and the panels

    def tasks(self, split: str) -> Sequence[Task]: ...

    def env(self) -> TextEnv: ...


def split_sizes(default: Mapping[str, int], given: Mapping[str, int] | None, most: int | None = None) -> dict[str, int]:
    """Tasks per split: the default's, replaced by those that are given.

    Raises:
        ConfigError: there is no such split, or it would have no task, or more than `most`.
    """
    chosen = {**default, **(given or {})}
    for split, size in chosen.items():
        if split not in default or size < 1 or (most is not None and size > most):
            bounds = "at least 1 each" if most is None else f"1 to {most}"
            raise ConfigError(f"env.make.sizes.{split}", size, f"give {', '.join(default)} {bounds}")
    return chosen


class LazyTasks(Sequence[Task]):
    """Tasks that are made on access, the same ones every time."""

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
