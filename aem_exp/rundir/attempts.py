"""`attempts.jsonl`: one event for each start of a run, and one for the end of that start.

A start without an end was killed from outside; only the scheduler knows the reason.
"""

import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError, RunError

FILE = "attempts.jsonl"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
FAILURE_CLASSES = (  # first the failures of the run itself, then those of its job or machine (see `run_state`)
    *("config", "crash", "disk", "env", "hang", "nan", "oom"),
    *("killed", "node", "time", "unseen", "user"),
)
MAX_IDLE_STARTS = 2  # consecutive starts of a job that may make no progress


@contextmanager
def record_attempt(folder: Path, step: int, saved_step: Callable[[], int], max_requeues: int = 0) -> Iterator[None]:
    """Record a start at `step`, and how this start ends.

    Args:
        saved_step: returns the newest saved step; called at the end.
        max_requeues: how often SLURM may requeue a job; 0 means no limit.

    Raises:
        RunError: the job is requeued too often, or makes no progress.
    """
    job, start = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    _append_event(
        folder,
        {"event": "start", "step": step, "host": platform.node(), "pid": os.getpid(), "job": job, "start": start},
    )
    try:
        if job and start:
            _check_requeues(folder, job, start, max_requeues)
        yield
    except Exception as error:
        _append_event(
            folder,
            {"event": FAILED, "class": classify_error(error), "sentence": describe_error(error), "step": saved_step()},
        )
        raise
    except BaseException as error:
        _append_event(folder, {"event": STOPPED, "sentence": describe_error(error), "step": saved_step()})
        raise
    _append_event(folder, {"event": DONE, "step": saved_step()})


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first, without an incomplete last line (left by a killed process)."""
    return disk.read_json_lines(folder / FILE, "event", "at")


def total_seconds(folder: Path) -> float | None:
    """Return the seconds that a finished run ran: the sum over its starts with a known end. None if it is not finished."""
    events = read(folder)
    if not events or events[-1]["event"] != DONE:
        return None
    return sum(b["at"] - a["at"] for a, b in pairwise(events) if a["event"] == "start" != b["event"])


def classify_error(error: BaseException) -> str:
    """Return the class of a failure: config, nan, env, oom, disk, hang, or crash for anything else."""
    if isinstance(error, disk.DamagedFileError):
        return "disk"
    if isinstance(error, ConfigError):
        return "config"
    if isinstance(error, RunError):
        return error.kind
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "oom"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk"
    return "crash"


def describe_error(error: BaseException) -> str:
    """Describe an error in one line."""
    text = " ".join(str(error).split())
    is_sentence = isinstance(error, ConfigError | RunError | KeyboardInterrupt)
    return (text if is_sentence and text else f"{type(error).__name__}: {text}")[:500]


def _check_requeues(folder: Path, job: str, start: int, max_requeues: int) -> None:
    """Stop a job that would be requeued without end."""
    if max_requeues and start > max_requeues:
        raise RunError(f"job {job} was requeued {start} times; the limit is launch.requeues={max_requeues}", "hang")
    steps = [event["step"] for event in read(folder) if event["event"] == "start" and event["job"] == job]
    if len(steps) > MAX_IDLE_STARTS and len(set(steps[-MAX_IDLE_STARTS - 1 :])) == 1:
        raise RunError(f"job {job} made no progress in {MAX_IDLE_STARTS} starts (still at step {steps[-1]})", "hang")


def _append_event(folder: Path, event: dict[str, Any]) -> None:
    with (folder / FILE).open("a") as file:
        file.write(json.dumps({"at": round(time.time(), 3), **event}) + "\n")
        file.flush()
        os.fsync(file.fileno())
