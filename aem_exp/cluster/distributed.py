"""The processes of one distributed run: world size, rank, and results that the main process computes for all."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Of this process."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def initialize(cpu: bool) -> None:
    """Let the processes of a run find each other."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def broadcast_from_main(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, on all of them. Where it raises there, the others end without a word."""
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
    """Leave each other, when all have come this far."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
