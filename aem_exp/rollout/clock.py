"""Where the time of a rollout goes: to generation, to environments, to waiting."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent, by name: `with clock("generation"): ...`. `read` hands them out and starts afresh.

    A moment counts once, however many threads are at work in it: for `first`, where somebody is at that.
    """

    def __init__(self, first: str = "") -> None:
        self.first = first
        self._seconds: dict[str, float] = {}
        self._active: dict[str, int] = {}  # how many are at what
        self._last = 0.0  # when somebody last began or ended something
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._change(name, 1)
        try:
            yield
        finally:
            self._change(name, -1)

    def read(self) -> dict[str, float]:
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds

    def _change(self, name: str, by: int) -> None:
        with self._lock:
            now, going_on = time.perf_counter(), [name for name, count in self._active.items() if count]
            if going_on:
                counted = self.first if self.first in going_on else going_on[0]
                self._seconds[counted] = self._seconds.get(counted, 0.0) + now - self._last
            self._last = now
            self._active[name] = self._active.get(name, 0) + by
