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
    """One game to play."""

    id: str
    seed: int = 0
    """The environment's only source of randomness."""
    kind: str = ""
    """Its type, in breakdowns of success."""
    payload: dict[str, Any] = field(default_factory=dict)
    """What the environment needs to set the game up."""


@dataclass(frozen=True)
class Turn:
    """What an environment says after a reset or a step."""

    observation: str
    """The text that the policy is shown."""
    reward: float = 0.0
    """The reward of the step that led here (0.0 after a reset)."""
    terminated: bool = False
    """The episode ended by the world's own rules (won or lost)."""
    truncated: bool = False
    """The world cut the episode short."""
    valid: bool = True
    """The response could be read as an action of this world."""
    actions: tuple[str, ...] | None = None
    """The admissible actions, where the world lists them."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers to log.

    `won` (0 or 1) is the success that evaluation reports and `score` (0 to 1) a finer one, both of the episode, as its last
    turn says; so are those whose names begin with `end_`, which only the last turn has. All others are of the turn, and
    averaged over turns.
    """

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


class TextEnv(Protocol):
    """One world, played one episode at a time; reused by `reset`.

    `goal` is what this episode asks for, in the world's own words (set by `reset`). `parse` is the action a response
    stands for, as later prompts quote it: thinking and tags stripped, never raising.
    """

    goal: str

    def parse(self, response: str) -> str: ...

    def reset(self, task: Task) -> Turn: ...

    def step(self, response: str) -> Turn: ...

    def close(self) -> None: ...


class World(Protocol):
    """What a `conf/env/*.yaml` names with `make._target_`: the tasks of each split, and environments to play them in.

    `fingerprint` changes whenever the same task id could play differently (rules, grammar, data); runs with different
    fingerprints are never compared. A world may also say `own_process = True`: then its environments are stepped in processes
    of their own, though `slurm.workers` be 0; and `external = True`, where an environment starts a program (a JVM, a container,
    a sandbox) or talks to a server: then none is made to try the world before a run (see `dry_run`). It may have
    `prepare(say, **keywords of make)`, a class method that fetches what it needs; of small policies (see `tiny`),
    `words() -> Iterable[str]`, all that is said and understood here, and `expert(env, random: Random, noise: float,
    shyness: float) -> str`, the response of its scripted player; and `oracle(env) -> str`, the response of a player who knows
    the answer; and, where scoring is slow, `rehearse()`, an environment for demonstrations, which need no reward.
    """

    fingerprint: str
    splits: tuple[str, ...]  # train, and the panels

    def tasks(self, split: str) -> Sequence[Task]: ...

    def env(self) -> TextEnv: ...


def split_sizes(default: Mapping[str, int], given: Mapping[str, int] | None, most: int | None = None) -> dict[str, int]:
    """Tasks per split: the default's where none are given.

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
    """Tasks made when asked for, the same ones every time."""

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
