"""The temporary SLURM cluster of the tests: accounting, array limits, preemption, requeue, node failure."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import slurm_cluster as cluster_module
from support.runs import wait_until
from support.slurm_cluster import Cluster

HERE = ["--nodelist=node0"]  # node1 is dead, but the controller does not know yet
pytestmark = [pytest.mark.machine, pytest.mark.slow]


def gone(pid: int) -> bool:
    """Whether a process ends within a short time."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def script(folder: Path, once: str) -> list[str]:
    """Arguments of sbatch for a job that records its start count and pid, and runs a command only on its first start."""
    path = folder / "job.sh"
    number = "${SLURM_RESTART_COUNT:-0}"
    path.write_text(f"#!/bin/bash\necho {number} $$ >> {folder}/starts\n[ {number} -gt 0 ] && exit\n{once}\n")
    return [f"--output={folder}/log", "--open-mode=append", str(path)]


def starts(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "starts").read_text().splitlines()]


@pytest.fixture(scope="module")
def lost(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job on a node that has just failed; the controller notices this while the other tests run."""
    folder = tmp_path_factory.mktemp("lost")
    job = cluster.sbatch("--nodelist=node1", *script(folder, "sleep 600"))
    cluster.wait(job, {"RUNNING"})
    wait_until((folder / "starts").exists, "the job's start")
    cluster.kill_node("node1")
    assert gone(int(starts(folder)[0][1]))
    return job, folder


def test_gpus_and_accounting(cluster, tmp_path, lost):
    words = [*HERE, f"--output={tmp_path}/log", "--wrap", "echo $CUDA_VISIBLE_DEVICES; exit 3"]
    job = cluster.sbatch("--gpus-per-node=3", *words)
    assert cluster.wait(job, {"COMPLETED", "FAILED"}) == {job: "FAILED"} == cluster.sacct(job)
    assert (tmp_path / "log").read_text() == "0,1,2\n"
    with pytest.raises(AssertionError, match="not available"):
        cluster.sbatch("--gpus-per-node=9", *words)


def test_array_limit(cluster, tmp_path, lost):
    work = f"echo start >> {tmp_path}/turns; sleep 0.5; echo end >> {tmp_path}/turns"
    job = cluster.sbatch(*HERE, "--array=0-3%2", "--output=/dev/null", "--wrap", work)
    assert cluster.wait(job, {"COMPLETED"}) == {f"{job}_{task}": "COMPLETED" for task in range(4)}
    steps = [1 if turn == "start" else -1 for turn in (tmp_path / "turns").read_text().split()]
    assert len(steps) == 8
    assert max(sum(steps[:end]) for end in range(9)) == 2


def test_preempted_job_gets_sigterm_and_is_requeued(cluster, tmp_path, lost):
    # A step, as srun starts them, hears of it `grace` seconds before the job's shell does.
    trap = f"trap 'date +%s >> {tmp_path}/signals' TERM; touch {tmp_path}/trapped"
    waits = f'srun bash -c "{trap}; while true; do sleep 0.1; done"'
    victim = cluster.sbatch("--partition=preempt", *HERE, "--exclusive", *script(tmp_path, waits))
    cluster.wait(victim, {"RUNNING"})
    wait_until((tmp_path / "trapped").exists, "the trap")
    urgent = cluster.sbatch(*HERE, "--exclusive", "--output=/dev/null", "--wrap", f"date +%s > {tmp_path}/urgent")
    cluster.wait(urgent, {"COMPLETED"}, accounted=False)
    grace = int((tmp_path / "urgent").read_text()) - int((tmp_path / "signals").read_text().split()[0])
    assert grace >= 9
    cluster.wait(victim, {"COMPLETED"})
    assert cluster.history(victim) == ["PREEMPTED", "COMPLETED"]
    assert [number for number, _ in starts(tmp_path)] == ["0", "1"]


def test_requeued_job_starts_again_within_seconds(cluster, tmp_path, lost):
    job = cluster.sbatch(*HERE, *script(tmp_path, "scontrol requeue $SLURM_JOB_ID; sleep 600"))
    cluster.wait(job, {"COMPLETED"})
    assert cluster.history(job) == ["REQUEUED", "COMPLETED"]
    assert [number for number, _ in starts(tmp_path)] == ["0", "1"]


def test_job_survives_its_node(cluster, lost):
    job, folder = lost
    cluster.scontrol("update", f"JobId={job}", "ReqNodeList=")  # it had asked for the dead node
    cluster.wait(job, {"COMPLETED"})
    assert cluster.history(job) == ["NODE_FAIL", "COMPLETED"]
    assert [number for number, _ in starts(folder)] == ["0", "1"]
    assert cluster.node_states()["node1"] == "down*"
    cluster.revive_node("node1")
    cluster.run("srun", "--nodelist=node1", "true")


def test_daemons_end_with_the_tests(tmp_path):
    """A daemon and its detached child end when the process that started them is killed."""
    detach = f"setsid sleep 600 & echo $$ $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; sleep 600"
    words = f"{sys.executable!r}, {cluster_module.__file__!r}, str(os.getpid()), 'bash', '-c', {detach!r}"
    start = f"import os, subprocess, time; subprocess.Popen([{words}]); time.sleep(600)"
    tests = subprocess.Popen([sys.executable, "-c", start])
    wait_until((tmp_path / "pids").exists, "the processes")
    tests.kill()
    tests.wait()
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
