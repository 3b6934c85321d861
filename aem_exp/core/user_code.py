"""Calls code that a config names: errors become one sentence with file and line, in the user's own code if possible."""

import os
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from aem_exp.core import extras
from aem_exp.core.disk import PACKAGE
from aem_exp.core.errors import ConfigError, MissingResource, RunError

T = TypeVar("T")
CHECK_SECONDS: Final = 3.0  # time limit of a trial call before a run
THREAD_NAME: Final = "trial call"
_PACKAGE_PREFIX = str(PACKAGE) + os.sep
_LIBRARY_PREFIXES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


@contextmanager
def wrap_call_errors(field: str, path: str, call: str, function: Any = None) -> Iterator[None]:
    """Convert an error inside this block to a ConfigError.

    Args:
        field, path: the config key, and its value: the dotted name of the function.
        call: name of the call for the message.
        function: the called object; its location is used if no line of its own code raised the error (such as for a wrong
            number of arguments).

    Raises:
        ConfigError: with the original error, its file and its line.
        MissingResource: the code imports a module of the extra `train`, which is not installed.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except (Exception, SystemExit) as error:
        if explanation := extras.explain_missing(error):
            raise MissingResource(field, path, f"{call} failed: {explanation}") from error
        raise ConfigError(
            field, path, f"{call} failed: {format_error(error)} ({error_location(error, function)})"
        ) from error


@contextmanager
def wrap_result_errors(field: str, path: str, function: Any, prefix: str = "") -> Iterator[None]:
    """Convert a TypeError or ValueError about the result of a function to a ConfigError.

    Raises:
        ConfigError: with the original error, and the file and line where the function is defined.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        location = definition_location(function)
        raise ConfigError(field, path, f"{prefix}{error}" + (f" ({location})" if location else "")) from error


def format_error(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_location(error: BaseException, function: Any = None) -> str:
    """`FILE, line N` of an error: the innermost line of the user's own code in the traceback, else of a library.

    If the traceback has neither (such as for a wrong number of arguments), it is the definition of `function`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if not frame.filename.startswith(_PACKAGE_PREFIX)]
    own = [frame for frame in foreign if not frame.filename.startswith(_LIBRARY_PREFIXES)]
    if own or foreign or not definition_location(function):
        frame = (own or foreign or frames)[-1]
        return f"{frame.filename}, line {frame.lineno}"
    return definition_location(function)


def definition_location(function: Any) -> str:
    """`FILE, line N` where a function, method, class or callable object is defined; empty if it has no source."""
    while hasattr(function, "func"):  # a partial
        function = function.func
    for candidate in (function, vars(type(function)).get("__call__"), getattr(function, "__init__", None)):
        code = getattr(candidate, "__code__", None)
        if code is not None:
            return f"{code.co_filename}, line {code.co_firstlineno}"
    return ""


def run_with_timeout(work: Callable[[threading.Event], T], seconds: float) -> T | None:
    """Run `work` in a thread and return its result; None if it takes longer than `seconds`.

    `work` gets an event that is set when the time is up, so that it can stop.

    Raises:
        Exception: `work` raised it in the thread and again in this thread. An error that occurs only in another thread is
            ignored.
    """
    over, done = threading.Event(), list[tuple[T | None, BaseException | None]]()

    def run() -> None:
        try:
            done.append((work(over), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
    thread.start()
    thread.join(seconds)
    over.set()
    if not done:
        return None
    result, error = done[0]
    return result if error is None else work(threading.Event())
