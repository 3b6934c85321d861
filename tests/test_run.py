"""One experiment from the command line to a result: killed, resumed, asked again, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from aem_exp import checkpoints

SMALL = [
    "model.make.steps=25",
    "model.make.habit_steps=5",
    "model.make.episodes=128",
    "trainer.steps=6",
    "trainer.tasks_per_step=3",
    "trainer.group_size=4",
    "trainer.mini_batch=6",
    "evaluation.tasks=8",
    "evaluation.every=3",
    "launch.save_every=2",
]
NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def door(cache, outputs, *words, wait=True):
    """`python -m aem_exp` in a process of its own."""
    env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(outputs), "COLUMNS": "120"}
    command = [sys.executable, "-m", "aem_exp", *words]
    started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return started
    out, err = started.communicate(timeout=300)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def folder_of(outputs) -> Path:
    (folder,) = [path.parent for path in Path(outputs).glob("*/experiment.json")]
    return folder


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


@pytest.fixture(scope="module")
def unbroken(cache, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("unbroken")
    done = door(cache, outputs, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder_of(outputs), done


def wait_for(started, folder_found, reached, timeout=180):
    """Wait until a live run has reached something."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        assert started.poll() is None, started.stderr.read()
        if folder_found() and reached():
            return
        time.sleep(0.02)
    raise AssertionError("the run never got there")


def test_the_run_dir_holds_the_truth(unbroken):
    folder, done = unbroken
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6
    assert result["updates"] == 12
    assert [row["step"] for row in metrics(folder) if "train/success" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics(folder) if "eval/success" in row] == [0, 3, 6]
    episodes = pd.read_parquet(folder / "episodes.parquet")
    assert (episodes.split == "train").sum() == 6 * 3 * 4
    assert set(episodes.split) == {"train", "dev[:8]", "test[:8]"}
    said = episodes[(episodes.split == "train") & (episodes.draw == 0)].responses
    assert all(r["alpha"] > 0 for responses in said for r in responses)
    assert json.loads((folder / "experiment.json").read_text())["trainer"]["steps"] == 6
    assert str(folder) in done.stdout
    assert "Traceback" not in done.stderr


def test_the_model_is_an_ordinary_hugging_face_folder(unbroken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = unbroken
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)


def test_asked_again_it_does_nothing(unbroken, cache):
    folder, _ = unbroken
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.suffix in (".json", ".jsonl", ".parquet")
    }
    again = door(cache, folder.parent, *SMALL)
    assert again.returncode == 0
    assert "finished" in again.stdout
    owner = folder / "owner.json"
    assert {p: t for p, t in before.items() if p != owner} == {p: p.stat().st_mtime_ns for p in before if p != owner}


def test_killed_at_any_moment_it_ends_the_same(unbroken, cache, tmp_path):
    """kill -9 before the first checkpoint, then after one, then run to the end: weights, metrics and samples are equal."""
    reference, _ = unbroken

    def kill_when(reached):
        started = door(cache, tmp_path, *SMALL, wait=False)
        wait_for(started, lambda: list(tmp_path.glob("*/experiment.json")), reached)
        started.send_signal(signal.SIGKILL)
        started.wait()

    def steps():
        file = folder_of(tmp_path) / "metrics.jsonl"
        return file.read_text().count("train/success") if file.exists() else 0

    kill_when(lambda: steps() >= 1)
    kill_when(lambda: steps() >= 3 and checkpoints.newest(folder_of(tmp_path)) is not None)
    broken = sorted(folder_of(tmp_path).glob("checkpoint-*"))
    (broken[-1] / "step.json").rename(broken[-1] / "step.json.part")  # as if the save itself had been killed
    done = door(cache, tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    assert metrics(folder) == metrics(reference)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (reference / weights).read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "episodes.parquet"), pd.read_parquet(reference / "episodes.parquet")
    )
    results = [json.loads((f / "result.json").read_text()) for f in (folder, reference)]
    assert results[0] == results[1]
    history = tracked(folder)
    assert history == tracked(reference)
    assert all(len(steps) == len(set(steps)) for steps in history.values())


def test_stopped_before_the_result_it_ends_the_same(unbroken, cache, tmp_path, monkeypatch):
    """Trained, scored and joined, but not yet a result: asked again, nothing is lost and nothing counted as zero."""
    from aem_exp import config, run, show

    monkeypatch.setenv("AEM_CACHE", str(cache))
    experiment = config.load([*SMALL, f"outputs={tmp_path}", "tracking=off"])
    with monkeypatch.context() as broken:
        broken.setattr(show, "artifacts", lambda _: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            run.run(experiment)
    folder = run.run(experiment)
    assert not (folder / "episodes").exists()
    ours, theirs = (pd.read_parquet(f / "episodes.parquet") for f in (folder, unbroken[0]))
    pd.testing.assert_frame_equal(ours, theirs)
    assert json.loads((folder / "result.json").read_text()) == json.loads((unbroken[0] / "result.json").read_text())


def test_continued_it_is_the_longer_run(unbroken, cache, tmp_path):
    """6 steps, then `from=` to 10, killed on the way: the weights, rows and samples of 10 steps at once. The parent stays."""
    parent, _ = unbroken
    checkpoint = checkpoints.newest(parent)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    words = [f"from={parent}", "trainer.steps=10"]
    outputs = tmp_path / "continued"
    first = door(cache, outputs, *words, wait=False)
    wait_for(first, lambda: list(outputs.glob("*/before.json")), lambda: (folder_of(outputs) / "before.json").exists())
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = door(cache, outputs, *words)
    assert done.returncode == 0, done.stderr
    straight = door(cache, tmp_path / "straight", *SMALL, "trainer.steps=10")
    assert straight.returncode == 0, straight.stderr
    child, whole = folder_of(outputs), folder_of(tmp_path / "straight")
    assert child.name != whole.name  # the one knows its parent
    weights = "model/model.safetensors"
    assert (child / weights).read_bytes() == (whole / weights).read_bytes()
    assert [row["step"] for row in metrics(child)] == [6, 7, 8, 9, 10]
    straight_rows = {row["step"]: row for row in metrics(whole)}
    assert [row for row in metrics(child) if row["step"] > 6] == [straight_rows[step] for step in (7, 8, 9, 10)]
    result = json.loads((child / "result.json").read_text())
    assert result["before"] == json.loads((parent / "result.json").read_text())["after"]
    assert {path: path.read_bytes() for path in before} == before


def test_continued_with_other_settings_they_count(unbroken, cache, tmp_path):
    """A learning rate that the checkpoint's optimizer and scheduler remember otherwise; another modulation."""
    words = [f"from={unbroken[0]}", "trainer.steps=7", "trainer.learning_rate=1e-6", "modulation=none"]
    done = door(cache, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in metrics(folder_of(tmp_path)) if "train/loss" in row]
    assert row["train/learning_rate"] == 1e-6
    assert not any(key.startswith("aem/") for key in row)
    assert "-none-" in folder_of(tmp_path).name


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

    with pytest.raises(ConfigError, match="must be the folder of a run"):
        load([f"from={tmp_path}"])
    copy = tmp_path / unbroken[0].name
    copy.mkdir()
    text = (unbroken[0] / "experiment.json").read_text()
    (copy / "experiment.json").write_text(text)
    assert read(copy).trainer["steps"] == 6
    with pytest.raises(ConfigError, match="is not finished"):
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
    assert read(copy, trust=True).trainer["steps"] == 6


def test_the_run_dir_is_the_job(unbroken, cache, tmp_path):
    """Elsewhere, from nothing but a run dir and the code frozen in it, `python -m aem_exp.run` makes the same result."""
    source, _ = unbroken
    folder = tmp_path / source.name
    folder.mkdir()
    for part in ("experiment.json", "code"):
        subprocess.run(["cp", "-r", str(source / part), str(folder)], check=True)
    env = {**os.environ, "AEM_CACHE": str(cache), "PYTHONPATH": str(folder / "code"), "MLFLOW_TRACKING_URI": "off"}
    command = [sys.executable, "-m", "aem_exp.run", str(folder)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads((f / "result.json").read_text()) for f in (folder, source)]
    assert results[0] == results[1]
    assert "success on tasks never trained on" in done.stdout
    assert json.loads((source / "provenance.json").read_text())["packages"]["torch"]


def test_a_run_goes_on_with_other_code_only_when_told(cache, tmp_path):
    """Killed, then asked again with an edited estimator: refused by name; `resume=inexact` goes on and leaves a mark."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def centred(played):\n    from aem_exp.advantages import group_centred\n    return group_centred(played)\n"
    )
    words = [*SMALL, "tracking=off", "+baseline.advantage={_target_: mine.centred}"]
    env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(tmp_path / "out")}

    def ask(*more, until=None):
        command = [sys.executable, "-m", "aem_exp", *words, *more]
        started = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if until:
            wait_for(started, lambda: True, until)
            started.send_signal(signal.SIGKILL)
        return started, *started.communicate(timeout=200)

    ask(until=lambda: list((tmp_path / "out").glob("*/checkpoint-*/step.json")))
    mine.write_text(mine.read_text() + "# edited\n")
    refused, _, err = ask()
    assert refused.returncode == 2
    assert "mine.py was edited" in err
    assert "resume=inexact" in err
    assert len(err.strip().splitlines()) == 1
    done, _, err = ask("resume=inexact")
    assert done.returncode == 0, err
    folder = folder_of(tmp_path / "out")
    assert json.loads((folder / "result.json").read_text())["resumed"] == ["mine.py was edited"]
    assert (folder / "code" / "mine.py").read_text().endswith("# edited\n")
    (older,) = folder.glob("code-to-step-*")
    assert not (older / "mine.py").read_text().endswith("# edited\n")


def test_worker_processes_change_nothing(unbroken, cache, tmp_path):
    """Environments in two processes, episodes and tokens in small portions: the same words, the same account."""
    words = ["launch.workers=2", "launch.device_episodes=5", "tracking=off"]
    done = door(cache, tmp_path, *SMALL, *words)
    assert done.returncode == 0, done.stderr
    ours, theirs = (pd.read_parquet(f / "episodes.parquet") for f in (folder_of(tmp_path), unbroken[0]))
    first = [frame[frame.step == 0][["task", "won", "turns", "tokens", "ended"]] for frame in (ours, theirs)]
    pd.testing.assert_frame_equal(*first)
    assert folder_of(tmp_path).name == unbroken[0].name


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
        at_work = "aem_exp.workers" in sys.orig_argv  # the warm start plays in this process
        self.task_id = int(task.id.rsplit("-", 1)[-1]) if at_work else 0
        return super().reset(task)

class World(Household):
    def env(self):
        return Moody()
"""


def test_environments_that_hang_or_die_leave_the_loss_and_the_run_goes_on(cache, tmp_path, monkeypatch):
    from aem_exp import config, run

    (tmp_path / "moody.py").write_text(HANGS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AEM_CACHE", str(cache))
    words = ["env.make._target_=moody.World", "launch.workers=4", "launch.env_seconds=1", "trainer.steps=2"]
    folder = run.run(config.load([*SMALL, *words, f"outputs={tmp_path}", "tracking=off", "evaluation.tasks=5"]))
    episodes = pd.read_parquet(folder / "episodes.parquet")
    errors = " ".join(episodes[episodes.ended == "crashed"].error)
    assert "hung: no answer within 1 s" in errors
    assert "its process died (exit code 7)" in errors
    assert json.loads((folder / "result.json").read_text())["after"]["crashed"] > 0
    for row in metrics(folder):
        if "train/loss" in row:
            parts = ("trained", "filtered", "crashed")
            assert row["train/tokens_generated"] == sum(row[f"train/tokens_{part}"] for part in parts)


MISTAKES = """
import torch
from aem_exp.envs.household import Household

def nothing(played): return played.return_M
def nan(played): return torch.full(played.trajectory_R.shape, torch.nan)
def huge(played): return torch.full(played.trajectory_R.shape, 3e38)

class Broken(Household):
    def env(self):
        env = super().env()
        env.step = None
        return env
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
    from aem_exp import config, run
    from aem_exp.values import Stop

    (tmp_path / "mistakes.py").write_text(MISTAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AEM_CACHE", str(cache))
    experiment = config.load([*SMALL, f"outputs={tmp_path}", "tracking=off", word])
    with pytest.raises(Stop) as stopped:
        run.run(experiment)
    assert said in str(stopped.value)
    assert not (config.run_dir(experiment) / "result.json").exists()
    assert run.at_terminal(experiment, config.run_dir(experiment)) == 1


def test_asked_after_the_end_it_says_what_changed_since(unbroken, cache, tmp_path):
    source, _ = unbroken
    copy = tmp_path / source.name
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    file = copy / "code" / "aem_exp" / "advantages.py"
    file.write_text(file.read_text() + "# as it was\n")
    env = {**os.environ, "AEM_CACHE": str(cache)}
    command = [sys.executable, "-m", "aem_exp.run", str(copy)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "since this run, aem_exp/advantages.py was edited" in done.stdout


def tracked(folder):
    """Steps of each metric in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(json.loads((folder / "tracking.json").read_text())["uri"])
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    names = [name for name in run.data.metrics if not name.startswith(("time/", "memory/"))]
    return {name: [m.step for m in client.get_metric_history(run.info.run_id, name)] for name in names}


def test_ctrl_c_leaves_a_run_that_resumes(cache, tmp_path):
    started = door(cache, tmp_path, *SMALL, "trainer.steps=300", wait=False)
    wait_for(
        started,
        lambda: list(tmp_path.glob("*/metrics.jsonl")),
        lambda: "train/success" in (folder_of(tmp_path) / "metrics.jsonl").read_text(),
    )
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert re.search(rf"to go on from step \d+: {sys.executable} -m aem_exp.run {folder_of(tmp_path)}", err)
    assert "Traceback" not in out + err


def test_two_at_once_share_nothing(cache, tmp_path):
    first = door(cache, tmp_path, *SMALL, "trainer.steps=50", wait=False)
    wait_for(first, lambda: list(tmp_path.glob("*/experiment.json")), lambda: True)
    second = door(cache, tmp_path, *SMALL, "trainer.steps=50")
    first.kill()
    first.communicate()
    assert second.returncode == 0
    assert f"process {first.pid}" in second.stdout


def test_a_model_of_another_family_with_lora_by_path(cache, tmp_path, unbroken):
    """Qwen2 weights saved locally, loaded by path under an adapter: the way every published model takes."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(unbroken[0] / "model")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen2")
    words = ["model=qwen2_5_1_5b", f"model.path={tmp_path / 'qwen2'}", "model.dtype=float32", "env=household"]
    lora = ["model.lora={r: 4, target_modules: [q_proj, v_proj]}", "trainer.beta=0.01", "trainer.steps=2"]
    done = door(cache, tmp_path / "out", *(word for word in SMALL if not word.startswith("model.make")), *words, *lora)
    assert done.returncode == 0, done.stderr
    model = folder_of(tmp_path / "out") / "model"
    assert (model / "adapter" / "adapter_model.safetensors").exists()
    assert (model / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=qwen2_5_1_5b"], ["model.path=Qwen/Qwen2.5-1.5B-Instruct", "hf download"]),
        (["+experiment=alfworld_1_5b", "launch=local"], ["alfworld"]),
        (["model=qwen2_5_1_5b", "model.path=/nowhere"], ["model.path=/nowhere", "config.json"]),
        (["tracking=http://127.0.0.1:9"], ["http://127.0.0.1:9"]),
        (["outputs=/proc/nowhere"], ["outputs", "/proc/nowhere"]),
        (["evaluation.tasks=100000"], ["evaluation.tasks=100000"]),
        pytest.param(["launch=gpu1"], ["launch.gpus_per_node=1", "no GPU"], marks=NO_GPU),
        (["trainer.tasks_per_step=100000"], ["trainer.tasks_per_step=100000"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(cache, tmp_path, words, said):
    words = [*SMALL, *words] if words[0].split("=")[0] not in ("model", "+experiment") else words
    env = {**os.environ, "AEM_CACHE": str(cache)}
    command = [sys.executable, "-m", "aem_exp", *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(text in done.stderr for text in said), done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 120 MB, mounted for one test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_before_any_work(cache, small_disk):
    (small_disk / "ballast").write_bytes(b"x" * 110_000_000)
    done = door(cache, small_disk, *SMALL)
    assert done.returncode == 2, done.stderr
    assert "0.0 GB free" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_disk_that_fills_up_costs_nothing(cache, small_disk, unbroken):
    """The run stops with a sentence; with room again, it ends like the one that never stopped."""
    started = door(cache, small_disk, *SMALL, wait=False)
    wait_for(started, lambda: True, lambda: list(small_disk.glob("*/checkpoint-*/step.json")))
    (small_disk / "ballast").write_bytes(b"x" * 90_000_000)
    _, err = started.communicate(timeout=120)
    assert started.returncode == 1, err
    assert err.strip().startswith("aem_exp: the disk is full")
    assert "Traceback" not in err
    (small_disk / "ballast").unlink()
    done = door(cache, small_disk, *SMALL)
    assert done.returncode == 0, done.stderr
    assert metrics(folder_of(small_disk)) == metrics(unbroken[0])
