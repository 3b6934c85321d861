"""Reports errors in code that a config names as one sentence with file and line, of the user's own code where possible."""

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aem_exp.core import extras
from aem_exp.core.disk import PACKAGE
from aem_exp.core.errors import ConfigError, MissingResource, RunError

_PACKAGE_PREFIX = str(PACKAGE) + os.sep
_LIBRARY_PREFIXES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


@contextmanager
def wrap_call_errors(field: str, path: str, call: str, function: Any = None) -> Iterator[None]:
    """Turn what a call raises into a ConfigError.

    Args:
        field, path: the key of the config, and the dotted name that stands there.
        call: what is called, as the sentence has it.
        function: what is called, for an error that no line of its own raised, such as a wrong number of arguments.

    Raises:
        ConfigError: with the error, its file and its line.
        MissingResource: it imports what the extra `train` installs, and that is not installed.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except (Exception, SystemExit) as error:
        if why := extras.explain_missing(error):
            raise MissingResource(field, path, f"{call} failed: {why}") from error
        raise ConfigError(
            field, path, f"{call} failed: {format_error(error)} ({error_location(error, function)})"
        ) from error


@contextmanager
def wrap_result_errors(field: str, path: str, function: Any, prefix: str = "") -> Iterator[None]:
    """Turn a TypeError or ValueError about what a function returned into a ConfigError that says where the function is.

    Raises:
        ConfigError: with the error, and the file and line of the function.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        where = definition_location(function)
        raise ConfigError(field, path, f"{prefix}{error}" + (f" ({where})" if where else "")) from error


def format_error(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_location(error: BaseException, function: Any = None) -> str:
    """FILE, line N: the innermost line of an error's traceback that is the user's own, else a library's.

    Where none is (a wrong number of arguments, say), it is where `function` is defined, which was called.
    """
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if not frame.filename.startswith(_PACKAGE_PREFIX)]
    own = [frame for frame in foreign if not frame.filename.startswith(_LIBRARY_PREFIXES)]
    if own or foreign or not definition_location(function):
        frame = (own or foreign or frames)[-1]
        return f"{frame.filename}, line {frame.lineno}"
    return definition_location(function)


def definition_location(function: Any) -> str:
    """FILE, line N where a function, a method, a class or a callable object is defined; empty where it has no source."""
    while hasattr(function, "func"):  # a partial
        function = function.func
    for candidate in (function, vars(type(function)).get("__call__"), getattr(function, "__init__", None)):
        code = getattr(candidate, "__code__", None)
        if code is not None:
            return f"{code.co_filename}, line {code.co_firstlineno}"
    return ""
