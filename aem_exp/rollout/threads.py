"""An ordered map over threads: results come in the order of the inputs; the first error cancels the rest.

`concurrent.futures` joins its threads at exit and so would wait for stuck ones; here, they are abandoned.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")
GRACE: Final = 1.0  # seconds to wait for the threads after an error; threads that are stuck are then abandoned


def map_ordered(
    pieces: Sequence[T], max_threads: int, work: Callable[[int, T], R], cancel: Callable[[], None]
) -> Generator[R, None, None]:
    """Yield `work(thread, piece)` for each piece, in the order of the pieces.

    Threads continue with later pieces while the caller does not take results.

    Args:
        pieces: inputs of `work`. The next piece starts when a thread is free.
        max_threads: maximum number of threads. They are numbered from 0; two threads never share a number.
        work: called in these threads.
        cancel: called after an error in `work`, an interrupt of this thread (Ctrl-C), or the end of the generator before
            its last result. It must make threads that wait inside `work` return soon.

    Raises:
        BaseException: the first error that `work` raised. No further piece starts after it.
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
            except BaseException as error:  # raised again in the caller's thread
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
