"""A sweep as a user runs it: planned, carried out here, one cell broken, asked again, and seen in MLflow."""

import json
import os
import re
import signal
import subprocess
import sys

import mlflow
import pytest
from support.runs import DEADLINE, SMALL_RUN, wait_until

from aem_exp import status
from aem_exp.cluster import run_state
from aem_exp.rundir import checkpoints, membership
from aem_exp.sweep import command as sweep

TINY = [word for word in SMALL_RUN if not word.startswith(("trainer.steps", "evaluation.every"))] + ["trainer.steps=2"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "quick.yaml").write_text(
        f"question: Does it work?\nbase: {' '.join(TINY)}\n"
        "arms:\n  none: modulation=none\n  aem: modulation=aem\nseeds: 1\n"
    )
    env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(folder / "out"), "COLUMNS": "160"}

    def ask(module, *words, code=0):
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    ask.cache = str(cache)
    return folder, ask


@pytest.fixture(scope="module")
def carried_out(desk):
    """The plan before, what the door said, and the sweep when it was first carried out, with one cell that cannot run."""
    folder, ask = desk
    plan = ask("aem_exp.sweep", "quick.yaml")
    rows = json.loads(ask("aem_exp.sweep", "quick.yaml", "--json"))["cells"]
    broken = next(row for row in rows if row["groups"] == ["aem"] and row["seed"] == 1)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / os.path.basename(broken["run"])).mkdir()
    (folder / "out" / os.path.basename(broken["run"]) / "before.json").write_text("{}")  # of another, half-written run
    (folder / "out" / os.path.basename(broken["run"]) / "provenance.json").write_text("not JSON")
    said = ask("aem_exp.sweep", "quick.yaml", "--local", "--at-once", "2", code=1)
    return plan, said, rows


def test_a_plan_runs_nothing(desk, carried_out):
    plan, _, rows = carried_out
    assert "to run  2 of 2 cells" in plan
    assert "power" in plan and "--local" in plan
    assert {row["state"] for row in rows} == {"new"}


def test_a_cell_that_fails_stops_no_other(desk, carried_out):
    _, ask = desk
    _, said, _ = carried_out
    assert "1 of 2 cells did not finish" in said
    assert re.search(r"/2 +aem seed 1: failed: ", said)
    assert re.search(r"/2 +none seed 1: dev \d+% -> \d+%, test \d+%, [\d:]+ (s|min)", said)
    table = ask("aem_exp.status", "quick")
    assert "viewStateShareKey=aem.quick.curves" in table
    assert "1 done, 1 failed" in table
    rows = json.loads(ask("aem_exp.status", "quick", "--json"))
    (failed,) = [row for row in rows if row["what"] == "failed"]
    assert (failed["kind"], failed["missing"], failed["seed"]) == ("disk", False, "1")
    assert "provenance.json is damaged" in failed["sentence"]


def test_a_report_of_half_a_sweep_says_what_is_missing(desk, carried_out):
    folder, ask = desk
    said = ask("aem_exp.report", "quick.yaml", "--no-tracking")
    assert "0 of 1" in said and "not compared: no run" in said and "1 runs are missing, failed or diverged" in said
    page = (folder / "out" / "reports" / "quick" / "report.md").read_text()
    assert "unreadable" in page and "provenance.json is damaged" in page


def test_asked_again_only_what_is_missing_runs(desk, carried_out):
    folder, ask = desk
    assert "to run  0 of 2 cells" in ask("aem_exp.sweep", "quick.yaml")
    (broken,) = [path for path in (folder / "out").glob("*/before.json") if path.read_text() == "{}"]
    broken.unlink()
    (broken.parent / "provenance.json").unlink()
    assert "to run  1 of 2 cells" in ask("aem_exp.sweep", "quick.yaml", "--retry", "disk", "--local")
    said = ask("aem_exp.sweep", "quick.yaml", "--local")
    assert "nothing is missing" in said and said.endswith("next    python -m aem_exp.report quick.yaml\n")
    assert "2 done" in ask("aem_exp.status", "--once")


def test_the_sweep_can_be_found_in_mlflow(desk, carried_out):
    folder, _ = desk
    _, said, _ = carried_out
    assert "viewStateShareKey=aem.quick.curves" in said
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'out' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "household-tiny"]
    runs = client.search_runs([experiment.experiment_id], "tags.`aem.sweep.quick` != ''")
    assert sorted(run.data.tags["aem.sweep.quick"] for run in runs if run.info.status == "FINISHED")[:1] == ["aem"]
    assert len({run.data.tags["aem.signature"] for run in runs}) == len(runs) >= 2
    assert any(tag.startswith("mlflow.sharedViewState.aem.quick") for tag in experiment.tags)


def test_its_report_stands_in_mlflow_and_is_made_again_from_archives_alone(desk, carried_out, tmp_path):
    folder, ask = desk
    said = ask("aem_exp.report", "quick.yaml", "--archive", str(tmp_path))
    assert "not compared: one run" in said and "kept    2 archives" in said
    assert ask("aem_exp.report", "quick.yaml").splitlines()[-1] == said.splitlines()[-1]  # no second run in MLflow
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'out' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "household-tiny"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`aem.report` = 'quick'")
    assert {"index.html", "report.md", "tables"} == {file.path for file in client.list_artifacts(run.info.run_id)}
    assert run.info.run_id in said and run.info.run_id in experiment.tags["mlflow.note.content"]
    ask("aem_exp.report", "quick.yaml", f"outputs={tmp_path / 'none'}", "--from", str(tmp_path))
    one, other = (out / "reports" / "quick" / "tables" for out in (folder / "out", tmp_path / "none"))
    tables = [table.name for table in one.iterdir() if table.name != "runs.csv" and table.name != "asked.csv"]
    assert len(tables) > 5 and all((one / name).read_text() == (other / name).read_text() for name in tables)


def test_a_run_may_belong_to_two_sweeps(desk, carried_out):
    """The second finds it done, and MLflow shows it under both."""
    folder, ask = desk
    (folder / "other.yaml").write_text(
        f"question: Another?\nbase: {' '.join(TINY)}\narms:\n  base: modulation=none\n  half: modulation=lam_half\nseeds: 1\n"
    )
    rows = json.loads(ask("aem_exp.sweep", "other.yaml", "--json"))["cells"]
    assert [row["state"] for row in rows] == ["done", "new"]
    ask("aem_exp.sweep", "other.yaml", "--local")
    assert membership.read_labels(folder / "out" / os.path.basename(rows[0]["run"])) == {
        "quick": "none",
        "other": "base",
    }
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'out' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "household-tiny"]
    runs = client.search_runs([experiment.experiment_id], "tags.`aem.sweep.other` = 'base'")
    assert [run.data.tags["aem.sweep.quick"] for run in runs] == ["none"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_it_ends_what_it_began(desk, number):
    """kill of the door, or Ctrl-C, asks its cells to save and end, and waits for them."""
    folder, ask = desk
    command = [sys.executable, "-m", "aem_exp.sweep", "quick.yaml", "--local", "seed=7", "trainer.steps=50"]
    env = {**os.environ, "AEM_OUTPUTS": str(folder / number.name), "AEM_CACHE": ask.cache}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(folder.glob(f"{number.name}/*/before.json")), "a run in its midst")
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert "stopping: 1 at work save at the end of their step; press it again to leave at once" in out
    assert "stopped; to go on: python -m aem_exp.sweep" in err
    (begun,) = (folder / number.name).glob("*/attempts.jsonl")
    assert json.loads(begun.read_text().splitlines()[-1])["event"] == "stopped"
    assert run_state.read([begun.parent])[begun.parent].what == "stopped"
    assert checkpoints.find_newest(begun.parent) is not None


STUBBORN = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: print("asked by", signal.Signals(number).name, flush=True))
print("up", flush=True)
while True:
    time.sleep(1)
"""
STOPS = """
import subprocess, sys
from aem_exp.jobs import dispatch
from aem_exp.cluster.signals import Signals
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
sys.stdin.readline()
with Signals():
    dispatch._stop_processes([child], lambda text: None)
print("ended by", -child.returncode, flush=True)
"""


def test_a_cell_that_does_not_end_is_ended_by_further_ctrl_c():
    """First it is asked to save, then to leave at once, then it is killed."""
    command = [sys.executable, "-c", STOPS, STUBBORN]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout.readline() == "up\n"
    process.stdin.write("\n")
    assert process.stdout.readline() == "asked by SIGTERM\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked by SIGINT\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=DEADLINE)
    assert out == f"ended by {signal.SIGKILL.value}\n"


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (sweep.main, ["nowhere"], "sweep=nowhere: choose from"),
        (sweep.main, ["household_quick", "--submit", "--local"], "not both"),
        (sweep.main, ["household_quick", "--submit"], "such as launch=slurm_cpu"),
        (sweep.main, ["household_quick", "trainer.stps=1"], "did you mean"),
        (status.main, ["nosuch"], "no sweep of that name"),
        (status.main, ["--outputs", "/nowhere"], "there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(capsys, monkeypatch, tmp_path, main, words, said):
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*/experiment.json"))


def test_a_state_is_read_from_what_a_kill_left(tmp_path):
    def run(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "experiment.json").write_text('{"trainer": {"steps": 9}}')
        for name, lines in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    start = {"event": "start", "at": 1.0, "step": 0, "job": None, "start": 0}
    new, killed = run(), run(attempts=[start])
    stopped = run(attempts=[start, {"event": "stopped", "at": 2.0, "sentence": "asked to stop (SIGTERM)", "step": 3}])
    nan = run(
        attempts=[start, {"event": "failed", "at": 2.0, "class": "nan", "sentence": "the norm is nan", "step": 3}]
    )
    row = {"step": 4, "time/logged_at": 1, "train/success": 0.5}
    half = run(attempts=[start], metrics=[row])
    (half / "attempts.jsonl").open("a").write('{"event": "sto')
    ruined = run()
    (ruined / "experiment.json").write_text('{"trainer":')
    found = run_state.read([new, killed, stopped, nan, half, ruined])
    seen = {folder: (s.what, s.kind, s.missing) for folder, s in found.items()}
    assert seen == {
        new: ("new", "", True),
        killed: ("failed", "killed", True),
        stopped: ("stopped", "", True),
        nan: ("failed", "nan", False),
        half: ("failed", "killed", True),
        ruined: ("failed", "disk", False),
    }
    assert found[ruined].sentence.startswith("experiment.json is damaged (Expecting value")
    assert (found[half].step, found[half].steps, found[half].score) == (4, 9, ("train/success", 0.5))
