"""A pytest plugin that records what code under test does to its own test run. `review` copies it into a sandbox.

It runs in the process of the tests with any Python from 3.6 on, so it imports only the standard library. It writes a file beside
its own: each line is one finding, and `end` is the last line of a run that pytest itself has ended.
"""

import os
import sys
from typing import Any

WATCHED = ("_pytest", "pytest", "pluggy", "unittest", "builtins")
FILE = __file__ + ".findings"
EVENTS = {"sys.settrace": "sets a trace function", "sys.setprofile": "sets a profile function", "os.fork": "forks"}

_seen: "set[str]" = set()
_before: "dict[str, int]" = {}
_codes: "dict[str, int]" = {}
# Not empty after pytest has started, which does some of these things itself.
_ready: "list[bool]" = []


def _find(text: str) -> None:
    if text not in _seen:
        _seen.add(text)
        _write(text)


def _write(text: str) -> None:
    """Append a line. The file is not left open, because code under test may write to all open files."""
    with open(FILE, "a", encoding="utf-8", errors="replace") as file:
        file.write(text + "\n")


def _snapshot() -> "dict[str, int]":
    """Name -> identity of each function and class of the runner, and of the attributes of its classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(WATCHED):
            continue
        for attribute, value in list(vars(module).items()):
            if callable(value) and attribute != "_":  # the interpreter stores its last result there
                found[name + "." + attribute] = id(value)
            if isinstance(value, type) and getattr(value, "__module__", "") == name:
                for member, inside in list(vars(value).items()):
                    if callable(inside) or isinstance(inside, (property, staticmethod, classmethod)):
                        found[name + "." + attribute + "." + member] = id(inside)
    return found


def _audit(event: str, arguments: Any) -> None:
    if not _ready:
        return
    if event in EVENTS and _is_foreign(sys._getframe(1)):
        _find(EVENTS[event])
    elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
        name = os.path.basename(arguments[0])
        writes = any(letter in arguments[1] for letter in "wax+")
        if writes and name.endswith(".py") and (name.startswith("test") or name == "conftest.py"):
            _find("writes to " + name)


def _is_foreign(frame: Any) -> bool:
    """Whether the call comes from code that is neither the standard library nor pytest."""
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    name = frame.f_code.co_filename if frame is not None else ""
    library = os.path.dirname(os.__file__)
    return not name.startswith((library, "<frozen")) and "_pytest" not in name and "pluggy" not in name


def _exit(code: int) -> None:
    _find("ends the process with os._exit")
    _leave(code)


_leave = os._exit
os._exit = _exit  # type: ignore[assignment]
if hasattr(sys, "addaudithook"):
    sys.addaudithook(_audit)


def pytest_configure(config: Any) -> None:
    _before.update(_snapshot())
    _ready.append(True)


def _code(item: Any) -> int:
    """The identity of the code of a test; 0 if it has none."""
    return id(getattr(getattr(item, "function", None), "__code__", 0))


def pytest_itemcollected(item: Any) -> None:
    _codes[item.nodeid] = _code(item)


def pytest_runtest_teardown(item: Any) -> None:
    if _codes.get(item.nodeid) != _code(item):
        _find("replaces the code of a test")


def pytest_unconfigure(config: Any) -> None:
    after = _snapshot()
    for name in sorted(_before):
        if name in after and after[name] != _before[name]:
            _find("replaces " + name)
    _write("end")
