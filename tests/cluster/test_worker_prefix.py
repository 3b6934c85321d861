"""`launch.worker_prefix="srun ..."` on a real cluster: where workers run, and what happens if one dies or its node is lost."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
from support import ROOT, slurm_cluster
from support.runs import skip_or_fail, wait_until

pytestmark = pytest.mark.machine
WORLD = """
import os
from aem_exp.envs import Task, Turn


class World:
    fingerprint, goal = "where", "say where you are"

    def tasks(self, split):
        return []

    def env(self):
        return World()

    def parse(self, response):
        return response

    def reset(self, task):
        self.turns = 0
        return Turn(task.id)

    def step(self, response):
        self.turns += 1
        if response == "die":
            os._exit(7)
        names = ("SLURM_STEP_ID", "SLURM_NTASKS", "SLURMD_NODENAME")
        return Turn(f"{self.turns}", metrics={}) if response == "count" else Turn(
            " ".join([str(os.getpid()), *(os.environ.get(name, "-") for name in names)])
        )

    def close(self):
        pass
"""
PROGRAM = """
import json, sys, time
from pathlib import Path
from aem_exp.envs import Task
from aem_exp.envs.workers import WorkerPool

out, marks = Path(sys.argv[1]), Path(sys.argv[2])
pool = WorkerPool({"_target_": "where.World"}, 2, 120.0, sys.argv[3:])


def note(name, replies):
    seen = {slot: [reply.turn.observation if reply.turn else "", reply.error] for slot, reply in replies.items()}
    (out / "part").write_text(json.dumps(seen))
    (out / "part").rename(out / name)


note("reset", pool.reset({slot: Task(str(slot)) for slot in range(4)}))
note("where", pool.step({0: "where", 1: "where", 2: "count", 3: "count"}))
note("dead", pool.step({0: "die", 2: "count"}))  # both on the first worker
pool.reset({0: Task("0")})
note("after", pool.step({0: "where", 1: "where"}))
while not (marks / "lost").exists() and not (marks / "end").exists():
    time.sleep(0.2)
if (marks / "lost").exists():
    pool.step({2: "count", 3: "count"})  # these episodes may be lost with their node
    pool.reset({slot: Task(str(slot)) for slot in range(2)})
    note("replaced", pool.step({0: "where", 1: "where"}))
pool.close()
(out / "closed").touch()
"""


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory):
    """A cluster that a test may break."""
    if why := slurm_cluster.missing():
        skip_or_fail(why)
    started = slurm_cluster.Cluster.start(tmp_path_factory.mktemp("three") / "c", nodes=3)
    yield started
    started.stop()


@pytest.fixture
def job(tmp_path):
    """Starts a job with a trainer on node0, in a step of its own, and workers behind `srun` on the other nodes of the job."""
    (tmp_path / "where.py").write_text(WORLD)
    (tmp_path / "program.py").write_text(PROGRAM)
    jobs = []

    def start(cluster, *srun, options=("--nodes=2",)):
        words = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(tmp_path), "srun", *srun]
        script = tmp_path / "job.sh"
        script.write_text(
            textwrap.dedent(f"""\
            #!/bin/bash
            export PYTHONPATH={ROOT}:{tmp_path}
            srun --nodes=1 --ntasks=1 --nodelist=node0 --cpus-per-task=2 --overlap {" ".join(words)}
            """)
        )
        number = cluster.sbatch(*options, "--cpus-per-task=4", f"--output={tmp_path}/job.log", str(script))
        jobs.append((cluster, number))
        return number

    yield start
    for cluster, number in jobs:
        cluster.run("scancel", number)


def read(folder: Path, name: str):
    def written():
        log = folder / "job.log"
        text = log.read_text() if log.exists() else ""
        assert "srun: error" not in text, text
        return (folder / name).exists()

    wait_until(written, name, 300)
    return {int(slot): entry for slot, entry in json.loads((folder / name).read_text()).items()}


def test_srun_places_workers_on_the_other_node(job, cluster, tmp_path):
    number = job(cluster, "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node1", "--cpus-per-task=1")
    assert all(not error for _, error in read(tmp_path, "reset").values())
    where = {slot: text.split() for slot, (text, _) in read(tmp_path, "where").items() if slot < 2}
    assert {words[3] for words in where.values()} == {"node1"}
    assert {words[2] for words in where.values()} == {"1"}  # not the trainer's number of tasks
    assert where[0][:2] != where[1][:2]  # two workers, each a step of its own
    dead = read(tmp_path, "dead")
    assert "exit code 7" in dead[0][1]
    assert dead[2] == ["2", ""]  # its episode was replayed in the new worker
    after = {slot: text.split() for slot, (text, _) in read(tmp_path, "after").items()}
    assert after[1] == where[1] and after[0][:2] != where[0][:2] and after[0][3] == "node1"
    (tmp_path / "end").touch()
    cluster.wait(number, {"COMPLETED"})
    assert (tmp_path / "closed").exists()
    assert not [pid for words in (*after.values(), *where.values()) if os.path.exists(f"/proc/{(pid := words[0])}")]


def test_workers_of_a_lost_node_are_replaced_on_another(job, three_nodes, tmp_path):
    """The job has three nodes, and goes on without one of them (`--no-kill`)."""
    job(three_nodes, "--overlap", "--nodes=1", "--ntasks=1", "--exclude=node0", options=("--nodes=3", "--no-kill"))
    where = {slot: text.split() for slot, (text, _) in read(tmp_path, "after").items()}
    lost = where[0][3]
    three_nodes.kill_node(lost)
    wait_until(lambda: "DOWN" in three_nodes.node_states()[lost].upper(), "the node to be down", 300)
    (tmp_path / "lost").touch()
    replaced = read(tmp_path, "replaced")
    assert all(not error for _, error in replaced.values())
    assert lost not in {text.split()[3] for text, _ in replaced.values()}
    wait_until((tmp_path / "closed").exists, "the end", 300)
