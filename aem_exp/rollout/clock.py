"""Measures how the wall time of a rollout is divided between generation and environments."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall seconds per activity: `with clock("generation"): ...`. `read` returns the totals and resets them.

    When several threads work at the same time, each moment is counted once: for the activity `first` if any thread does it,
    otherwise for one of the other activities.
    """

    def __init__(self, first: str = "") -> None:
        self.first = first
        self._seconds: dict[str, float] = {}
        self._active: dict[str, int] = {}  # number of threads per activity
        self._last = 0.0  # time of the last start or end of an activity
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._change(name, 1)
        try:
            yield
        finally:
            self._change(name, -1)

    def read(self) -> dict[str, float]:
        """Return the seconds of each activity since the last call, and reset them."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds

    def _change(self, name: str, by: int) -> None:
        with self._lock:
            now, active = time.perf_counter(), [name for name, count in self._active.items() if count]
            if active:
                counted = self.first if self.first in active else active[0]
                self._seconds[counted] = self._seconds.get(counted, 0.0) + now - self._last
            self._last = now
            self._active[name] = self._active.get(name, 0) + by
