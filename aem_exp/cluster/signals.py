"""Signals that stop a run: SIGINT, SIGTERM (preemption, `scancel`) and SIGUSR2 (the time limit is near).

A signal is recorded immediately. During training, `Interrupted` is raised at the end of the step, after everything was saved;
outside of training, it is raised immediately.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Self

log = logging.getLogger("aem_exp")
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
PRESS_AGAIN = "press it again to leave at once"


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run at a point from which it can resume. `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(f"asked to stop ({signal.Signals(number).name})")
        self.signal = number


class Pruned(KeyboardInterrupt):
    """The trial was pruned; all steps so far are saved."""


class Signals:
    """Context manager that handles signals in the main thread. In another thread it does nothing."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # A shell makes a background command (`&`) ignore SIGINT. Keep that.
            handled = [n for n in HANDLED_SIGNALS if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> AbstractContextManager[None]:
        """Only record signals in `received`, for a caller that stops later. A second Ctrl-C raises immediately."""
        return self._set_deferring(True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside `defer`: raise immediately during this block, whose work the next start repeats."""
        with self._set_deferring(False):
            if self.received is not None:
                raise Interrupted(self.received)
            yield

    @contextmanager
    def _set_deferring(self, deferring: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, deferring
        try:
            yield
        finally:
            self._deferring = before

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = number
        if again or not self._deferring:
            raise Interrupted(number)
        name, press = ("Ctrl-C", f"; {PRESS_AGAIN}") if number == signal.SIGINT else (signal.Signals(number).name, "")
        sentence = f"{name}: saving at the end of this step{press}"
        # In a thread, because the signal may have interrupted a write, and a stream rejects a second, nested write.
        threading.Thread(target=log.warning, args=[sentence], daemon=True).start()
