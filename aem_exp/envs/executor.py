"""Where environments are stepped (`EnvExecutor`), and which return values of an environment are accepted.

An error of one environment fails its own slot only.
"""

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
ERROR_CHARACTERS: Final = 300  # characters of an error
TRACE_CHARACTERS: Final = 10_000  # characters of its trace


@dataclass(frozen=True)
class Reply:
    """What came of one reset or step."""

    turn: Turn | None  # None where the environment failed
    goal: str = ""  # the environment's, after the call
    action: str = ""  # what it read in the response, after a step
    error: str = ""  # how it failed, in one line
    trace: str = ""  # the traceback, or what a lost process last wrote to stderr


class EnvExecutor(Protocol):
    """Plays episodes in slots, which are small numbers used again and again.

    A slot that got an error must be reset before its next step, and then works again. `close` may be called twice. Several
    threads may reset and step, each its own slots.
    """

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Reply]: ...

    def step(self, responses: Mapping[int, str]) -> dict[int, Reply]: ...

    def close(self) -> None: ...


class SerialExecutor:
    """Environments in this process, one after another. A slot's, `envs[slot]`, is made once (by `make`; the world's `env`
    where none is given) and reused until it fails."""

    def __init__(self, world: World, make: Callable[[], TextEnv] | None = None):
        self._make = make or world.env
        self._lock = threading.Lock()  # one after another, whoever asks: environments may share what a world knows
        self.envs: dict[int, TextEnv] = {}

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Reply]:
        return {slot: self._call_locked(slot, task) for slot, task in tasks.items()}

    def step(self, responses: Mapping[int, str]) -> dict[int, Reply]:
        assert responses.keys() <= self.envs.keys(), "a step without a reset"
        return {slot: self._call_locked(slot, response) for slot, response in responses.items()}

    def close(self) -> None:
        with ExitStack() as closing:  # all of them, though one may raise
            while self.envs:
                closing.callback(self.envs.popitem()[1].close)

    def _call_locked(self, slot: int, asked: Task | str) -> Reply:
        with self._lock:
            return self._call(slot, asked)

    def _call(self, slot: int, asked: Task | str) -> Reply:
        try:
            if isinstance(asked, str):
                env = self.envs[slot]
                turn, action = check_turn("step", env.step(asked)), check_text("parse()", env.parse(asked))
            else:
                serialize_task(asked)
                if slot not in self.envs:
                    self.envs[slot] = self._make()
                env = self.envs[slot]
                turn, action = check_turn("reset", env.reset(asked)), ""
            return Reply(turn, check_text("goal", env.goal), action)
        except Exception as error:
            with suppress(Exception):  # KeyError: it was not even made
                self.envs.pop(slot).close()
            return error_reply(error)


def check_turn(call: str, turn: Any) -> Turn:
    """What an environment returned, as the plain Turn that its contract promises.

    Raises:
        TypeError, ValueError: it is something else.
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
    """A text that any tokenizer and any file take.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type_name(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # no tokenizer and no file would take it
        raise ValueError(f"{name} is not Unicode text: {error.reason} at character {error.start}") from None
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {size:,} bytes, more than the {MAX_TEXT_BYTES:,} that are allowed")
    return str(value)


def type_name(value: Any) -> str:
    """The type of a value, with its module where it is none of Python's own."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _check_number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def serialize_task(task: Task) -> dict[str, Any]:
    """The task as JSON carries it, so that it plays alike here and in a worker.

    Raises:
        TypeError, ValueError: its payload would not come out the same.
    """
    if json.loads(json.dumps(task.payload, allow_nan=False)) != task.payload:
        raise TypeError("Task.payload must be plain: dicts with str keys, lists (no tuples), str, numbers, bools, None")
    return asdict(task)


def error_reply(error: str | Exception, trace: str = "") -> Reply:
    """A reply whose error is one line, and which any file can hold."""
    if isinstance(error, Exception):
        trace = "".join(traceback.format_exception(error))
        error = "".join(traceback.format_exception_only(error))
    line, trace = (text.encode(errors="backslashreplace").decode() for text in (error, trace[-TRACE_CHARACTERS:]))
    return Reply(None, error=" ".join(line.split())[:ERROR_CHARACTERS], trace=trace)
