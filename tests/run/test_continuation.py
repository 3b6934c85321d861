"""Beyond one run: continued with `from=`, run again by hand, with other code, with workers; and what stops it for good."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from support.runs import SMALL_RUN, find_run_dir, read_metrics, run_command, run_here, wait_for_run

from aem_exp import METHOD
from aem_exp.rundir import checkpoints

pytestmark = pytest.mark.usefixtures("no_mlflow")


def test_continued_it_is_the_longer_run(unbroken, cache, tmp_path):
    """6 steps, then `from=` to 10, killed on the way: the weights, rows and samples of 10 steps at once. The parent stays."""
    parent, _ = unbroken
    checkpoint = checkpoints.find_newest(parent)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    words = [f"from={parent}", "trainer.steps=10"]
    outputs = tmp_path / "continued"
    first = run_command(cache, outputs, *words, wait=False)
    wait_for_run(
        first, lambda: list(outputs.glob("*/before.json")), lambda: (find_run_dir(outputs) / "before.json").exists()
    )
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = run_command(cache, outputs, *words)
    assert done.returncode == 0, done.stderr
    child, whole = find_run_dir(outputs), run_here(cache, tmp_path / "straight", *SMALL_RUN, "trainer.steps=10")
    assert child.name != whole.name  # the one knows its parent
    weights = "model/model.safetensors"
    assert (child / weights).read_bytes() == (whole / weights).read_bytes()
    assert [row["step"] for row in read_metrics(child)] == [6, 7, 8, 9, 10]
    straight_rows = {row["step"]: row for row in read_metrics(whole)}
    assert [row for row in read_metrics(child) if row["step"] > 6] == [straight_rows[step] for step in (7, 8, 9, 10)]
    result = json.loads((child / "result.json").read_text())
    assert result["before"] == json.loads((parent / "result.json").read_text())["after"]
    assert {path: path.read_bytes() for path in before} == before


@pytest.fixture(scope="module")
def stopped(cache, tmp_path_factory, unbroken):
    """The unbroken run once more, stopped after 4 of its 6 steps."""
    from aem_exp import config
    from aem_exp.cluster.signals import Pruned
    from aem_exp.run import execution

    outputs = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(cache))
        patch.setenv("MLFLOW_TRACKING_URI", "off")
        with pytest.raises(Pruned):
            execution.run(config.load([*SMALL_RUN, f"outputs={outputs}"]), lambda step, steps, row: step == 4)
    return find_run_dir(outputs)


def test_from_a_run_that_was_stopped_it_begins_there(unbroken, stopped, cache, tmp_path):
    """With the same settings it ends as the run would have; the parent can still be resumed by itself."""
    marks = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    plan = run_command(cache, tmp_path, f"from={stopped}", "modulation=none", "plan=true")
    assert f"from    {stopped.name}, at step 4" in plan.stdout, plan.stdout + plan.stderr
    folder = run_here(cache, tmp_path, f"from={stopped}")
    assert read_metrics(folder)[-1] == read_metrics(unbroken[0])[-1]
    assert [row["step"] for row in read_metrics(folder)] == [4, 5, 6]
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (unbroken[0] / weights).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in marks} == marks


def test_a_branch_is_named_by_where_it_begins(unbroken, stopped, tmp_path):
    """Steps of an unfinished parent are hashed; those of a finished one are not, so that old signatures stand."""
    from aem_exp.config import load, signature

    parent = stopped.name.rpartition("-")[2]
    branch = load([f"from={stopped}", "modulation=none"])
    assert (branch.parent, branch.parent_steps) == (f"{parent}@4", 4)
    earlier = tmp_path / stopped.name
    subprocess.run(["cp", "-r", str(stopped), str(earlier)], check=True)
    newest = checkpoints.find_newest(earlier)
    steps = {checkpoints.steps(path): path for path in earlier.glob("checkpoint-*")}
    assert checkpoints.steps(newest) == 4 and 2 in steps
    subprocess.run(["rm", "-r", str(newest)], check=True)
    other = load([f"from={earlier}", "modulation=none"])
    assert (other.parent, other.parent_steps) == (f"{parent}@2", 2)
    end = load([f"from={unbroken[0]}", "trainer.steps=9", "modulation=none"])
    assert (end.parent, end.parent_steps) == (parent, 6)
    assert len({signature(replace(e, trainer=end.trainer)) for e in (branch, other, end)}) == 3


def test_a_run_at_work_is_branched_when_it_has_stopped(stopped):
    from aem_exp.config import ConfigError, load
    from aem_exp.rundir.lock import hold_run_lock

    with (
        hold_run_lock(stopped),
        pytest.raises(ConfigError, match=rf"step 4; .*process {os.getpid()}"),
    ):
        load([f"from={stopped}", "modulation=none"])


def test_a_parent_that_went_on_meanwhile_is_told(stopped, cache, tmp_path, monkeypatch):
    """Between a plan and its job the checkpoint may have been replaced by a later one."""
    from aem_exp.config import ConfigError, load
    from aem_exp.run import execution

    monkeypatch.setenv("AEM_CACHE", str(cache))
    branch = load([f"from={stopped}", "modulation=none", f"outputs={tmp_path}"])
    with pytest.raises(ConfigError, match=r"step 4 .* step 1;"):
        execution.run(replace(branch, parent_steps=1))
    with pytest.raises(ConfigError, match="has no checkpoint of step 5"):
        execution.run(replace(branch, parent_steps=5))


def test_continued_with_other_settings_they_count(unbroken, cache, tmp_path):
    """A learning rate that the checkpoint's optimizer and scheduler remember otherwise; another modulation."""
    words = [f"from={unbroken[0]}", "trainer.steps=7", "trainer.learning_rate=1e-6", "modulation=none"]
    folder = run_here(cache, tmp_path, *words)
    (row,) = [row for row in read_metrics(folder) if "train/loss" in row]
    assert row["train/learning_rate"] == 1e-6
    assert not any(key.startswith("aem/") for key in row)
    assert "-none-" in folder.name


def test_continued_its_schedules_are_its_own(unbroken, cache, tmp_path):
    """Lambda and the learning rate span the steps that the run adds; also where it is interrupted."""
    steps = 40
    words = [f"from={unbroken[0]}", f"trainer.steps={6 + steps}", "modulation=linear", "launch.save_every=1"]
    words += ["trainer.lr_scheduler_type=linear", "trainer.learning_rate=1e-4"]
    plan = run_command(cache, tmp_path, *words, "plan=true")
    anew = "modulation.lam=aem_exp.schedules.Linear and trainer.lr_scheduler_type=linear: "
    assert anew in plan.stdout and "steps 7 to 46" in plan.stdout
    first = run_command(cache, tmp_path, *words, wait=False)
    wait_for_run(first, lambda: True, lambda: any(mark["step"] > 7 for mark in saved(tmp_path)))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = run_command(cache, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(find_run_dir(tmp_path)) if "train/loss" in row]
    assert [row["aem/lam"] for row in rows] == pytest.approx([1 - i / (steps - 1) for i in range(steps)])
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-4 * (1 - i / steps) for i in range(steps)])


def saved(outputs):
    """What the complete checkpoints of a live run say; older ones are removed meanwhile."""
    for mark in outputs.glob("*/checkpoint-*/step.json"):
        with contextlib.suppress(FileNotFoundError):
            yield json.loads(mark.read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.steps=6"], ["trainer.steps=6", "above 6"]),
        (["trainer.steps=9", "trainer.weight_decay=0.1"], ["trainer.weight_decay=0.1", "must stay 0"]),
        (["trainer.steps=9", "model.dtype=bfloat16"], ["model.dtype=bfloat16", "must stay float32"]),
        (["trainer.steps=9", "baseline=rloo"], ["baseline=rloo", "modulation and launch"]),
        (["parent=abc"], ["parent=abc", "from=RUN_DIR"]),
    ],
)
def test_what_a_continued_run_could_not_honour_is_refused(unbroken, words, said):
    from aem_exp.config import ConfigError, load

    with pytest.raises(ConfigError) as refused:
        load([f"from={unbroken[0]}", *words])
    assert all(text in str(refused.value) for text in said), refused.value


def test_a_run_dir_that_is_none_or_was_edited_is_refused(unbroken, tmp_path):
    from aem_exp.config import ConfigError, load, read

    with pytest.raises(ConfigError, match=r"experiment\.json"):
        load([f"from={tmp_path}"])
    copy = tmp_path / unbroken[0].name
    copy.mkdir()
    text = (unbroken[0] / "experiment.json").read_text()
    (copy / "experiment.json").write_text(text)
    assert read(copy).trainer.steps == 6
    with pytest.raises(ConfigError, match=f"no checkpoint.*: python -m aem_exp.run {copy}"):
        load([f"from={copy}", "trainer.steps=9"])
    (copy / "experiment.json").write_text(text.replace('"steps": 6', '"steps": 7'))
    with pytest.raises(ConfigError, match="it was edited"):
        read(copy)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_somebody_elses_config_runs_only_when_trusted(unbroken, tmp_path):
    from aem_exp.config import ConfigError, read

    copy = tmp_path / unbroken[0].name
    copy.mkdir()
    (copy / "experiment.json").write_text((unbroken[0] / "experiment.json").read_text())
    os.chown(copy / "experiment.json", 12345, 12345)
    with pytest.raises(ConfigError, match="--trust"):
        read(copy)
    assert read(copy, trust=True).trainer.steps == 6


def test_the_run_dir_is_the_job(unbroken, cache, tmp_path):
    """Elsewhere, from nothing but a run dir and the code frozen in it, `python -m aem_exp.run` makes the same result."""
    source, _ = unbroken
    folder = tmp_path / source.name
    folder.mkdir()
    for part in ("experiment.json", "code"):
        subprocess.run(["cp", "-r", str(source / part), str(folder)], check=True)
    env = {**os.environ, "AEM_CACHE": str(cache), "PYTHONPATH": str(folder / "code"), "MLFLOW_TRACKING_URI": "off"}
    command = [sys.executable, "-m", "aem_exp.run", str(folder)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads((f / "result.json").read_text()) for f in (folder, source)]
    assert results[0] == results[1]
    assert "success on tasks never trained on" in done.stdout
    provenance = json.loads((source / "provenance.json").read_text())
    assert provenance["packages"]["torch"] and provenance["method"] == METHOD


def test_a_run_goes_on_with_other_code_only_when_told(cache, tmp_path):
    """Killed, then asked again with an edited estimator: refused by name; `resume=inexact` goes on and leaves a mark."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def centred(played):\n    from aem_exp.advantages import group_centred\n    return group_centred(played)\n"
    )
    words = [*SMALL_RUN, "tracking=off", "+baseline.advantage={_target_: mine.centred}"]
    env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(tmp_path / "out")}

    def ask(*more, until=None):
        command = [sys.executable, "-m", "aem_exp", *words, *more]
        started = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if until:
            wait_for_run(started, lambda: True, until)
            started.send_signal(signal.SIGKILL)
        return started, *started.communicate(timeout=600)

    ask(until=lambda: list((tmp_path / "out").glob("*/checkpoint-*/step.json")))
    mine.write_text(mine.read_text() + "# edited\n")
    refused, _, err = ask()
    assert refused.returncode == 2
    assert "mine.py was edited" in err
    assert "resume=inexact" in err
    assert len(err.strip().splitlines()) == 1
    done, _, err = ask("resume=inexact")
    assert done.returncode == 0, err
    folder = find_run_dir(tmp_path / "out")
    assert json.loads((folder / "result.json").read_text())["resumed"] == ["mine.py was edited"]
    assert (folder / "code" / "mine.py").read_text().endswith("# edited\n")
    (older,) = folder.glob("code-to-step-*")
    assert not (older / "mine.py").read_text().endswith("# edited\n")


def test_worker_processes_change_nothing(unbroken, cache, tmp_path):
    """Environments in two processes, episodes and tokens in small portions: the same words, the same account."""
    words = ["launch.workers=2", "launch.device_episodes=5", "tracking=off"]
    folder = run_here(cache, tmp_path, *SMALL_RUN, *words)
    ours, theirs = (pd.read_parquet(f / "episodes.parquet") for f in (folder, unbroken[0]))
    first = [frame[frame.step == 0][["task", "won", "turns", "tokens", "ended"]] for frame in (ours, theirs)]
    pd.testing.assert_frame_equal(*first)
    assert folder.name == unbroken[0].name


HANGS = """
import os, sys, time
from aem_exp.envs.household import Household, HouseholdEnv

class Moody(HouseholdEnv):
    def step(self, response):
        if self.task_id % 5 == 1:
            time.sleep(60)
        if self.task_id % 5 == 2:
            os._exit(7)
        return super().step(response)

    def reset(self, task):
        at_work = "aem_exp.envs.worker_process" in sys.orig_argv  # the warm start plays in this process
        self.task_id = int(task.id.rsplit("-", 1)[-1]) if at_work else 0
        return super().reset(task)

class World(Household):
    def env(self):
        return Moody()
"""


def test_environments_that_hang_or_die_leave_the_loss_and_the_run_goes_on(cache, tmp_path, monkeypatch):
    from aem_exp import config
    from aem_exp.run import execution

    (tmp_path / "moody.py").write_text(HANGS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AEM_CACHE", str(cache))
    words = ["env.make._target_=moody.World", "launch.workers=4", "launch.env_seconds=1", "trainer.steps=2"]
    folder = execution.run(
        config.load([*SMALL_RUN, *words, f"outputs={tmp_path}", "tracking=off", "evaluation.tasks=5"])
    )
    episodes = pd.read_parquet(folder / "episodes.parquet")
    errors = " ".join(episodes[episodes.ended == "crashed"].error)
    assert "hung: no answer within 1 s" in errors
    assert "its process died (exit code 7)" in errors
    assert json.loads((folder / "result.json").read_text())["after"]["crashed"] > 0
    for row in read_metrics(folder):
        if "train/loss" in row:
            parts = ("trained", "filtered", "crashed")
            assert row["train/tokens_generated"] == sum(row[f"train/tokens_{part}"] for part in parts)


MISTAKES = """
import torch
from aem_exp.envs.household import Household, HouseholdEnv

def late(wrong):
    "What is wrong only in play, where some turns are invalid: what is wrong at once is refused before (test_smoke.py)."
    return lambda played: wrong(played) if played.penalty_R.any() else played.score_R

nothing = late(lambda played: played.return_M)
nan = late(lambda played: torch.full(played.trajectory_R.shape, torch.nan))
huge = late(lambda played: torch.full(played.trajectory_R.shape, 3e38))
nothing.__name__ = "nothing"

class Env(HouseholdEnv):
    def reset(self, task):
        self.step = None if task.id.startswith("dev") else super().step
        return super().reset(task)

class Broken(Household):
    def env(self):
        return Env()
"""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("baseline.advantage={_target_: mistakes.nothing}", "mistakes.nothing returned advantages of shape"),
        ("baseline.advantage={_target_: mistakes.nan}", "advantages that are not finite"),
        ("baseline.advantage={_target_: mistakes.huge}", "the norm of the gradient is"),
        ("env.make._target_=mistakes.Broken", "8 of 8 episodes of the dev[:8] panel crashed; task "),
    ],
)
def test_a_run_that_cannot_go_on_stops_with_its_reason(cache, tmp_path, monkeypatch, word, said):
    """Not a finished run with numbers that mean nothing, and not a wall of traceback."""
    from aem_exp import config
    from aem_exp.core.errors import RunError
    from aem_exp.run import command as run
    from aem_exp.run import execution
    from aem_exp.rundir import archive

    (tmp_path / "mistakes.py").write_text(MISTAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AEM_CACHE", str(cache))
    experiment = config.load([*SMALL_RUN, f"outputs={tmp_path}", "tracking=off", word])
    with pytest.raises(RunError) as stopped:
        execution.run(experiment)
    assert said in str(stopped.value)
    folder = config.run_dir(experiment)
    assert not (folder / "result.json").exists()
    diverged = archive.from_run_dir(folder, "failed", ("nan", "..."))
    assert diverged.done == ("not finite" in said or "gradient" in said)
    assert not diverged.done or (diverged.result["diverged"] == str(stopped.value) and len(diverged.success) == 8)
    assert run.run_in_terminal(experiment, config.run_dir(experiment), []) == 1


def test_asked_after_the_end_it_says_what_changed_since(unbroken, cache, tmp_path):
    source, _ = unbroken
    copy = tmp_path / source.name
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    file = copy / "code" / "aem_exp" / "advantages.py"
    file.write_text(file.read_text() + "# as it was\n")
    env = {**os.environ, "AEM_CACHE": str(cache)}
    command = [sys.executable, "-m", "aem_exp.run", str(copy)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "since this run, aem_exp/advantages.py was edited" in done.stdout
