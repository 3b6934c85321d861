"""What a step's tracking costs the training process, against `mlflow.log_metrics` called at each step.

Both log the same 200 steps of 24 metrics to a sqlite store of their own; a step takes 50 ms of waiting besides, as if it
trained. The cost is the time that the call holds the training thread; ours also writes the run's own file. The time until all
is in MLflow, after the last step, is shown beside it.

.venv/bin/python tests/bench/tracking.py
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow

from aem_exp.tracking import store_uri
from aem_exp.tracking.tracker import Tracker

STEPS, TRAINING = 200, 0.05
NAMES = [f"train/metric_{number}" for number in range(24)]


def steps(log: Callable[[int, dict[str, float]], object]) -> list[float]:
    """Seconds that each step's logging took."""
    spent = []
    for step in range(1, STEPS + 1):
        time.sleep(TRAINING)
        start = time.perf_counter()
        log(step, dict.fromkeys(NAMES, step / 7))
        spent.append(time.perf_counter() - start)
    return spent


def ours(folder: Path) -> tuple[list[float], float]:
    with Tracker.open(folder / "run", store_uri.resolve_uri(None, folder), "bench", "ours", {}, {}) as tracker:
        tracker.wait_until_ready()
        spent = steps(tracker.log)
        end = time.perf_counter()
    assert tracker.trouble is None
    return spent, time.perf_counter() - end


def per_call(folder: Path) -> tuple[list[float], float]:
    mlflow.set_tracking_uri(store_uri.resolve_uri(None, folder))
    with mlflow.start_run():
        return steps(lambda step, row: mlflow.log_metrics(row, step=step)), 0.0


def main() -> None:
    told = {}
    for name, log in (("aem_exp", ours), ("mlflow.log_metrics", per_call)):
        with tempfile.TemporaryDirectory() as place:
            told[name] = log(Path(place))
    for name, (spent, end) in told.items():
        median, total = 1000 * statistics.median(spent), sum(spent)
        print(f"{name:20} median {median:7.2f} ms a step, {total:6.2f} s in {STEPS} steps, {end:.2f} s at the end")
    (one, end), (other, _) = told.values()
    print(f"ratio                {statistics.median(other) / statistics.median(one):.0f} x a step", end="")
    print(f", {sum(other) / (sum(one) + end):.0f} x with the end")


if __name__ == "__main__":
    main()
