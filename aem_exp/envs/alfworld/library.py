"""Loads a copy of the engine's library for every environment, isolates its global state, and checks that it is installed.

The engine writes sys.argv and sys.stdout, keeps its parsers in globals, and plays one game per loaded library.
"""

import importlib.util
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from aem_exp.core.errors import MissingResource
from aem_exp.core.extras import install_command

COMPILER_NOTE: Final = "(this compiles two packages and needs a C++ compiler, make and cmake)"
PACKAGES: Final = ("alfworld", "textworld", "fast_downward")
_LOCK = threading.RLock()  # the engine's parsers and its translator's options are globals
_IDLE_LIBRARIES: list[Any] = []  # reused, never unloaded: a process that unloads several libraries crashes at exit


def check_installed() -> None:
    """Raise MissingResource if the engine is missing or this Python cannot run it. Does not import the engine."""
    if sys.version_info >= (3, 13):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MissingResource(
            "env.make", "alfworld", f"TextWorld's engine needs Python 3.11 or 3.12; this is Python {version}"
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingResource(
            "env.make", "alfworld", f"needs {', '.join(missing)}: {install_command('alfworld')} {COMPILER_NOTE}"
        )


@contextmanager
def isolate_globals() -> Iterator[None]:
    """Let one thread at a time use the engine's globals, and restore sys.argv and sys.stdout."""
    with _LOCK:
        argv, stdout = sys.argv, sys.stdout
        try:
            yield
        finally:
            sys.argv, sys.stdout = argv, stdout


def take_library() -> Any:
    """A library for one environment. Give it back with `release_library`."""
    return _IDLE_LIBRARIES.pop() if _IDLE_LIBRARIES else _load_library()


def release_library(library: Any) -> None:
    """Keep a library for the next environment."""
    _IDLE_LIBRARIES.append(library)


def _load_library() -> Any:
    """Load a copy of the library, because its state is global. The copy has no debug information, which is 30 times as large."""
    import fast_downward.interface as interface

    with tempfile.TemporaryDirectory() as folder, isolate_globals():
        original, copy = interface.DOWNWARD_LIB_PATH, Path(folder) / "libdownward.so"
        copy.write_bytes(_read_loaded_segments(Path(original)))
        interface.DOWNWARD_LIB_PATH = str(copy)
        try:
            return interface.load_lib()
        finally:
            interface.DOWNWARD_LIB_PATH = original


@cache
def _read_loaded_segments(library: Path) -> bytes:
    """The bytes of a shared library up to the end of its last segment; all bytes if it is not a 64-bit ELF file."""
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return data
    start, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    headers = (struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count))
    end = max(offset + length for _, _, offset, _, _, length, _, _ in headers)
    return data[:end]
