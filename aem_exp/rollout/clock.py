"""Where the time of a rollout goes: to generation, to environments, to waiting."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent, by name: `with clock("generation"): ...`. `read` returns them and starts from 0.

    Overlapping work is counted once: for `first` if any thread is doing it, otherwise for another active name.
    """

    def __init__(self, first: str = "") -> None:
        self.first = first
        self._seconds: dict[str, float] = {}
        self._active: dict[str, int] = {}  # threads at work, by name
        self._last = 0.0  # when work last began or ended
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._change(name, 1)
        try:
            yield
        finally:
            self._change(name, -1)

    def read(self) -> dict[str, float]:
        """The seconds since the last call."""
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
