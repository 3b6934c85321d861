"""A sweep as a user runs it: plan, local execution with a broken cell, repetition, report, and MLflow."""

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
def first_execution(desk):
    """The output of the plan and of the first execution, in which one cell fails, and the rows of the plan."""
    folder, ask = desk
    plan = ask("aem_exp.sweep", "quick.yaml")
    rows = json.loads(ask("aem_exp.sweep", "quick.yaml", "--json"))["cells"]
    broken = next(row for row in rows if row["groups"] == ["aem"] and row["seed"] == 1)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / os.path.basename(broken["run"])).mkdir()
    (folder / "out" / os.path.basename(broken["run"]) / "before.json").write_text(
        "{}"
    )  # left by another, incomplete run
    (folder / "out" / os.path.basename(broken["run"]) / "provenance.json").write_text("not JSON")
    said = ask("aem_exp.sweep", "quick.yaml", "--local", "--at-once", "2", code=1)
    return plan, said, rows


@pytest.mark.slow
def test_plan_runs_nothing(desk, first_execution):
    plan, _, rows = first_execution
    assert "to run  2 of 2 cells" in plan
    assert "power" in plan and "--local" in plan
    assert {row["state"] for row in rows} == {"new"}


@pytest.mark.slow
def test_failed_cell_does_not_stop_others(desk, first_execution):
    _, ask = desk
    _, said, _ = first_execution
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


@pytest.mark.slow
def test_report_of_an_incomplete_sweep_lists_missing_runs(desk, first_execution):
    folder, ask = desk
    said = ask("aem_exp.report", "quick.yaml", "--no-tracking")
    assert "0 of 1" in said and "not compared: no run" in said and "1 runs are missing, failed or diverged" in said
    page = (folder / "out" / "reports" / "quick" / "report.md").read_text()
    assert "unreadable" in page and "provenance.json is damaged" in page


@pytest.mark.slow
def test_repeated_command_runs_only_missing_cells(desk, first_execution):
    folder, ask = desk
    assert "to run  0 of 2 cells" in ask("aem_exp.sweep", "quick.yaml")
    (broken,) = [path for path in (folder / "out").glob("*/before.json") if path.read_text() == "{}"]
    broken.unlink()
    (broken.parent / "provenance.json").unlink()
    assert "to run  1 of 2 cells" in ask("aem_exp.sweep", "quick.yaml", "--retry", "disk", "--local")
    said = ask("aem_exp.sweep", "quick.yaml", "--local")
    assert "no cell is missing" in said and said.endswith("next    python -m aem_exp.report quick.yaml\n")
    assert "2 done" in ask("aem_exp.status", "--once")


def test_sweep_is_in_mlflow(desk, first_execution):
    folder, _ = desk
    _, said, _ = first_execution
    assert "viewStateShareKey=aem.quick.curves" in said
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'out' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "household-tiny"]
    runs = client.search_runs([experiment.experiment_id], "tags.`aem.sweep.quick` != ''")
    assert sorted(run.data.tags["aem.sweep.quick"] for run in runs if run.info.status == "FINISHED")[:1] == ["aem"]
    assert len({run.data.tags["aem.signature"] for run in runs}) == len(runs) >= 2
    assert any(tag.startswith("mlflow.sharedViewState.aem.quick") for tag in experiment.tags)


@pytest.mark.slow
def test_report_is_in_mlflow_and_can_be_rebuilt_from_archives(desk, first_execution, tmp_path):
    folder, ask = desk
    said = ask("aem_exp.report", "quick.yaml", "--archive", str(tmp_path))
    assert "not compared: one run" in said and "archive 2 archives" in said
    assert ask("aem_exp.report", "quick.yaml").splitlines()[-1] == said.splitlines()[-1]  # no second MLflow run
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'out' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "household-tiny"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`aem.report` = 'quick'")
    assert {"index.html", "report.md", "tables"} == {file.path for file in client.list_artifacts(run.info.run_id)}
    assert run.info.run_id in said and run.info.run_id in experiment.tags["mlflow.note.content"]
    ask("aem_exp.report", "quick.yaml", f"outputs={tmp_path / 'none'}", "--from", str(tmp_path))
    one, other = (out / "reports" / "quick" / "tables" for out in (folder / "out", tmp_path / "none"))
    tables = [table.name for table in one.iterdir() if table.name != "runs.csv" and table.name != "design.csv"]
    assert len(tables) > 5 and all((one / name).read_text() == (other / name).read_text() for name in tables)


@pytest.mark.slow
def test_sweep_continues_from_archives_of_another_machine(desk, first_execution, tmp_path):
    """A cell whose finished run is archived counts as done, where no run directory of it exists."""
    _, ask = desk
    ask("aem_exp.report", "quick.yaml", "--archive", str(tmp_path))
    elsewhere = f"outputs={tmp_path / 'none'}"
    rows = json.loads(ask("aem_exp.sweep", "quick.yaml", elsewhere, "--from", str(tmp_path), "--json"))["cells"]
    assert [row["state"] for row in rows] == ["done", "done"] and not any(row["to_run"] for row in rows)
    (broken,) = (file for file in tmp_path.glob("*.json.gz") if "-aem-" in file.name)
    broken.unlink()
    rows = json.loads(ask("aem_exp.sweep", "quick.yaml", elsewhere, "--from", str(tmp_path), "--json"))["cells"]
    assert [row["to_run"] for row in rows] == ["-aem-" in row["run"] for row in rows]


@pytest.mark.slow
def test_run_may_belong_to_two_sweeps(desk, first_execution):
    """The second sweep reuses the run, and MLflow shows it in both sweeps."""
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_interrupted_sweep_stops_its_cells(desk, number):
    """SIGTERM or Ctrl-C makes the cells save and end, and the command waits for them."""
    folder, ask = desk
    command = [sys.executable, "-m", "aem_exp.sweep", "quick.yaml", "--local", "seed=7", "trainer.steps=50"]
    env = {**os.environ, "AEM_OUTPUTS": str(folder / number.name), "AEM_CACHE": ask.cache}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(folder.glob(f"{number.name}/*/before.json")), "a running cell")
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert "stopping: 1 " in out and "press it again to leave at once" in out
    assert "python -m aem_exp.sweep quick.yaml --local" in err
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


@pytest.mark.slow
def test_repeated_ctrl_c_kills_a_cell_that_does_not_end():
    """The first signal requests a save, the second an immediate end; then the cell is killed."""
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
    ("main", "words", "fact"),
    [
        (sweep.main, ["nowhere"], "sweep=nowhere: choose from"),
        (sweep.main, ["household_quick", "--submit", "--local"], "--submit=true: "),
        (sweep.main, ["household_quick", "--submit"], "launch=slurm_cpu"),
        (sweep.main, ["household_quick", "trainer.stps=1"], "did you mean"),
        (sweep.main, ["household_quick", "--from", "/nowhere"], "--from=/nowhere: "),
        (status.main, ["nosuch"], "sweep=nosuch: "),
        (status.main, ["--outputs", "/nowhere"], "/nowhere: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_refused(capsys, monkeypatch, tmp_path, main, words, fact):
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert fact in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*/experiment.json"))


def test_states_of_killed_and_damaged_runs(tmp_path):
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
