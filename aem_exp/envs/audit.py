"""Audits the grader of a world: plays episodes whose result is known, and compares.

A world offers these episodes with `forgeries(task)`: the solution, which must succeed, and episodes that solve nothing, some of
which try to be graded as a success. They are played as an agent plays: through the environment, which grades what they leave.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task, TextEnv, Turn

log = logging.getLogger("aem_exp")
SOLUTION: Final = "solution"  # the class of episodes that must succeed
NO_CHANGE: Final = "no change"  # the class of episodes that change nothing that counts


@dataclass(frozen=True)
class Forgery:
    """An episode with a known result: a forgery or an episode without a change must fail, a solution must succeed."""

    kind: str
    """Its class, such as `configuration`."""
    name: str
    """What it does, in a few words."""
    responses: tuple[str, ...]
    """The responses of the agent, in order. The last one ends the episode."""

    @property
    def must_succeed(self) -> bool:
        return self.kind == SOLUTION


@dataclass(frozen=True)
class Trial:
    """A played forgery."""

    task: str
    forgery: Forgery
    succeeded: bool
    """Whether the environment reported success (`won`)."""
    metrics: dict[str, float]
    """The metrics of the last turn."""
    note: str = ""
    """The last observation, or why the episode could not be played."""

    @property
    def reason(self) -> str:
        """The note, or the ending that the metrics name."""
        return self.note or ", ".join(name for name, value in self.metrics.items() if name.startswith("end_") and value)

    @property
    def is_as_expected(self) -> bool:
        return self.succeeded == self.forgery.must_succeed and not self.note.startswith(CRASHED)


CRASHED: Final = "the environment failed"


class AuditableWorld(Protocol):
    """A world whose grader can be audited."""

    def env(self) -> TextEnv: ...

    def forgeries(self, task: Task) -> Sequence[Forgery]:
        """Episodes of a task with a known result. At least one has the kind `solution`, if a solution is known."""


def check_auditable(world: object, name: str) -> AuditableWorld:
    """The world, if it offers forgeries.

    Raises:
        ConfigError: it does not.
    """
    if not callable(getattr(world, "forgeries", None)):
        raise ConfigError("env", name, "its grader cannot be audited: the world has no method forgeries(task)")
    return world  # type: ignore[return-value]


def play_forgeries(
    world: AuditableWorld, tasks: Iterable[Task], chosen: Callable[[Forgery], bool], say: Callable[[Trial], None]
) -> list[Trial]:
    """Play the chosen forgeries of each task, one after another.

    Args:
        chosen: whether to play a forgery.
        say: is called after each episode.
    """
    trials = []
    env = world.env()
    try:
        for task in tasks:
            for forgery in filter(chosen, world.forgeries(task)):
                trials.append(_play(env, task, forgery))
                say(trials[-1])
    finally:
        env.close()
    return trials


def _play(env: TextEnv, task: Task, forgery: Forgery) -> Trial:
    """Play one forgery. An environment that fails is a result of the audit, not the end of it."""
    try:
        turn: Turn = env.reset(task)
        for response in forgery.responses:
            if turn.done:
                break
            turn = env.step(response)
    except Exception as error:  # of any type: environments are plugins
        return Trial(
            task.id, forgery, False, {}, f"{CRASHED}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
    return Trial(task.id, forgery, turn.metrics.get("won", 0.0) >= 1, dict(turn.metrics), turn.observation)


# The check before a first run.


def check_grader(world: AuditableWorld, tasks: Sequence[Task], fingerprint: str, name: str) -> None:
    """Play the solution and the episodes without a change of some tasks, unless this fingerprint has passed before.

    Args:
        tasks: one or a few tasks.
        fingerprint: of the world; a passed check is stored under it in the cache.
        name: of the environment, for errors.

    Raises:
        ConfigError: the grader gives a wrong result, or an environment fails.
    """
    passed = (
        disk.cache_dir() / "audits" / f"{fingerprint}-{sha256(' '.join(t.id for t in tasks).encode()).hexdigest()[:8]}"
    )
    if passed.exists():
        return
    log.info("env %s: checking its grader on %d tasks", name, len(tasks))

    def raise_if_wrong(trial: Trial) -> None:
        if not trial.is_as_expected:
            result = "is graded as a success" if trial.succeeded else f"is not graded as a success ({trial.reason})"
            remedy = f"its grader is wrong: {trial.forgery.name} of task {trial.task} {result}"
            raise ConfigError(
                "env", name, f"{remedy}; for all checks, run python -m aem_exp.evaluate env={name} --audit"
            )

    play_forgeries(world, tasks, lambda forgery: forgery.kind in (SOLUTION, NO_CHANGE), raise_if_wrong)
    passed.parent.mkdir(parents=True, exist_ok=True)
    disk.write_atomically(passed, b"")
