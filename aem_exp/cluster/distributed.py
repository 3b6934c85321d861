"""Rank, world size and communication of the processes that share one run."""

import os
import sys
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")
# Environment variables that make a process a rank of a run. A process of its own must not inherit them.
RANK_VARIABLES: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """The number of processes that share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process has rank 0. Only this process writes records."""
    return os.environ.get("RANK", "0") == "0"


def initialize(cpu: bool) -> None:
    """Initialize the process group of a run with several processes."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Run `work` in the main process and return its result in all processes. If it raises, the other processes exit."""
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
    """Wait for all processes, then destroy the process group."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
