"""Runs beyond the first start: continued with `from=`, run again by hand, with changed code, with workers, and with errors."""

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


@pytest.mark.slow
def test_continued_run_equals_a_longer_run(unbroken, cache, tmp_path):
    """6 steps, then `from=` to 10 with a kill: the weights, rows and samples equal those of 10 steps. The parent is unchanged."""
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
    assert child.name != whole.name  # the name of the continued run depends on its parent
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
    """The same run as `unbroken`, stopped after 4 of its 6 steps."""
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


@pytest.mark.slow
def test_run_continues_from_a_stopped_run(unbroken, stopped, cache, tmp_path):
    """With the same settings it ends like the uninterrupted run. The parent is unchanged and can still be resumed."""
    times = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    plan = run_command(cache, tmp_path, f"from={stopped}", "modulation=none", "plan=true")
    (origin,) = [line for line in plan.stdout.splitlines() if line.startswith("from ")]
    assert stopped.name in origin and "step 4" in origin, plan.stdout + plan.stderr
    folder = run_here(cache, tmp_path, f"from={stopped}")
    assert read_metrics(folder)[-1] == read_metrics(unbroken[0])[-1]
    assert [row["step"] for row in read_metrics(folder)] == [4, 5, 6]
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (unbroken[0] / weights).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_branch_signature_contains_its_starting_step(unbroken, stopped, tmp_path):
    """The step is hashed only if the parent is unfinished, so that old signatures stay the same."""
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


def test_active_run_cannot_be_branched(stopped):
    from aem_exp.config import ConfigError, load
    from aem_exp.rundir.lock import hold_run_lock

    with hold_run_lock(stopped), pytest.raises(ConfigError) as error:
        load([f"from={stopped}", "modulation=none"])
    assert (error.value.field, error.value.value) == ("from", str(stopped))
    assert "step 4" in error.value.remedy and f"process {os.getpid()}" in error.value.remedy


@pytest.mark.slow
def test_starting_checkpoint_that_is_gone_is_an_error(stopped, cache, tmp_path, monkeypatch):
    """Between a plan and its job, the parent may go on and replace the checkpoint by a later one."""
    from aem_exp.config import ConfigError, load
    from aem_exp.run import execution

    monkeypatch.setenv("AEM_CACHE", str(cache))
    branch = load([f"from={stopped}", "modulation=none", f"outputs={tmp_path}"])
    for step, steps in [(1, ("step 1", "step 4")), (5, ("step 5",))]:
        with pytest.raises(ConfigError) as error:
            execution.run(replace(branch, parent_steps=step))
        assert error.value.field == "from"
        assert all(text in error.value.remedy for text in steps), error.value


@pytest.mark.slow
def test_continued_run_uses_its_own_settings(unbroken, cache, tmp_path):
    """Another modulation, and a learning rate that differs from the one in the checkpoint's optimizer and scheduler."""
    words = [f"from={unbroken[0]}", "trainer.steps=7", "trainer.learning_rate=1e-6", "modulation=none"]
    folder = run_here(cache, tmp_path, *words)
    (row,) = [row for row in read_metrics(folder) if "train/loss" in row]
    assert row["train/learning_rate"] == 1e-6
    assert not any(key.startswith("aem/") for key in row)
    assert "-none-" in folder.name


@pytest.mark.slow
def test_continued_run_has_its_own_schedules(unbroken, cache, tmp_path):
    """Lambda and the learning rate span the added steps, also if the run is interrupted."""
    steps = 40
    words = [f"from={unbroken[0]}", f"trainer.steps={6 + steps}", "modulation=linear", "launch.save_every=1"]
    words += ["trainer.lr_scheduler_type=linear", "trainer.learning_rate=1e-4"]
    plan = run_command(cache, tmp_path, *words, "plan=true")
    schedules = "modulation.lam=aem_exp.schedules.Linear and trainer.lr_scheduler_type=linear"
    (note,) = [line for line in plan.stdout.splitlines() if schedules in line]
    assert "steps 7 to 46" in note
    first = run_command(cache, tmp_path, *words, wait=False)
    wait_for_run(first, lambda: True, lambda: any(mark["step"] > 7 for mark in checkpoint_marks(tmp_path)))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = run_command(cache, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(find_run_dir(tmp_path)) if "train/loss" in row]
    assert [row["aem/lam"] for row in rows] == pytest.approx([1 - i / (steps - 1) for i in range(steps)])
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-4 * (1 - i / steps) for i in range(steps)])


def checkpoint_marks(outputs):
    """Yield step.json of each complete checkpoint of an active run, which may remove old ones at any moment."""
    for mark in outputs.glob("*/checkpoint-*/step.json"):
        with contextlib.suppress(FileNotFoundError):
            yield json.loads(mark.read_text())


@pytest.mark.parametrize(
    ("words", "field", "value", "facts"),
    [
        (["trainer.steps=6"], "trainer.steps", 6, ["6"]),
        (["trainer.steps=9", "trainer.weight_decay=0.1"], "trainer.weight_decay", 0.1, ["0"]),
        (["trainer.steps=9", "model.dtype=bfloat16"], "model.dtype", "bfloat16", ["float32"]),
        (["trainer.steps=9", "baseline=rloo"], "baseline", "rloo", ["modulation", "launch"]),
        (["parent=abc"], "parent", "abc", ["from=RUN_DIR"]),
    ],
)
def test_settings_that_a_continued_run_cannot_change(unbroken, words, field, value, facts):
    from aem_exp.config import ConfigError, load

    with pytest.raises(ConfigError) as error:
        load([f"from={unbroken[0]}", *words])
    assert (error.value.field, error.value.value) == (field, value)
    assert all(fact in error.value.remedy for fact in facts), error.value


def test_missing_or_edited_run_directory_is_an_error(unbroken, tmp_path):
    from aem_exp.config import ConfigError, load, read

    with pytest.raises(ConfigError) as error:
        load([f"from={tmp_path}"])
    assert (error.value.field, error.value.value) == ("RUN_DIR", str(tmp_path))
    copy = tmp_path / unbroken[0].name
    copy.mkdir()
    text = (unbroken[0] / "experiment.json").read_text()
    (copy / "experiment.json").write_text(text)
    assert read(copy).trainer.steps == 6
    with pytest.raises(ConfigError) as error:
        load([f"from={copy}", "trainer.steps=9"])
    assert error.value.field == "from" and f"python -m aem_exp.run {copy}" in error.value.remedy
    (copy / "experiment.json").write_text(text.replace('"steps": 6', '"steps": 7'))
    with pytest.raises(ConfigError) as error:
        read(copy)
    assert (error.value.field, error.value.value) == ("RUN_DIR", str(copy))
    assert "experiment.json" in error.value.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_config_of_another_user_needs_trust(unbroken, tmp_path):
    from aem_exp.config import ConfigError, read

    copy = tmp_path / unbroken[0].name
    copy.mkdir()
    (copy / "experiment.json").write_text((unbroken[0] / "experiment.json").read_text())
    os.chown(copy / "experiment.json", 12345, 12345)
    with pytest.raises(ConfigError, match="--trust"):
        read(copy)
    assert read(copy, trust=True).trainer.steps == 6


@pytest.mark.slow
def test_run_directory_is_enough_to_repeat_a_run(unbroken, cache, tmp_path):
    """From experiment.json and the frozen code alone, `python -m aem_exp.run` gives the same result in another folder."""
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
    assert "held-out panel" in done.stdout
    provenance = json.loads((source / "provenance.json").read_text())
    assert provenance["packages"]["torch"] and provenance["method"] == METHOD


@pytest.mark.slow
def test_run_with_edited_code_resumes_only_with_inexact(cache, tmp_path):
    """The estimator is edited after a kill: the error names it. `resume=inexact` resumes and records the change."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def centred(played):\n    from aem_exp.advantages import group_centred\n    return group_centred(played)\n"
    )
    words = [*SMALL_RUN, "tracking=off", "+baseline.advantage={_target_: mine.centred}"]
    env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(tmp_path / "out")}

    def start(*more, kill_when=None):
        command = [sys.executable, "-m", "aem_exp", *words, *more]
        started = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if kill_when:
            wait_for_run(started, lambda: True, kill_when)
            started.send_signal(signal.SIGKILL)
        return started, *started.communicate(timeout=600)

    start(kill_when=lambda: list((tmp_path / "out").glob("*/checkpoint-*/step.json")))
    mine.write_text(mine.read_text() + "# edited\n")
    refused, _, err = start()
    assert refused.returncode == 2
    assert "resume=exact" in err and "resume=inexact" in err
    assert "mine.py" in err
    assert len(err.strip().splitlines()) == 1
    done, _, err = start("resume=inexact")
    assert done.returncode == 0, err
    folder = find_run_dir(tmp_path / "out")
    assert json.loads((folder / "result.json").read_text())["resumed"] == ["mine.py was edited"]
    assert (folder / "code" / "mine.py").read_text().endswith("# edited\n")
    (older,) = folder.glob("code-to-step-*")
    assert not (older / "mine.py").read_text().endswith("# edited\n")


@pytest.mark.slow
def test_worker_processes_do_not_change_results(unbroken, cache, tmp_path):
    """Environments in two worker processes and small batches of episodes give the same episodes."""
    words = ["launch.workers=2", "launch.device_episodes=5", "tracking=off"]
    folder = run_here(cache, tmp_path, *SMALL_RUN, *words)
    ours, theirs = (pd.read_parquet(f / "episodes.parquet") for f in (folder, unbroken[0]))
    first = [frame[frame.step == 0][["task", "won", "turns", "tokens", "ended"]] for frame in (ours, theirs)]
    pd.testing.assert_frame_equal(*first)
    assert folder.name == unbroken[0].name


UNRELIABLE_ENV = """
import os, sys, time
from aem_exp.envs.household import Household, HouseholdEnv

class Unreliable(HouseholdEnv):
    def step(self, response):
        if self.task_id % 5 == 1:
            time.sleep(60)
        if self.task_id % 5 == 2:
            os._exit(7)
        return super().step(response)

    def reset(self, task):
        in_worker = "aem_exp.envs.worker_process" in sys.orig_argv  # not in the warm start, which plays in this process
        self.task_id = int(task.id.rsplit("-", 1)[-1]) if in_worker else 0
        return super().reset(task)

class World(Household):
    def env(self):
        return Unreliable()
"""


@pytest.mark.slow
def test_hung_or_dead_environments_are_left_out_of_the_loss(cache, tmp_path, monkeypatch):
    from aem_exp import config
    from aem_exp.run import execution

    (tmp_path / "unreliable.py").write_text(UNRELIABLE_ENV)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AEM_CACHE", str(cache))
    words = ["env.make._target_=unreliable.World", "launch.workers=4", "launch.env_seconds=1", "trainer.steps=2"]
    folder = execution.run(
        config.load([*SMALL_RUN, *words, f"outputs={tmp_path}", "tracking=off", "evaluation.tasks=5"])
    )
    episodes = pd.read_parquet(folder / "episodes.parquet")
    errors = " ".join(episodes[episodes.ended == "crashed"].error)
    assert "hung" in errors and " 1 s" in errors
    assert "died" in errors and "exit code 7" in errors
    assert json.loads((folder / "result.json").read_text())["after"]["crashed"] > 0
    for row in read_metrics(folder):
        if "train/loss" in row:
            parts = ("trained", "filtered", "crashed")
            assert row["train/tokens_generated"] == sum(row[f"train/tokens_{part}"] for part in parts)


MISTAKES = """
import torch
from aem_exp.envs.household import Household, HouseholdEnv

def fail_later(wrong):
    "Is wrong only with invalid turns, which a rollout has. The checks before a run find what is always wrong."
    return lambda played: wrong(played) if played.penalty_R.any() else played.score_R

wrong_shape = fail_later(lambda played: played.return_M)
nan = fail_later(lambda played: torch.full(played.trajectory_R.shape, torch.nan))
huge = fail_later(lambda played: torch.full(played.trajectory_R.shape, 3e38))
wrong_shape.__name__ = "wrong_shape"

class Env(HouseholdEnv):
    def reset(self, task):
        self.step = None if task.id.startswith("dev") else super().step
        return super().reset(task)

class Broken(Household):
    def env(self):
        return Env()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "kind", "facts"),
    [
        ("baseline.advantage={_target_: mistakes.wrong_shape}", "crash", ["mistakes.wrong_shape", "shape"]),
        ("baseline.advantage={_target_: mistakes.nan}", "nan", ["advantages", "finite"]),
        ("baseline.advantage={_target_: mistakes.huge}", "nan", ["norm", "gradient"]),
        ("env.make._target_=mistakes.Broken", "env", ["8 of 8 episodes", "dev[:8]", "crashed", "task "]),
    ],
)
def test_run_that_cannot_continue_stops_with_an_error(cache, tmp_path, monkeypatch, word, kind, facts):
    """It has no result, and prints no traceback. A run whose numbers are not finite is scored all the same."""
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
    assert stopped.value.kind == kind
    assert all(fact in str(stopped.value) for fact in facts)
    folder = config.run_dir(experiment)
    assert not (folder / "result.json").exists()
    diverged = archive.from_run_dir(folder, "failed", ("nan", "..."))
    assert diverged.done == (kind == "nan")
    assert not diverged.done or (diverged.result["diverged"] == str(stopped.value) and len(diverged.success) == 8)
    assert run.run_in_terminal(experiment, config.run_dir(experiment), []) == 1


@pytest.mark.slow
def test_finished_run_reports_changes_since_it_ran(unbroken, cache, tmp_path):
    source, _ = unbroken
    copy = tmp_path / source.name
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    file = copy / "code" / "aem_exp" / "advantages.py"
    file.write_text(file.read_text() + "# as it was\n")
    env = {**os.environ, "AEM_CACHE": str(cache)}
    command = [sys.executable, "-m", "aem_exp.run", str(copy)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("note") and "aem_exp/advantages.py" in line for line in done.stdout.splitlines())
