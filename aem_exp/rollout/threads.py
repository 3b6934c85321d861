"""An ordered map over threads: results come in the order of the inputs, and the first error cancels the rest."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")
GRACE: Final = 1.0  # seconds for threads to end when the map is over; a thread that is stuck is abandoned


def map_ordered(
    pieces: Sequence[T], max_threads: int, work: Callable[[int, T], R], cancel: Callable[[], None]
) -> Generator[R, None, None]:
    """What `work(thread, piece)` gives for each piece, in the order of the pieces; threads go on while no result is taken.

    Args:
        pieces: the work. A piece begins when a thread is free.
        max_threads: threads, at most. They are numbered from 0, and no two with one number work at the same time.
        work: called in those threads.
        cancel: called when a piece raised, this thread was interrupted (Ctrl-C), or the generator was closed: threads that
            wait in `work` must return soon.

    Raises:
        BaseException: what the first piece that failed raised. Nothing is begun after it.
    """
    todo: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()
    for pair in enumerate(pieces):
        todo.put(pair)

    def take_pieces(number: int) -> None:
        while not over.is_set():
            try:
                index, piece = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(number, piece), None))
            except BaseException as error:  # raised again in the thread that takes the results
                done.put((index, None, error))

    threads = [
        threading.Thread(target=take_pieces, args=[n], daemon=True) for n in range(min(max_threads, len(pieces)))
    ]
    results, yielded = dict[int, R](), 0
    try:
        for thread in threads:
            thread.start()
        while yielded < len(pieces):
            index, result, error = done.get()
            if error is not None:
                raise error
            results[index] = result
            while yielded in results:
                yield results.pop(yielded)
                yielded += 1
    except BaseException:
        over.set()
        cancel()
        end = time.monotonic() + GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        raise
