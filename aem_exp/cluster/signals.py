"""How a run ends early: SIGINT, SIGTERM (preemption, `scancel`) and SIGUSR2 (the time limit is near) are recorded at once,
and raise where nothing is lost: in training at the end of a step, elsewhere immediately.
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
    """The run was stopped at a point from which it can go on. `signal`: by which signal."""

    def __init__(self, number: int):
        super().__init__(f"asked to stop ({signal.Signals(number).name})")
        self.signal = number


class Pruned(KeyboardInterrupt):
    """The trial was pruned; all steps so far are saved."""


class Signals:
    """Handles signals while the context lives, in the main thread; in another thread it receives none."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # A shell starts a command with `&` so that it ignores Ctrl-C; it still does.
            handled = [n for n in HANDLED_SIGNALS if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> AbstractContextManager[None]:
        """Only note signals in `received`, which the caller reads when it is safe to stop. A second Ctrl-C stops at once."""
        return self._set_deferring(True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within `defer`, work that may be cut short: the next start does it anew."""
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
        # In a thread: the main one may have been interrupted in the middle of a write, and a stream takes no second one.
        threading.Thread(target=log.warning, args=[sentence], daemon=True).start()
