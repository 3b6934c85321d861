"""The cost of tracking for the training process, compared with a call of `mlflow.log_metrics` per step.

Both log the same 200 steps of 24 metrics to their own sqlite store; each step also sleeps 50 ms in place of training. The cost
is the time for which the call blocks the training thread; our call also writes metrics.jsonl. The time from the last step until
MLflow has everything is shown too.

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
    """Return the seconds that logging took in each step."""
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
    results = {}
    for name, log in (("aem_exp", ours), ("mlflow.log_metrics", per_call)):
        with tempfile.TemporaryDirectory() as place:
            results[name] = log(Path(place))
    for name, (spent, end) in results.items():
        median, total = 1000 * statistics.median(spent), sum(spent)
        print(f"{name:20} median {median:7.2f} ms per step, {total:6.2f} s in {STEPS} steps, {end:.2f} s at the end")
    (one, end), (other, _) = results.values()
    print(f"ratio                {statistics.median(other) / statistics.median(one):.0f} x per step", end="")
    print(f", {sum(other) / (sum(one) + end):.0f} x with the time at the end")


if __name__ == "__main__":
    main()
