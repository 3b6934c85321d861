"""A polite end. TERM (preemption, `scancel`, `kill`) and USR2 (a time limit that comes near) are heard at once, and obeyed
where nothing is lost: in training at the end of a step, elsewhere on the spot.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Self

HEARD = (signal.SIGTERM, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """Asked to stop, and stopped where the run can go on from. `signal`: by which signal."""

    def __init__(self, number: int):
        super().__init__(f"asked to stop ({signal.Signals(number).name})")
        self.signal = number


class Enough(KeyboardInterrupt):
    """Whoever watches the run has seen enough of it (a pruned trial); all up to here is saved."""


class Signals:
    """Listens while the context lives, in the main thread; elsewhere it hears nothing."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self._patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in HEARD}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def deferred(self) -> AbstractContextManager[None]:
        """Only note what is heard: whoever works here asks `heard` when it is safe to stop."""
        return self._patience(True)

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Within `deferred`, work that may be cut short: it is done anew by whoever goes on."""
        with self._patience(False):
            if self.heard is not None:
                raise Interrupted(self.heard)
            yield

    @contextmanager
    def _patience(self, patient: bool) -> Iterator[None]:
        before, self._patient = self._patient, patient
        try:
            yield
        finally:
            self._patient = before

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.heard = number
        if not self._patient:
            raise Interrupted(number)
