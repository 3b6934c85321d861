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
from typing import Any

from aem_exp.core import disk

LOCK, OWNER = "run.lock", "owner.json"
HEARTBEAT_SECONDS = 30.0  # seconds between touches
STALE_SECONDS = 300.0  # seconds without one


class RunLocked(Exception):
    """Somebody else is at this run; the message names them."""


@contextmanager
def hold_run_lock(folder: Path) -> Iterator[None]:
    """Be the only one at a run dir.

    Raises:
        Owned: somebody is.
    """
    lock = _acquire_lock(folder)
    if lock is None:
        raise RunLocked(f"{folder} is being run by {_format_owner(folder)}")
    stop = threading.Event()
    beating = threading.Thread(
        target=_send_heartbeats, args=[folder / LOCK, stop], name="aem_exp.rundir.lock", daemon=True
    )
    try:
        disk.write_atomically(folder / OWNER, json.dumps(_current_process()))
        beating.start()
        yield
    finally:
        stop.set()
        lock.release()


def describe_owner(folder: Path) -> str | None:
    """Who is at this run now, if anybody is. It only looks: a lock that is taken to find out may be in a start's way."""
    try:
        silent = time.time() - (folder / LOCK).stat().st_mtime
        pid, host = (folder / LOCK).read_text().split()[:2]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # nobody's, or being written at this moment
        return None
    if silent > STALE_SECONDS or (host == platform.node() and not _is_alive(int(pid))):
        return None
    return _format_owner(folder)


def _acquire_lock(folder: Path) -> Any:
    """The lock, taken; or None where somebody holds it."""
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
    """Whether a lock of another host is nobody's any more."""
    try:
        silent = time.time() - (folder / LOCK).stat().st_mtime
    except FileNotFoundError:  # just released, or broken by the attempt
        return True
    me, them = _current_process(), _read_owner(folder)
    return silent > STALE_SECONDS or (
        me["job"] is not None and me["job"] == them.get("job") and me["start"] > them["start"]
    )


def _is_alive(pid: int) -> bool:
    """Whether there is such a process on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
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
    who = _read_owner(folder)
    job = f", job {who['job']}" if who.get("job") else ""
    return f"process {who.get('pid', '?')} of {who.get('user', '?')} on {who.get('host', '?')}{job}"
