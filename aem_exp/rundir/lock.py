"""Run lock: one process or job per run directory.

The owner touches `run.lock` every 30 seconds. A lock is stale if its process on this host has died, if it was not touched for
5 minutes, or if the same job has been restarted.
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
HEARTBEAT_SECONDS = 30.0  # between touches
STALE_SECONDS = 300.0  # without a touch


class RunLocked(Exception):
    """Another process owns this run; the message names that process."""


@contextmanager
def hold_run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    Raises:
        RunLocked: another process holds the lock.
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
    """Describe the process that owns this run now; None if there is none.

    This only reads files. Taking the lock, even briefly, could block a run that starts at the same moment.
    """
    try:
        silent_seconds = time.time() - (folder / LOCK).stat().st_mtime
        pid, host = (folder / LOCK).read_text().split()[:2]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no lock, or a lock that is just being written
        return None
    if silent_seconds > STALE_SECONDS or (host == platform.node() and not _is_alive(int(pid))):
        return None
    return _format_owner(folder)


def _acquire_lock(folder: Path) -> "BaseFileLock | None":
    """Acquire the lock and return it; None if another process holds it."""
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(folder / LOCK, timeout=0)  # removes by itself the lock of a dead process on this host
    for _ in range(2):
        with suppress(Timeout):
            lock.acquire()
            return lock
        if not _is_stale(folder):
            return None
        lock.break_lock()
    return None


def _is_stale(folder: Path) -> bool:
    """Return whether a lock is stale: not touched for long, or left by an earlier start of this job."""
    try:
        silent_seconds = time.time() - (folder / LOCK).stat().st_mtime
    except FileNotFoundError:  # just released, or removed by filelock
        return True
    own, owner = _current_process(), _read_owner(folder)
    same_job = own["job"] is not None and own["job"] == owner.get("job")
    return silent_seconds > STALE_SECONDS or (same_job and own["start"] > owner["start"])


def _is_alive(pid: int) -> bool:
    """Return whether this host has a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    return True


def _send_heartbeats(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a temporary disk error must not end the run
            os.utime(lock)


def _current_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "user": getpass.getuser(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start": int(os.environ.get("SLURM_RESTART_COUNT", "0")),  # which start of the job
    }


def _read_owner(folder: Path) -> dict[str, Any]:
    file = folder / OWNER
    return json.loads(file.read_text()) if file.exists() else {}


def _format_owner(folder: Path) -> str:
    owner = _read_owner(folder)
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} of {owner.get('user', '?')} on {owner.get('host', '?')}{job}"
