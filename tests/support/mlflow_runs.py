"""Helpers of the tracking tests: small runs that log to MLflow, and a real MLflow server."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import Any

from aem_exp.tracking import store_uri
from aem_exp.tracking.tracker import Tracker
from support import TESTS

METRIC_NAMES = ("train/success", "aem/alpha_q50", "time/update")


def step_metrics(step: int) -> dict[str, float]:
    return {name: step + index / 10 for index, name in enumerate(METRIC_NAMES)}


def all_steps(steps: list[int]) -> dict[str, list[int]]:
    return dict.fromkeys(METRIC_NAMES, steps)


def open_tracker(run_dir: Path, uri: str, resume_step: int | None = None, **more: Any) -> Tracker:
    return Tracker.open(run_dir, uri, "household", "grpo+aem/s0", {"seed": 0}, {"aem.seed": "0"}, resume_step, **more)


def local_store(outputs: Path) -> str:
    return store_uri.resolve_uri(None, outputs)


def read_mlflow_run(uri: str, run_dir: Path) -> Any:
    """Return the run from MLflow. Its attribute `steps` has the steps of each metric in the logged order."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run((run_dir / "mlflow_run_id").read_text().strip())
    run.steps = {
        name: [point.step for point in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    return run


LOG_IN_PARALLEL = """
    import os, sys, time
    from pathlib import Path
    from aem_exp.tracking import mlflow_store, store_uri
    from support.mlflow_runs import open_tracker, step_metrics
    mlflow_store.import_store("sqlite:///x")
    outputs, start, children = Path(sys.argv[1]), time.time() + 0.5, []
    count, live = int(sys.argv[2]), sys.argv[3] == "live"
    for index in range(count):
        if not (child := os.fork()):
            time.sleep(max(0.0, start - time.time()))
            with open_tracker(outputs / f"run{index}", store_uri.resolve_uri(None, outputs), live=live) as tracker:
                for step in range(1, 4):
                    tracker.log(step, step_metrics(step))
            os._exit(0 if tracker.trouble is None else 1)
        children.append(child)
    sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def run_script(text: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that may import `support`."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    words = (sys.executable, "-c", textwrap.dedent(text), *words)
    return subprocess.run(words, text=True, capture_output=True, env=environment)


class MLflowServer:
    """A real `mlflow server`, started with the command of `aem-exp ui`."""

    def __init__(self, uri: str, folder: Path) -> None:
        port = store_uri.first_free_port(5200 + os.getpid() % 500)
        words, environment = store_uri.serve_command(uri, port)
        self.uri = store_uri.local_address(port)
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            words, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )

    def wait(self, seconds: float = 600) -> None:
        """Wait until the server answers."""
        for _ in range(int(seconds / 0.1)):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=10).read()
                return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)
        raise TimeoutError(self.uri)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()
