"""An ordered map over threads: results come in the order of the inputs, and the first error cancels the rest."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")
GRACE: Final = 1.0  # seconds for hands to leave when all is over; who is stuck is left behind


def map_ordered(
    pieces: Sequence[T], hands: int, do: Callable[[int, T], R], give_up: Callable[[], None]
) -> Generator[R, None, None]:
    """What `do(hand, piece)` gives for each piece, in the order of the pieces; hands go on while nobody asks for the next.

    Args:
        pieces: the work. A piece begins when a hand is free.
        hands: threads, at most. They are numbered from 0, and no two with one number work at the same time.
        do: called in those threads.
        give_up: called when a piece raised, this thread was interrupted (Ctrl-C), or nobody wants the rest (`close`): whoever
            waits in `do` must come back soon.

    Raises:
        BaseException: what the first piece that failed raised. Nothing is begun after it.
    """
    todo: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()
    for pair in enumerate(pieces):
        todo.put(pair)

    def hand(number: int) -> None:
        while not over.is_set():
            try:
                index, piece = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, do(number, piece), None))
            except BaseException as error:  # raised again by whoever waits for it
                done.put((index, None, error))

    threads = [threading.Thread(target=hand, args=[n], daemon=True) for n in range(min(hands, len(pieces)))]
    results, shown = dict[int, R](), 0
    try:
        for thread in threads:
            thread.start()
        while shown < len(pieces):
            index, result, error = done.get()
            if error is not None:
                raise error
            results[index] = result
            while shown in results:
                yield results.pop(shown)
                shown += 1
    except BaseException:
        over.set()
        give_up()
        end = time.monotonic() + GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        raise
