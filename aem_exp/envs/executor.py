"""Steps environments (`EnvExecutor`) and checks what they return. An error of one environment affects only its own slot."""

import json
import math
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Final, Protocol

from aem_exp.envs import Task, TextEnv, Turn, World

MAX_TEXT_BYTES: Final = 1 << 24  # bytes of one text that an environment may return
ERROR_CHARACTERS: Final = 300  # longest error
TRACE_CHARACTERS: Final = 10_000  # longest trace


@dataclass(frozen=True)
class Reply:
    """The result of one reset or step."""

    turn: Turn | None
    """None if the environment failed."""
    goal: str = ""
    """The environment's goal after the call."""
    action: str = ""
    """After a step: the action that the environment parsed from the response."""
    error: str = ""
    """The error in one line; empty if the call succeeded."""
    trace: str = ""
    """The traceback, or the end of stderr if a worker process died or hung."""


class EnvExecutor(Protocol):
    """Resets and steps environments, each in a numbered slot.

    After an error, a slot must be reset before its next step. Several threads may call `reset` and `step`, each for its own
    slots.
    """

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Reply]:
        """Start an episode in each slot: slot -> task. Returns the replies in the same order."""

    def step(self, responses: Mapping[int, str]) -> dict[int, Reply]:
        """Step each slot: slot -> response. Returns the replies in the same order."""

    def close(self) -> None:
        """Close all environments. May be called twice."""


class SerialExecutor:
    """Steps environments in this process, one after another.

    The environment of a slot is reused until it fails.

    Args:
        make: makes an environment; None: `world.env`.
    """

    def __init__(self, world: World, make: Callable[[], TextEnv] | None = None):
        self._make = make or world.env
        self._lock = threading.Lock()  # one call at a time: environments may share data of their world
        self.envs: dict[int, TextEnv] = {}  # by slot

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Reply]:
        return {slot: self._call_locked(slot, task) for slot, task in tasks.items()}

    def step(self, responses: Mapping[int, str]) -> dict[int, Reply]:
        assert responses.keys() <= self.envs.keys(), "a step without a reset"
        return {slot: self._call_locked(slot, response) for slot, response in responses.items()}

    def close(self) -> None:
        with ExitStack() as closing:  # closes all environments even if one raises
            while self.envs:
                closing.callback(self.envs.popitem()[1].close)

    def _call_locked(self, slot: int, task_or_response: Task | str) -> Reply:
        with self._lock:
            return self._call(slot, task_or_response)

    def _call(self, slot: int, task_or_response: Task | str) -> Reply:
        try:
            if isinstance(task_or_response, str):
                env = self.envs[slot]
                turn = check_turn("step", env.step(task_or_response))
                action = check_text("parse()", env.parse(task_or_response))
            else:
                serialize_task(task_or_response)
                if slot not in self.envs:
                    self.envs[slot] = self._make()
                env = self.envs[slot]
                turn, action = check_turn("reset", env.reset(task_or_response)), ""
            return Reply(turn, check_text("goal", env.goal), action)
        except Exception as error:
            with suppress(Exception):  # KeyError if the environment was never made
                self.envs.pop(slot).close()
            return error_reply(error)


def check_turn(call: str, turn: Any) -> Turn:
    """The Turn that an environment returned, converted to plain Python values.

    Raises:
        TypeError, ValueError: it is not a Turn, or a field has a wrong value.
    """
    if not isinstance(turn, Turn):
        raise TypeError(f"{call} must return a Turn, not {type_name(turn)}")
    for name in ("terminated", "truncated", "valid"):
        if not isinstance(getattr(turn, name), bool):
            raise TypeError(f"Turn.{name} must be a bool, not {type_name(getattr(turn, name))}")
    if not isinstance(turn.actions, tuple | list | None):
        raise TypeError(f"Turn.actions must be a tuple of str or None, not {type_name(turn.actions)}")
    if not isinstance(turn.metrics, dict):
        raise TypeError(f"Turn.metrics must be a dict, not {type_name(turn.metrics)}")
    observation, reward = check_text("Turn.observation", turn.observation), _check_number("Turn.reward", turn.reward)
    actions = None if turn.actions is None else tuple(check_text("Turn.actions", action) for action in turn.actions)
    metrics = {
        check_text("Turn.metrics", key): _check_number(f"Turn.metrics[{key!r}]", n) for key, n in turn.metrics.items()
    }
    return Turn(observation, reward, turn.terminated, turn.truncated, turn.valid, actions, metrics)


def check_text(name: str, value: Any) -> str:
    """The value, if it is a text that any tokenizer and any file accept.

    Raises:
        TypeError, ValueError: it is not a str, not valid Unicode, or too long.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type_name(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error.reason} at character {error.start}") from None
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {size:,} bytes; at most {MAX_TEXT_BYTES:,} are allowed")
    return str(value)


def type_name(value: Any) -> str:
    """The name of a value's type, with its module unless the type is built in."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _check_number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def serialize_task(task: Task) -> dict[str, Any]:
    """The task as a JSON object, so that a worker process gets the same task.

    Raises:
        TypeError, ValueError: JSON does not preserve its payload.
    """
    if json.loads(json.dumps(task.payload, allow_nan=False)) != task.payload:
        raise TypeError(
            "Task.payload may contain only dicts with str keys, lists (no tuples), str, finite numbers, bools and None"
        )
    return asdict(task)


def error_reply(error: str | Exception, trace: str = "") -> Reply:
    """A failed reply. Error and trace are cut to their limits, and contain only characters that any file can hold."""
    if isinstance(error, Exception):
        trace = "".join(traceback.format_exception(error))
        error = "".join(traceback.format_exception_only(error))
    line, trace = (text.encode(errors="backslashreplace").decode() for text in (error, trace[-TRACE_CHARACTERS:]))
    return Reply(None, error=" ".join(line.split())[:ERROR_CHARACTERS], trace=trace)
