"""Run lock: one process or job per run directory.

The owner touches `run.lock` every 30 seconds; a lock is stale when its process has died, after 5 minutes without a touch, or
when the same job has been restarted.
"""

import getpass
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.core import disk

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK, OWNER = "run.lock", "owner.json"
HEARTBEAT_SECONDS = 30.0  # seconds between touches
STALE_SECONDS = 300.0  # seconds without one


class RunLocked(Exception):
    """Another process runs this run; the message names it."""


@contextmanager
def hold_run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run dir.

    Raises:
        RunLocked: another process holds it.
    """
    lock = _acquire_lock(folder)
    if lock is None:
        raise RunLocked(f"{folder} is being run by {_format_owner(folder)}")
    stop = threading.Event()
    heartbeats = threading.Thread(
        target=_send_heartbeats, args=[folder / LOCK, stop], name="aem_exp.rundir.lock", daemon=True
    )
    try:
        disk.write_atomically(folder / OWNER, json.dumps(_current_process()))
        heartbeats.start()
        yield
    finally:
        stop.set()
        lock.release()


def describe_owner(folder: Path) -> str | None:
    """The process that runs this run now, None where none does. It only reads: taking the lock could refuse a start."""
    try:
        silent = time.time() - (folder / LOCK).stat().st_mtime
        pid, host = (folder / LOCK).read_text().split()[:2]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no lock, or one that is being written at this moment
        return None
    if silent > STALE_SECONDS or (host == platform.node() and not _is_alive(int(pid))):
        return None
    return _format_owner(folder)


def _acquire_lock(folder: Path) -> "BaseFileLock | None":
    """The lock, acquired; None where another process holds it."""
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(folder / LOCK, timeout=0)  # breaks by itself what a dead process of this host left behind
    for _ in range(2):
        with suppress(Timeout):
            lock.acquire()
            return lock
        if not _is_stale(folder):
            return None
        lock.break_lock()
    return None


def _is_stale(folder: Path) -> bool:
    """Whether a lock of another host is stale."""
    try:
        silent = time.time() - (folder / LOCK).stat().st_mtime
    except FileNotFoundError:  # just released, or broken by the attempt
        return True
    own, owner = _current_process(), _read_owner(folder)
    same_job = own["job"] is not None and own["job"] == owner.get("job")
    return silent > STALE_SECONDS or (same_job and own["start"] > owner["start"])


def _is_alive(pid: int) -> bool:
    """Whether there is such a process on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _send_heartbeats(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a disk that hiccups does not end a run
            os.utime(lock)


def _current_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "user": getpass.getuser(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start": int(os.environ.get("SLURM_RESTART_COUNT", "0")),  # of the job
    }


def _read_owner(folder: Path) -> dict[str, Any]:
    file = folder / OWNER
    return json.loads(file.read_text()) if file.exists() else {}


def _format_owner(folder: Path) -> str:
    owner = _read_owner(folder)
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} of {owner.get('user', '?')} on {owner.get('host', '?')}{job}"
