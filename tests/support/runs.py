"""Small runs, in their own processes or in this one, and helpers that wait for them and read their files."""

import json
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

from support import TESTS

SMALL_RUN = [
    "model.make.steps=25",
    "model.make.habit_steps=5",
    "model.make.episodes=128",
    "trainer.steps=6",
    "trainer.tasks_per_step=3",
    "trainer.group_size=4",
    "trainer.mini_batch=6",
    "env.invalid_penalty=0.1",  # the policy is too weak to solve a task: without penalties all returns and gradients would be 0
    "evaluation.tasks=8",
    "evaluation.every=3",
    "launch.save_every=2",
]

DEADLINE = 600  # seconds, for work that takes a few: the suite must also pass on a machine that is ten times slower

SCORED_RUN = [  # a hardly trained policy that wins sometimes, for tests of evaluation
    "model.make.steps=120",
    "model.make.habit_steps=10",
    "model.make.episodes=512",
    "trainer.steps=2",
    "trainer.tasks_per_step=2",
    "trainer.group_size=4",
    "trainer.mini_batch=4",
    "tracking=off",
]


def run_command(cache, outputs, *words, wait=True):
    """`python -m aem_exp` in its own process: the finished process, or with `wait=False` the running one."""
    env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(outputs), "COLUMNS": "120"}
    command = [sys.executable, "-m", "aem_exp", *words]
    started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return started
    out, err = started.communicate(timeout=DEADLINE)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def torchrun(module, *words):
    """Run a module of `support` in two processes, connected by gloo."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        module.__name__,
    ]
    command += map(str, words)
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=DEADLINE, check=False)


def skip_or_fail(why) -> NoReturn:
    """Skip a test that this machine cannot run; with $AEM_REQUIRE_ALL=1 (CI), fail instead."""
    (pytest.fail if os.environ.get("AEM_REQUIRE_ALL") == "1" else pytest.skip)(why)


def needs(library) -> None:
    """Skip a test whose extra is not installed; see `skip_or_fail`."""
    if not find_spec(library):
        skip_or_fail(f"no {library}: pip install 'aem-exp[{library}]'")


def run_here(cache, outputs, *words) -> Path:
    """Run an experiment in this process, which saves the imports; its run dir."""
    from aem_exp.config import load
    from aem_exp.run.execution import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(cache))
        return run(load([*words, f"outputs={outputs}"]))


def find_run_dir(outputs) -> Path:
    (folder,) = [path.parent for path in Path(outputs).glob("*/experiment.json")]
    return folder


def read_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def weights_moved(folder):
    """Whether every step changed the policy. Comparing two runs is meaningless if neither changes anything."""
    norms = [row["train/grad_norm"] for row in read_metrics(folder) if "train/grad_norm" in row]
    return bool(norms) and min(norms) > 0


def wait_for_run(started, folder_exists, reached, timeout=DEADLINE):
    """Wait until a running process has made its folder and fulfils `reached`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        assert started.poll() is None, started.stderr.read()
        if folder_exists() and reached():
            return
        time.sleep(0.02)
    raise AssertionError("the run did not fulfil the condition in time")


def wait_until(condition, description, seconds=DEADLINE):
    """Wait until `condition()` is true; its value. `description`: a text, or a function that makes one after a timeout."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"timeout: {description() if callable(description) else description}"
        time.sleep(0.1)
    return value


class BackgroundCall:
    """A call in a thread of its own; `end` waits for it, and returns its result or raises its error."""

    def __init__(self, work, *args):
        self._work, self._args, self._result, self._error = work, args, None, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._result = self._work(*self._args)
        except BaseException as error:
            self._error = error

    @property
    def busy(self):
        return self._thread.is_alive()

    def end(self, seconds=DEADLINE):
        self._thread.join(seconds)
        assert not self.busy, f"{self._work} has not ended"
        if self._error:
            raise self._error
        return self._result
