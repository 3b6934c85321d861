"""Runs on a real SLURM cluster: submission, preemption, requeue, node failure, cancellation and time limits lose nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS
from support.runs import read_metrics, wait_until, weights_moved
from support.slurm_site import SLOW_RUN, SlurmSite

from aem_exp import aem, config, provenance
from aem_exp.rundir import attempts
from aem_exp.sandboxes.bwrap import Bwrap

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def steps(folder):
    return sum("train/success" in row for row in read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0


def begun(folder, starts):
    return sum(event["event"] == "start" for event in attempts.read(folder)) >= starts


def log(folder):
    return "\n".join(path.read_text() for path in (folder / "slurm").glob("*.out"))


def finished(folder, seconds=120):
    wait_until(lambda: (folder / "result.json").exists(), lambda: f"the result in {folder}: {log(folder)}", seconds)


def same(run, reference):
    """Metrics, weights and episodes of two runs are equal."""
    import pandas as pd
    from safetensors.torch import load_file

    assert weights_moved(reference) and read_metrics(run) == read_metrics(reference)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, reference))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "episodes.parquet") for folder in (run, reference)))


@pytest.fixture
def desk(cluster, cache, tmp_path):
    return SlurmSite(cluster, cache, tmp_path)


def test_run_survives_preemption_requeue_and_node_failure(cluster, cache, tmp_path):
    """One run with three interruptions: preemption (SIGTERM, then SIGKILL), a plain requeue, and a node failure."""
    desk = SlurmSite(cluster, cache, tmp_path, partition="preempt")
    reference = desk.here()
    folder, job = desk.submit(SLOW="0.03")
    assert "already active" in desk.run_command("aem_exp", *SLOW_RUN)

    wait_until(lambda: steps(folder) >= 1, lambda: f"a step: {log(folder)}")
    saved = list(folder.glob("checkpoint-*"))
    assert not saved  # it saves every two steps
    hog = cluster.sbatch("-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    wait_until(lambda: "asked to stop (SIGTERM)" in log(folder), "the end of the step")
    assert list(folder.glob("checkpoint-*"))  # at the end of the step
    wait_until(lambda: begun(folder, 2), "a second start")
    cluster.wait(hog, {"COMPLETED"})

    wait_until(lambda: steps(folder) >= 3, lambda: f"another step: {log(folder)}")
    cluster.scontrol("requeue", job)
    wait_until(lambda: begun(folder, 3), "a third start")
    (found,) = desk.states(folder)
    assert (found.what, found.starts) == ("running", 3)

    wait_until(lambda: steps(folder) >= 4, lambda: f"another step: {log(folder)}")
    node = cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={job}").strip()
    cluster.kill_node(node, tell=True)
    finished(folder)
    cluster.revive_node(node)
    same(folder, reference)
    assert begun(folder, 4)
    assert "finished" in desk.run_command("aem_exp", *SLOW_RUN)


def test_two_nodes_stop_at_the_same_step(desk):
    """SIGUSR2, which precedes a time limit, reaches one of two processes. Both stop at the same step."""
    two = ["launch.nodes=2", "seed=2"]
    reference = desk.folder / "reference"
    calm, _ = desk.submit(*two, f"outputs={reference}")
    folder, job = desk.submit(*two, SLOW="0.05")
    wait_until(lambda: steps(folder) >= 1, lambda: f"a step: {log(folder)}")
    pid = attempts.read(folder)[0]["pid"]
    os.kill(pid, signal.SIGUSR2)
    wait_until(lambda: begun(folder, 2), lambda: f"a second start: {log(folder)}")
    finished(folder)
    finished(calm)
    same(folder, calm)
    assert "asked to stop (SIGUSR2); step" in log(folder)
    assert desk.cluster.history(job)[0] == "REQUEUED"
    assert "finished" in desk.run_command("aem_exp", *SLOW_RUN, *two)


def test_one_node_serves_and_another_trains(desk):
    """A job of two nodes. The server has its own key and port, gets new weights, and ends with the run. The next start of the
    run has a new server."""
    served = ["launch.sampler=served", "launch.server_nodes=1", "launch.server_seconds=90", "trainer.steps=3"]
    served += ["model.make.heads=2"]  # of 32: vLLM on a CPU serves no smaller ones
    assert "AEM_SITE=" in desk.run_command("aem_exp", *SLOW_RUN, *served, code=2)
    server = f'exec {sys.executable} {TESTS / "support" / "completions_server.py"} "$@"\n'
    (desk.folder / "site" / "vllm_server.sh").write_text(server)
    (desk.folder / "site" / "site.yaml").write_text("interface: lo")
    folder, job = desk.submit(*served, "seed=7", SLOW="0.01")
    wait_until(lambda: steps(folder) >= 1, lambda: f"a step: {log(folder)}")
    os.kill(attempts.read(folder)[0]["pid"], signal.SIGUSR2)
    wait_until(lambda: begun(folder, 2), lambda: f"a second start: {log(folder)}")
    finished(folder)
    desk.cluster.wait(job, {"COMPLETED"})
    assert weights_moved(folder) and all(row.get("train/sampler_gap", 0) < 1e-3 for row in read_metrics(folder))
    places = sorted((folder / "servers").iterdir())
    assert [place.name for place in places] == [f"{job}-0", f"{job}-1"]
    for place in places:
        assert (place / "key").stat().st_mode & 0o777 == 0o600 and (place / "key").read_text() not in log(folder)
        assert len((place / "urls").read_text().splitlines()) == 1 and not (place / "weights").exists()
    (desk.folder / "site" / "site.yaml").write_text("interface: lol")
    nowhere, job = desk.submit(*served, "seed=8")
    desk.cluster.wait(job, {"FAILED"})
    assert "interface=lol: did you mean lo?" in log(nowhere)


def test_time_limit_loses_no_step(desk):
    """SLURM sends its signal about 70 s (plus or minus 30 s) before the time limit of three minutes.

    So the first step must end within 80 s, also on a busy machine, and the last one must not end within 140 s.
    """
    desk.run_command("aem_exp.prepare", *SLOW_RUN)  # makes the policy, unless an earlier test has
    words = ["seed=3", "trainer.steps=16", "launch.hours=0.05", "launch.warn_seconds=70"]
    folder, job = desk.submit(*words, SLOW="0.1")
    wait_until(lambda: begun(folder, 2), lambda: f"a second start: {log(folder)}", 300)
    assert "asked to stop (SIGUSR2)" in log(folder)
    assert steps(folder) >= 1
    first = [event for event in attempts.read(folder) if event["event"] == "start"]
    assert first[1]["step"] > 0
    desk.cluster.run("scancel", job)
    wait_until(lambda: desk.states(folder)[0].kind == "user", "the cancelled state")
    assert "cancelled" in desk.states(folder)[0].sentence


def test_edits_do_not_affect_queued_jobs(desk):
    (desk.folder / "site" / "site.yaml").write_text(json.dumps({"sbatch": {"begin": "now+4"}}))
    folder, _ = desk.submit("seed=4")
    (desk.folder / "slow_household.py").write_text("raise RuntimeError('edited')")
    assert not begun(folder, 1)
    assert desk.states(folder)[0].what == "queued"
    finished(folder)


def test_run_directory_that_the_node_cannot_read(desk):
    """The disk is not shared, so SLURM cannot open the log."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount (root)")
    (desk.folder / "site" / "site.yaml").write_text(json.dumps({"sbatch": {"nodelist": "node1"}}))
    desk.outputs.mkdir()
    desk.cluster.kill_node("node1")
    desk.cluster.revive_node("node1", blind=desk.outputs)
    folder, _ = desk.submit("seed=6")
    wait_until(lambda: desk.states(folder)[0].what == "failed", "the end of the job")
    found = desk.states(folder)[0]
    assert (found.kind, found.missing) == ("unseen", True) and "run directory" in found.sentence
    desk.cluster.kill_node("node1")
    desk.cluster.revive_node("node1")


def test_prepared_run_needs_no_network(desk):
    """The command of a job, in a network namespace without any network."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a network namespace (root)")
    (desk.folder / "site" / "site.yaml").write_text(json.dumps({"sbatch": {"begin": "now+1hour"}}))
    assert "policy" in desk.run_command("aem_exp.prepare", *SLOW_RUN, "seed=5")
    folder, job = desk.submit("seed=5")
    desk.cluster.run("scancel", job)
    wait_until(lambda: desk.states(folder)[0].what == "failed", "the end of the job")
    assert desk.states(folder)[0].kind == "user"
    code = {"PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1"}
    command = ["unshare", "-n", sys.executable, "-m", "aem_exp.run", str(folder)]
    done = subprocess.run(command, env=desk.env | code, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert desk.states(folder)[0].what == "done"


def test_rejected_job_is_one_sentence(desk):
    (desk.folder / "site" / "site.yaml").write_text("partition: nowhere")
    err = desk.run_command("aem_exp", *SLOW_RUN, code=2)
    assert "invalid partition" in err and "partitions: gpu preempt" in err
    (desk.folder / "site" / "site.yaml").write_text("partitoin: gpu")
    assert "did you mean" in desk.run_command("aem_exp", *SLOW_RUN, code=2)
    (desk.folder / "site" / "site.yaml").write_text("")
    err = desk.run_command("aem_exp", *SLOW_RUN, "launch.gpus_per_node=12", "launch.trainer.use_cpu=false", code=2)
    assert "12 GPUs" in err and len(err.splitlines()) == 1
    nowhere = {"PATH": "/nowhere"}
    assert "sbatch is not on the PATH" in desk.run_command("aem_exp", *SLOW_RUN, code=2, **nowhere)


def test_missing_resources_are_reported_before_submission(desk):
    pytest.importorskip("swebench")
    if why := Bwrap().missing():
        pytest.skip(why)
    words = ("+experiment=swebench_32b", "launch.nodes=1", "launch.server_nodes=1")
    err = desk.run_command("aem_exp", *words, code=2)
    assert err.startswith("aem_exp: env.make.train=R2E-Gym/R2E-Gym-Subset: ") and "aem_exp.prepare" in err, err
    err = desk.run_command("aem_exp", *words, "env=swe", "+env.make.limits.memory=5", code=2)
    assert err == "aem_exp: env.make.limits.memory=5: no such key; did you mean memory_mb?\n", err
    err = desk.run_command("aem_exp", *words, "env=swe", code=2)
    assert err.startswith("aem_exp: model.path=Qwen/Qwen3-32B: its weights are not on this machine; "), err
    (desk.folder / "ruin.py").write_text("def Ruin(): return 1 / 0\n")
    err = desk.run_command("aem_exp", *SLOW_RUN, "env.make={_target_: ruin.Ruin}", code=2)
    assert err.startswith("aem_exp: env.make._target_=ruin.Ruin: ") and "ZeroDivisionError" in err, err
    (desk.folder / "empty").mkdir()
    (desk.folder / "empty" / "config.json").write_text("{}")
    err = desk.run_command("aem_exp", *words, "env=swe", f"model.path={desk.folder / 'empty'}", code=2)
    assert "no *.safetensors" in err and not list(desk.outputs.glob("*/experiment.json")), err


def test_frozen_code_is_shared_and_read_only(clean, tmp_path):
    runs = {tmp_path / f"run{seed}": config.load([f"seed={seed}"]) for seed in (0, 1)}
    provenance.freeze_code(runs)
    one, two = (folder / "code" / "aem_exp" / "aem.py" for folder in runs)
    assert one.samefile(two) and not one.samefile(aem.__file__)
    assert one.read_bytes() == Path(aem.__file__).read_bytes() and one.stat().st_mode & 0o222 == 0
    shutil.rmtree(tmp_path / "run0")
    assert two.exists()


WORKER_NODES = ["launch.workers=2", "launch.worker_nodes=1", "launch.worker_sbatch={cpus-per-task: '4'}"]
WORKER_PREFIX = "launch.worker_prefix='srun --het-group=1 --nodes=1 --ntasks=1 --cpus-per-task=1 --exact'"


def test_environments_are_stepped_on_other_nodes_of_a_heterogeneous_job(desk):
    """It is requeued as a whole, and gives the weights of a run whose environments are stepped in the same process."""
    reference = desk.here()
    folder, job = desk.submit(*WORKER_NODES, WORKER_PREFIX, SLOW="0.05")
    wait_until(lambda: steps(folder) >= 1, lambda: f"a step: {log(folder)}")
    rows = desk.cluster.run("sacct", "--noheader", "--parsable2", "--format=JobID,NodeList", "--jobs", job).splitlines()
    found = dict(row.split("|") for row in rows)
    assert found[f"{job}+0"] != found[f"{job}+1"], rows
    assert sum(node == found[f"{job}+1"] for node in found.values()) >= 3, (
        rows
    )  # the component, and a step for each worker
    assert desk.states(folder)[0].what == "running"
    desk.cluster.scontrol("requeue", job)
    wait_until(lambda: begun(folder, 2), "a second start")
    finished(folder)
    same(folder, reference)


def test_worker_nodes_are_refused_for_arrays_and_without_a_prefix_that_reaches_them(desk):
    error = desk.run_command("aem_exp", "launch=slurm_cpu", *WORKER_NODES, "launch.worker_prefix='srun -N1'", code=2)
    assert "launch.worker_prefix=srun -N1: must reach the launch.worker_nodes: srun --het-group=1" in error
    words = ["launch=slurm_cpu", *WORKER_NODES, WORKER_PREFIX, "seed=0,1", "-m", "--submit"]
    error = desk.run_command("aem_exp", *words, code=2)
    assert "launch.worker_nodes=1: works for single runs only" in error and len(error.splitlines()) == 1
