"""One experiment from the command line to a result: killed, resumed, started again, and refused."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from support.runs import (
    DEADLINE,
    SCORED_RUN,
    SMALL_RUN,
    find_run_dir,
    read_metrics,
    run_command,
    run_here,
    wait_for_run,
    wait_until,
)

from aem_exp.rundir import checkpoints

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")


def test_run_directory_is_complete(unbroken):
    folder, done = unbroken
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6
    assert result["updates"] == 12
    assert [row["step"] for row in read_metrics(folder) if "train/success" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_metrics(folder) if "eval/success" in row] == [0, 3, 6]
    episodes = pd.read_parquet(folder / "episodes.parquet")
    assert (episodes.split == "train").sum() == 6 * 3 * 4
    assert set(episodes.split) == {"train", "dev[:8]", "test[:8]"}
    responses_of_episodes = episodes[(episodes.split == "train") & (episodes.draw == 0)].responses
    assert all(r["alpha"] > 0 for responses in responses_of_episodes for r in responses)
    assert json.loads((folder / "experiment.json").read_text())["trainer"]["steps"] == 6
    assert str(folder) in done.stdout
    assert "Traceback" not in done.stderr


def test_model_folder_loads_with_transformers(unbroken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = unbroken
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_finished_run_is_left_unchanged(unbroken, cache):
    folder, _ = unbroken
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.suffix in (".json", ".jsonl", ".parquet")
    }
    again = run_command(cache, folder.parent, *SMALL_RUN)
    assert again.returncode == 0
    assert "finished" in again.stdout
    owner = folder / "owner.json"
    assert {p: t for p, t in before.items() if p != owner} == {p: p.stat().st_mtime_ns for p in before if p != owner}


@pytest.mark.slow
def test_killed_run_ends_with_equal_results(unbroken, cache, tmp_path):
    """SIGKILL before the first checkpoint and after it, then a run to the end: weights, metrics and samples are equal."""
    reference, _ = unbroken

    def kill_when(reached):
        started = run_command(cache, tmp_path, *SMALL_RUN, wait=False)
        wait_for_run(started, lambda: list(tmp_path.glob("*/experiment.json")), reached)
        started.send_signal(signal.SIGKILL)
        started.wait()

    def steps():
        file = find_run_dir(tmp_path) / "metrics.jsonl"
        return file.read_text().count("train/success") if file.exists() else 0

    kill_when(lambda: steps() >= 1)
    kill_when(lambda: steps() >= 3 and checkpoints.find_newest(find_run_dir(tmp_path)) is not None)
    broken = sorted(find_run_dir(tmp_path).glob("checkpoint-*"))
    (broken[-1] / "step.json").rename(broken[-1] / "step.json.part")  # as if the process was killed while it saved
    done = run_command(cache, tmp_path, *SMALL_RUN)
    assert done.returncode == 0, done.stderr
    folder = find_run_dir(tmp_path)
    assert read_metrics(folder) == read_metrics(reference)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (reference / weights).read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "episodes.parquet"), pd.read_parquet(reference / "episodes.parquet")
    )
    results = [json.loads((f / "result.json").read_text()) for f in (folder, reference)]
    assert results[0] == results[1]
    history = mlflow_steps(folder)
    assert history == mlflow_steps(reference)
    assert all(len(steps) == len(set(steps)) for steps in history.values())


@pytest.mark.slow
def test_run_stopped_before_its_result_ends_with_equal_results(unbroken, cache, tmp_path, monkeypatch):
    """The run is trained, scored and its episodes are joined, but result.json is missing: the next start loses nothing."""
    from aem_exp import config
    from aem_exp.run import execution, summary

    monkeypatch.setenv("AEM_CACHE", str(cache))
    experiment = config.load([*SMALL_RUN, f"outputs={tmp_path}", "tracking=off"])
    with monkeypatch.context() as broken:
        broken.setattr(summary, "write_artifacts", lambda _: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            execution.run(experiment)
    folder = execution.run(experiment)
    assert not (folder / "episodes").exists()
    ours, theirs = (pd.read_parquet(f / "episodes.parquet") for f in (folder, unbroken[0]))
    pd.testing.assert_frame_equal(ours, theirs)
    assert json.loads((folder / "result.json").read_text()) == json.loads((unbroken[0] / "result.json").read_text())


def mlflow_steps(folder):
    """Return the steps of each metric in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(json.loads((folder / "tracking.json").read_text())["uri"])
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    names = [name for name in run.data.metrics if not name.startswith(("time/", "memory/"))]
    return {name: [m.step for m in client.get_metric_history(run.info.run_id, name)] for name in names}


@pytest.mark.slow
@pytest.mark.usefixtures("no_mlflow")
def test_ctrl_c_saves_at_the_end_of_the_step(unbroken, cache, tmp_path):
    """The step need not be one of `launch.save_every`. Resumed, the run ends with equal results."""
    words = [*SMALL_RUN, "launch.save_every=5"]
    started = run_command(cache, tmp_path, *words, wait=False)
    wait_for_run(
        started,
        lambda: list(tmp_path.glob("*/metrics.jsonl")),
        lambda: "train/success" in (find_run_dir(tmp_path) / "metrics.jsonl").read_text(),
    )
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=DEADLINE)
    assert started.returncode == 130
    assert "Ctrl-C" in out
    folder = find_run_dir(tmp_path)
    step = checkpoints.steps(checkpoints.find_newest(folder))
    assert 0 < step < 6 and step == read_metrics(folder)[-1]["step"]
    assert f"step {step}: {sys.executable} -m aem_exp.run {folder}" in err
    assert "Traceback" not in out + err
    done = run_command(cache, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert read_metrics(folder) == read_metrics(unbroken[0])
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (unbroken[0] / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("no_mlflow")
def test_run_whose_reader_has_ended_saves_its_step(cache, tmp_path):
    """Ctrl-C ends `tee` at once; the run must not end with it."""
    started = run_command(cache, tmp_path, *SMALL_RUN, "launch.save_every=5", wait=False)
    wait_for_run(
        started,
        lambda: list(tmp_path.glob("*/metrics.jsonl")),
        lambda: "train/success" in (find_run_dir(tmp_path) / "metrics.jsonl").read_text(),
    )
    started.stdout.close()
    started.send_signal(signal.SIGINT)
    assert started.wait(DEADLINE) in (130, 141)
    assert "Traceback" not in started.stderr.read()
    newest = checkpoints.find_newest(find_run_dir(tmp_path))
    assert checkpoints.steps(newest) == read_metrics(find_run_dir(tmp_path))[-1]["step"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_mlflow")
def test_ctrl_c_before_the_first_step_stops_at_once(cache, tmp_path):
    """Nothing can be saved yet, so the run does not wait for the panel, which would take hours."""
    many = ["evaluation.tasks=0", "evaluation.repeats=2000"]
    started = run_command(cache, tmp_path, *SMALL_RUN, *many, wait=False)
    wait_until(lambda: "dev panel" in started.stdout.readline(), "the first panel")
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=DEADLINE)
    assert started.returncode == 130
    assert "step 0: " in err and "aem_exp.run" in err


def test_second_ctrl_c_stops_at_once():
    from aem_exp.cluster.signals import Interrupted, Signals

    with Signals() as signals, signals.defer():
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    with Signals() as signals, signals.defer():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a scheduler may send a signal twice
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(signal.SIGINT)
    assert stop.value.signal == signal.SIGINT


def test_background_run_ignores_ctrl_c():
    """A shell starts it with SIGINT ignored, because Ctrl-C is for the foreground command."""
    from aem_exp.cluster.signals import Signals

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_mlflow")
def test_second_start_reports_the_owner_and_exits(cache, tmp_path):
    first = run_command(cache, tmp_path, *SMALL_RUN, "trainer.steps=50", wait=False)
    wait_for_run(first, lambda: list(tmp_path.glob("*/experiment.json")), lambda: True)
    second = run_command(cache, tmp_path, *SMALL_RUN, "trainer.steps=50")
    first.kill()
    first.communicate()
    assert second.returncode == 0
    assert f"process {first.pid}" in second.stdout


@pytest.mark.slow
def test_lora_on_a_model_loaded_by_path(cache, tmp_path, unbroken):
    """Local Qwen2 weights under an adapter: published models are loaded in the same way."""
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
    small = [word for word in SMALL_RUN if not word.startswith("model.make")]
    model = run_here(cache, tmp_path / "out", *small, *words, *lora) / "model"
    assert (model / "adapter" / "adapter_model.safetensors").exists()
    assert (model / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["model=qwen2_5_1_5b"], ["model.path=Qwen/Qwen2.5-1.5B-Instruct", "hf download"]),
        (["+experiment=alfworld_1_5b", "launch=local"], ["alfworld"]),
        (["model=qwen2_5_1_5b", "model.path=/nowhere"], ["model.path=/nowhere", "config.json"]),
        (["tracking=http://127.0.0.1:9"], ["http://127.0.0.1:9"]),
        (["outputs=/proc/nowhere"], ["outputs", "/proc/nowhere"]),
        (["evaluation.tasks=100000"], ["evaluation.tasks=100000"]),
        pytest.param(["launch=gpu1"], ["launch.gpus_per_node=1"], marks=NO_GPU),
        (["trainer.tasks_per_step=100000"], ["trainer.tasks_per_step=100000"]),
    ],
)
def test_impossible_settings_are_an_error_of_one_line(cache, tmp_path, words, facts):
    words = [*SMALL_RUN, *words] if words[0].split("=")[0] not in ("model", "+experiment") else words
    env = {**os.environ, "AEM_CACHE": str(cache)}
    command = [sys.executable, "-m", "aem_exp", *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(fact in done.stderr for fact in facts), done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 MB, mounted for one test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_full_disk_is_an_error_before_any_work(cache, small_disk):
    (small_disk / "ballast").write_bytes(b"x" * 110_000_000)
    done = run_command(cache, small_disk, *SMALL_RUN)
    assert done.returncode == 2, done.stderr
    assert "outputs=" in done.stderr and "0.0 GB" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_mlflow")
def test_run_survives_a_disk_that_fills_up(cache, small_disk, unbroken):
    """The run stops with an error of one line. With free space again, it ends with equal results."""
    started = run_command(cache, small_disk, *SMALL_RUN, wait=False)
    wait_for_run(started, lambda: True, lambda: list(small_disk.glob("*/checkpoint-*/step.json")))
    (small_disk / "ballast").write_bytes(b"x" * 90_000_000)
    _, err = started.communicate(timeout=600)
    assert started.returncode == 1, err
    assert err.strip().startswith("aem_exp: ") and "disk is full" in err
    assert "Traceback" not in err
    (small_disk / "ballast").unlink()
    done = run_command(cache, small_disk, *SMALL_RUN)
    assert done.returncode == 0, done.stderr
    assert read_metrics(find_run_dir(small_disk)) == read_metrics(unbroken[0])


@pytest.mark.slow
def test_result_is_the_mean_over_the_last_evaluations(cache, tmp_path, monkeypatch):
    """A run that stops between these evaluations, and is resumed, has the same result."""
    from aem_exp import config
    from aem_exp.cluster.signals import Interrupted
    from aem_exp.run import execution
    from aem_exp.rundir import archive

    monkeypatch.setenv("AEM_CACHE", str(cache))
    words = [*SCORED_RUN, "trainer.steps=5", "evaluation.tasks=8", "evaluation.average=2", "evaluation.average_every=2"]
    folders = []
    for name, stop_at in (("whole", None), ("stopped", 4)):
        experiment = config.load([*words, f"outputs={tmp_path / name}"])

        def stop(step, steps, row, at=stop_at):
            if step == at:
                signal.raise_signal(signal.SIGTERM)

        if stop_at:
            with pytest.raises(Interrupted):
                execution.run(experiment, stop)
        folders.append(execution.run(experiment))
    whole, stopped = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert whole["final_steps"] == [3, 5] and whole["final"]["episodes"] == 16
    assert whole["checkpoint_rule"] == "mean over the last 2 evaluations, 2 steps apart"
    rows = {row["step"]: row["test/success"] for row in read_metrics(folders[0]) if "test/success" in row}
    assert set(rows) == {3, 5} and whole["final"]["success"] == pytest.approx(sum(rows.values()) / 2)
    assert stopped == whole | {"experiment": stopped["experiment"]}
    kept = archive.from_run_dir(folders[1], "done")
    assert [len(repeats) for repeats in kept.tasks["success"]] == [2] * 8
    assert sum(kept.success) / 8 == pytest.approx(whole["final"]["success"])
