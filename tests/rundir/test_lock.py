"""The run lock: one owner at a time on one or several hosts, and stale locks are removed. The record of starts and ends."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest

from aem_exp.core.errors import ConfigError, RunError
from aem_exp.rundir import attempts
from aem_exp.rundir.lock import LOCK, OWNER, STALE_SECONDS, RunLocked, describe_owner, hold_run_lock

HOLD_LOCK = """
import sys, time
from pathlib import Path
from aem_exp.rundir.lock import hold_run_lock
with hold_run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def job(monkeypatch):
    """Set the environment of job `name` in its start number `start`."""

    def set_job(name, start):
        monkeypatch.setenv("SLURM_JOB_ID", name)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))

    return set_job


def write_foreign_lock(folder, **owner):
    """Write the lock of another host."""
    (folder / LOCK).write_text("1\nelsewhere\n")
    (folder / OWNER).write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "user": "ann", "job": None, "start": 0} | owner)
    )


def test_live_process_owns_the_lock_and_killed_one_does_not(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "locked\n"
        assert f"process {process.pid} of" in (describe_owner(tmp_path) or "")
        with pytest.raises(RunLocked, match=str(process.pid)), hold_run_lock(tmp_path):
            pass
        process.kill()
    assert describe_owner(tmp_path) is None
    with hold_run_lock(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_describe_owner_only_reads(tmp_path):
    """Not even the lock of a dead process is removed: reading the owner must never block a start."""
    (tmp_path / LOCK).write_text(f"{2**22 + 1}\n{platform.node()}\n")  # above any pid
    before = (tmp_path / LOCK).stat()
    assert describe_owner(tmp_path) is None
    assert (tmp_path / LOCK).stat() == before
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_lock_of_another_host_is_stale_without_heartbeats(tmp_path):
    write_foreign_lock(tmp_path, job="7")
    assert describe_owner(tmp_path) == "process 1 of ann on elsewhere, job 7"
    with pytest.raises(RunLocked, match="ann on elsewhere, job 7"), hold_run_lock(tmp_path):
        pass
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    with hold_run_lock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("name", "start", "taken"), [("7", 1, True), ("7", 0, False), ("8", 1, False)])
def test_requeued_job_takes_over_the_lock_of_its_earlier_start(tmp_path, job, name, start, taken):
    """Another job does not, nor does a second command in the same start of an interactive job."""
    write_foreign_lock(tmp_path, job="7")
    job(name, start)
    if taken:
        with hold_run_lock(tmp_path):
            pass
    else:
        with pytest.raises(RunLocked), hold_run_lock(tmp_path):
            pass


def start_run(folder, step, error=None, saved=None):
    with attempts.record_attempt(folder, step, lambda: step if saved is None else saved, max_requeues=9):
        if error:
            raise error


def test_starts_and_ends_are_recorded(tmp_path):
    start_run(tmp_path, 0)
    for error in (
        ConfigError("seed", 1, "no"),
        RunError("NaN", "nan"),
        MemoryError("of 8 GB"),
        OSError(28, "full"),
        KeyError(1),
    ):
        with pytest.raises(type(error)):
            start_run(tmp_path, 2, error)
    with pytest.raises(KeyboardInterrupt):
        start_run(tmp_path, 2, KeyboardInterrupt("stopped by a user"), saved=5)
    (tmp_path / attempts.FILE).open("a").write('{"event": "sta')  # as a killed process leaves it
    ends = [event for event in attempts.read(tmp_path) if event["event"] != "start"]
    assert [end.get("class") for end in ends] == [None, "config", "nan", "oom", "disk", "crash", None]
    assert ends[-1]["event"] == "stopped" and ends[-1]["step"] == 5
    assert ends[-2]["sentence"] == "KeyError: 1"


def test_job_without_progress_in_two_starts_stops(tmp_path, job):
    def start(number, step):
        job("7", number)
        with pytest.raises(KeyboardInterrupt):
            start_run(tmp_path, step, KeyboardInterrupt())

    start(0, 0)
    start(1, 2)
    start(2, 2)  # one start without progress is allowed
    job("7", 3)
    with pytest.raises(RunError, match=r"job 7 .*2 starts.* step 2") as stop:
        start_run(tmp_path, 2)
    assert stop.value.kind == "hang"
    job("8", 0)  # submitted again by a user
    start_run(tmp_path, 2)
    job("9", 10)
    with pytest.raises(RunError, match=r"10 times.*launch\.requeues=9") as stop:
        start_run(tmp_path, 3)
    assert stop.value.kind == "hang"
