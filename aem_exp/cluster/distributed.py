"""The processes of one distributed run: world size, rank, and results that the main process computes for all."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def world_size() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process is the first, which keeps the records."""
    return os.environ.get("RANK", "0") == "0"


def initialize(cpu: bool) -> None:
    """Connect the processes of a run."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def broadcast_from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them. Where it raises there, the others exit silently."""
    if world_size() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    answer: list[T | None] = [None, False]  # type: ignore[list-item]
    try:
        if is_main_process():
            answer = [work(), True]  # type: ignore[list-item]
    finally:
        broadcast_object_list(answer)
    if not answer[1]:
        sys.exit(1)
    return answer[0]  # type: ignore[return-value]


def shut_down() -> None:
    """Disconnect the processes, when all have come this far."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
