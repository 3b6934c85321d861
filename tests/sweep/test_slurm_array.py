"""A sweep on a real SLURM cluster: one job array, a crashed cell, a cancelled cell, and a retry."""

import json

import mlflow
import pytest
from support.runs import SMALL_RUN, wait_until
from support.slurm_site import SlurmSite

pytestmark = [pytest.mark.machine, pytest.mark.slow]
BASE = [word for word in SMALL_RUN if not word.startswith("trainer.steps")]
BASE += ["trainer.steps=4", "env.make._target_=slow_household.SlowHousehold"]
SWEEP = f"""
question: Does it hold?
base: {" ".join(BASE)}
arms:
  none: modulation=none
  aem: modulation=aem
  ruin: modulation=token env.make._target_=ruin.Ruin
seeds: 0
launch: launch=slurm_cpu
"""
RUIN = "from slow_household import SlowHousehold\n\n\nclass Ruin(SlowHousehold):\n"
BROKEN = (  # fails only on a node; a failure on the login node would prevent the submission
    "import os\n" + RUIN + "    def tasks(self, split):\n        if 'SLURM_JOB_ID' in os.environ:\n"
    "            raise RuntimeError('the map is lost')\n        return super().tasks(split)\n"
)
WHOLE = RUIN + "    pass\n"


def test_crashed_and_cancelled_cells_are_retried(cluster, cache, tmp_path):
    desk = SlurmSite(cluster, cache, tmp_path)
    (tmp_path / "hold.yaml").write_text(SWEEP)
    (tmp_path / "ruin.py").write_text(BROKEN)

    def status():
        rows = json.loads(desk.run_command("aem_exp.status", "hold", "--json"))
        return {row["group"]: row for row in rows}

    def states():
        return {group: row["what"] for group, row in status().items()}

    said = desk.run_command("aem_exp.sweep", "hold.yaml", "--submit", "--at-once", "2", SLOW="0.035")
    assert "sent    3 cells as job" in said
    assert set(states().values()) <= {"queued", "running"}
    again = desk.run_command("aem_exp.sweep", "hold.yaml", "--submit")
    assert "no cell is missing" in again and "sent" not in again

    found = wait_until(
        lambda: (now := status())["aem"]["what"] == "running" and now["aem"]["step"] >= 1 and now, "a step"
    )
    cluster.run("scancel", found["aem"]["job"])
    wait_until(lambda: states() == {"none": "done", "aem": "failed", "ruin": "failed"}, lambda: f"the end: {status()}")
    ended = status()
    assert (ended["aem"]["kind"], ended["aem"]["missing"]) == ("user", True)
    assert (ended["ruin"]["kind"], ended["ruin"]["missing"]) == ("config", False)
    assert "the map is lost" in ended["ruin"]["sentence"]
    table = desk.run_command("aem_exp.status", "hold", "--once")
    assert "1 done, 2 failed" in table and "the map is lost" in table

    (tmp_path / "ruin.py").write_text(WHOLE)
    said = desk.run_command("aem_exp.sweep", "hold.yaml", "--submit", "--retry", "config")
    assert "to run  2 of 3 cells" in said and "sent    2 cells" in said
    wait_until(lambda: set(states().values()) == {"done"}, lambda: f"all of it: {status()}")
    assert status()["aem"]["starts"] == 2
    assert "no cell is missing" in desk.run_command("aem_exp.sweep", "hold.yaml", "--submit")
    client = mlflow.MlflowClient(f"sqlite:///{desk.outputs / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.`aem.sweep.hold` != ''")
    assert {run.data.tags["aem.sweep.hold"]: run.info.status for run in runs} == dict.fromkeys(ended, "FINISHED")
    assert all(run.data.metrics["test/success"] >= 0 for run in runs)
