"""Plays a few episodes of a world before a run, for a limited time: does it keep its contract, and repeat its games?

Errors are reported with the user's file and line. A world that takes longer is skipped with a warning.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Final

from aem_exp.config import ConfigError, Experiment
from aem_exp.core import user_code
from aem_exp.core.user_code import definition_location, run_with_timeout, wrap_call_errors, wrap_result_errors
from aem_exp.envs import Task, TextEnv, Turn, World, parsing
from aem_exp.envs.executor import check_text, check_turn
from aem_exp.envs.panel import ENV_TARGET

log = logging.getLogger("aem_exp")
COMPARE_SECONDS: Final = 0.5  # time limit for comparing games of the panels with games of the training split
COMPARE_TRAIN, COMPARE_PANEL, COMPARE_TURNS = 32, 8, 8  # number of tasks, and turns of each task
OPENING_LENGTH: Final = 3  # entries of a record: goal, first observation, first actions
TINY_POLICY: Final = "aem_exp.tiny.make"


def check_world(experiment: Experiment, world: World, tasks: Sequence[Task]) -> bool:
    """Play two episodes, and one of them again, with the expert or with random actions. Return whether that was possible.

    Raises:
        ConfigError: the world violates its contract.
    """
    name = f"env {experiment.env.name}"
    if starts_programs(world):
        log.info("%s: not tried before the run, because its environments start other programs", name)
        return False
    player = _WorldPlayer(experiment, world)
    changed = run_with_timeout(lambda over: player.find_changed_task(tasks[:2], over), user_code.CHECK_SECONDS)
    if changed is None:
        log.warning(
            "%s: two episodes took more than %g s, so the environment was not tried before the run; "
            "launch.workers=N and launch.env_seconds=S replace a hung environment",
            name,
            user_code.CHECK_SECONDS,
        )
    elif changed:
        log.warning(
            "%s: task %s was a different game when it was played again; "
            "all episodes of a group must play the same game, so take all randomness from the task's seed",
            name,
            changed,
        )
    return changed is not None


def play_games(
    experiment: Experiment, world: World, splits: Mapping[str, Sequence[Task]]
) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Records of episodes of some tasks of each split, by task id, played by the same expert. Empty if that takes too long."""
    player = _WorldPlayer(experiment, world)
    player.turns = min(player.turns, COMPARE_TURNS)
    some = {split: tasks[: COMPARE_TRAIN if split == "train" else COMPARE_PANEL] for split, tasks in splits.items()}

    def play(over: threading.Event) -> dict[str, dict[str, tuple[Any, ...]]]:
        return {
            split: dict(zip([task.id for task in tasks], player.play_tasks(tasks, over), strict=False))
            for split, tasks in some.items()
        }

    try:
        return run_with_timeout(play, COMPARE_SECONDS) or {}
    except ConfigError:  # two episodes succeeded before; a later crash affects only its own episode
        return {}


def starts_programs(world: World) -> bool:
    return bool(getattr(world, "external", False) or getattr(world, "own_process", False))


class _WorldPlayer:
    """Plays episodes of a world with its expert or with random actions."""

    def __init__(self, experiment: Experiment, world: World) -> None:
        self.world, self.turns = world, experiment.env.max_turns
        self.path = experiment.env.make["_target_"]
        self.tiny = (experiment.model.make or {}).get("_target_") == TINY_POLICY

    def find_changed_task(self, tasks: Sequence[Task], over: threading.Event) -> str:
        """Play the tasks, and the first one again in the other environment.

        Returns:
            The id of the first task if it was a different game the second time, else "".
        """
        if self.tiny:
            self._check_words()
        one, two = self._make_env(), self._make_env()
        if one is two:
            where = definition_location(self.world.env)
            remedy = f"env() must make a new environment for each call, but it returned the same one twice ({where})"
            raise ConfigError(ENV_TARGET, self.path, remedy)
        first = self._play_episode(one, tasks[0], (), over)
        for task in tasks[1:]:
            self._play_episode(two, task, self.expert_arguments, over)
        again = self._play_episode(two, tasks[0], (), over)
        for env in (one, two):
            self._close_env(env)
        return "" if over.is_set() or first[:OPENING_LENGTH] == again[:OPENING_LENGTH] else tasks[0].id

    def play_tasks(self, tasks: Sequence[Task], over: threading.Event) -> list[tuple[Any, ...]]:
        """Records of an episode of each task, until `over` is set."""
        env = self._make_env()
        played = [self._play_episode(env, task, self.expert_arguments, over) for task in tasks if not over.is_set()]
        self._close_env(env)
        return played

    @property
    def expert_arguments(self) -> tuple[float, ...]:
        """The arguments noise and shyness, with which `aem_exp.tiny` calls the expert."""
        return (0.0, 0.0) if self.tiny else ()

    def _make_env(self) -> TextEnv:
        with wrap_call_errors(ENV_TARGET, self.path, "env()", self.world.env):
            env = self.world.env()
        for name in ("parse", "reset", "step", "close"):
            if not callable(getattr(env, name, None)):
                remedy = f"its env() returns an object without the method {name} (see aem_exp.envs.TextEnv)"
                raise ConfigError(ENV_TARGET, self.path, remedy)
        return env

    def _close_env(self, env: TextEnv) -> None:
        with wrap_call_errors(ENV_TARGET, self.path, "close", env.close):
            env.close()

    def _play_episode(
        self, env: TextEnv, task: Task, habits: tuple[float, ...], over: threading.Event
    ) -> tuple[Any, ...]:
        """The record of an episode: goal, first observation and actions, then response, observation, actions, reward, done."""
        random = Random(0)
        turn = self._call_env("reset", env.reset, task)
        with wrap_result_errors(ENV_TARGET, self.path, type(env)):
            record: list[Any] = [check_text("goal", getattr(env, "goal", None)), turn.observation, turn.actions]
        won: list[float] = []
        turns = 0
        while not turn.done and turns < self.turns and not over.is_set():
            response = self._choose_response(env, turn, random, habits)
            turn = self._call_env("step", env.step, response)
            turns += 1
            won += [turn.metrics["won"]] if "won" in turn.metrics else []
            record += [response, turn.observation, turn.actions, turn.reward, turn.done]
        with wrap_result_errors(ENV_TARGET, self.path, env.step):
            if turns and turn.done and not won:
                raise ValueError(
                    "no turn has metrics['won'], which evaluation reports as success: set it to 0.0 or 1.0"
                )
            if strange := [value for value in won if value not in (0.0, 1.0)]:
                raise ValueError(f"metrics['won'] must be 0.0 or 1.0, not {strange[0]}")
        return tuple(record)

    def _call_env(self, name: str, call: Callable[[Any], Turn], argument: Task | str) -> Turn:
        with wrap_call_errors(ENV_TARGET, self.path, name, call):
            turn = call(argument)
        with wrap_result_errors(ENV_TARGET, self.path, call):
            return check_turn(name, turn)

    def _choose_response(self, env: TextEnv, turn: Turn, random: Random, habits: tuple[float, ...]) -> str:
        """The next response. Also calls `parse`, whose result later prompts quote."""
        response: Any = "look"
        if expert := getattr(self.world, "expert", None):
            with wrap_call_errors(ENV_TARGET, self.path, "expert()", expert):
                response = expert(env, random, *habits)
            with wrap_result_errors(ENV_TARGET, self.path, expert):
                check_text("the result of expert()", response)
        with wrap_call_errors(ENV_TARGET, self.path, "parse()", env.parse):
            if turn.actions and not expert:
                response = parsing.format_response(env.parse, random.choice(turn.actions))
            action = env.parse(response)
        with wrap_result_errors(ENV_TARGET, self.path, env.parse):
            check_text("the result of parse()", action)
        return str(response)

    def _check_words(self) -> None:
        """Check `words()`, from which `aem_exp.tiny` makes a vocabulary."""
        world: Any = self.world
        with wrap_call_errors(ENV_TARGET, self.path, "words()", world.words):
            words = world.words()
            if not isinstance(words, str):
                words = list(words)
        with wrap_result_errors(ENV_TARGET, self.path, world.words):
            if isinstance(words, str):
                raise TypeError("words() must return a list of words, not one text")
            if strange := [word for word in words if not isinstance(word, str)]:
                raise TypeError(f"words() must return a list of words, but it contains {strange[0]!r}")
