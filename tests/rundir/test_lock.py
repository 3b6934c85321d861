"""Whose a run dir is: one at a time, on one host or on many; and what is left behind is nobody's. How often it was started."""

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

HELD = """
import sys, time
from pathlib import Path
from aem_exp.rundir.lock import hold_run_lock
with hold_run_lock(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def job(monkeypatch):
    """Be a job, in its start number `start`."""

    def become(name, start):
        monkeypatch.setenv("SLURM_JOB_ID", name)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))

    return become


def held_elsewhere(folder, **who):
    """Another host's lock."""
    (folder / LOCK).write_text("1\nelsewhere\n")
    (folder / OWNER).write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "user": "ann", "job": None, "start": 0} | who)
    )


def test_a_live_process_owns_it_and_a_killed_one_does_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "mine\n"
        assert f"process {process.pid} of" in (describe_owner(tmp_path) or "")
        with pytest.raises(RunLocked, match=str(process.pid)), hold_run_lock(tmp_path):
            pass
        process.kill()
    assert describe_owner(tmp_path) is None
    with hold_run_lock(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_looking_changes_nothing(tmp_path):
    """Not even what a dead process left: a look must never be in the way of a start."""
    (tmp_path / LOCK).write_text(f"{2**22 + 1}\n{platform.node()}\n")  # above any pid
    before = (tmp_path / LOCK).stat()
    assert describe_owner(tmp_path) is None
    assert (tmp_path / LOCK).stat() == before
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_another_host_owns_it_until_it_has_been_silent(tmp_path):
    held_elsewhere(tmp_path, job="7")
    assert describe_owner(tmp_path) == "process 1 of ann on elsewhere, job 7"
    with pytest.raises(RunLocked, match="ann on elsewhere, job 7"), hold_run_lock(tmp_path):
        pass
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    with hold_run_lock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("name", "start", "taken"), [("7", 1, True), ("7", 0, False), ("8", 1, False)])
def test_a_requeued_job_takes_what_its_earlier_start_left(tmp_path, job, name, start, taken):
    """And only that: two commands typed in one interactive job are two."""
    held_elsewhere(tmp_path, job="7")
    job(name, start)
    if taken:
        with hold_run_lock(tmp_path):
            pass
    else:
        with pytest.raises(RunLocked), hold_run_lock(tmp_path):
            pass


def begin(folder, step, error=None, at=None):
    with attempts.record_attempt(folder, step, lambda: step if at is None else at, max_requeues=9):
        if error:
            raise error


def test_every_start_and_end_is_recorded(tmp_path):
    begin(tmp_path, 0)
    for error in (
        ConfigError("seed", 1, "no"),
        RunError("NaN", "nan"),
        MemoryError("of 8 GB"),
        OSError(28, "full"),
        KeyError(1),
    ):
        with pytest.raises(type(error)):
            begin(tmp_path, 2, error)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, 2, KeyboardInterrupt("asked to stop"), at=5)
    (tmp_path / attempts.FILE).open("a").write('{"event": "sta')  # a kill
    ends = [event for event in attempts.read(tmp_path) if event["event"] != "start"]
    assert [end.get("class") for end in ends] == [None, "config", "nan", "oom", "disk", "crash", None]
    assert ends[-1]["event"] == "stopped" and ends[-1]["step"] == 5
    assert ends[-2]["sentence"] == "KeyError: 1"


def test_a_job_that_gets_nowhere_in_two_starts_stops(tmp_path, job):
    def start(number, step):
        job("7", number)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path, step, KeyboardInterrupt())

    start(0, 0)
    start(1, 2)
    start(2, 2)  # once is bad luck
    job("7", 3)
    with pytest.raises(RunError, match="made no progress in 2 starts") as stop:
        begin(tmp_path, 2)
    assert stop.value.kind == "hang"
    job("8", 0)  # asked again by a person
    begin(tmp_path, 2)
    job("9", 10)
    with pytest.raises(RunError, match="requeued 10 times"):
        begin(tmp_path, 3)
