"""The thread that carries rows to MLflow, in order and in batches, and tries again for as long as the run lives."""

import getpass
import json
import re
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aem_exp.core import disk, errors
from aem_exp.rundir.metrics import MetricPoint
from aem_exp.tracking import store_uri
from aem_exp.tracking import views as saved
from aem_exp.tracking.mlflow_store import _check_database, _import_mlflow, create_sqlite
from aem_exp.tracking.run_card import RUN_ID_FILE

SEND_INTERVAL = 2.0  # seconds between batches
URGENT_POINTS = 500  # points that do not wait for the next batch
LOCKED_TIMEOUT = 60.0  # seconds that a start waits for a sqlite file that other runs keep busy
MAX_BATCH_POINTS, MAX_BATCH_PARAMS, MAX_PARAM_CHARS, MAX_TAG_CHARS = (
    1000,
    100,
    6000,
    8000,
)  # what MLflow takes, per batch and value
RUN_KEY_TAG = "mlflow.aemRunKey"  # tells this run from all others; MLflow shows no tag that begins with `mlflow.`
NOTE_TAG = "mlflow.note.content"  # the description of a run or an experiment
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # or MLflow's pages ask what this experiment is
HEADLINE_METRICS = ("train/success", "train/response_entropy", "train/loss")  # of a run, on one page


class _RemoteRun:
    """One run in MLflow: found again or made, appended to, ended. Any call may fail and may be repeated."""

    def __init__(self, run_dir: Path, uri: str, card: dict[str, Any]) -> None:
        self.run_dir, self.uri, self.card = run_dir, uri, card
        self.client: Any = None
        self.id = ""
        self.stored_points: set[tuple[str, int]] = set()  # (metric, step) that MLflow has

    def connect(self) -> None:
        """Reach the store, and this run in it."""
        if self.id:
            return
        experiment = self.open_experiment()
        run = self._find_run() or self._create_run(experiment)
        name = run.info.run_id
        self.stored_points = {
            (key, point.step) for key in run.data.metrics for point in self.client.get_metric_history(name, key)
        }
        self._send_params(run)
        self.card["experiment_id"], self.card["run_id"], self.id = run.info.experiment_id, name, name

    def open_experiment(self) -> str:
        """Reach the store, made where it is not there yet, and the experiment in it; its id."""
        mlflow = _import_mlflow()
        if (database := store_uri.sqlite_file(self.uri)) is not None:
            create_sqlite(database)
        if not store_uri.is_remote(self.uri):
            _check_database(self.uri)
        with self._lock_server():
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            return self._ensure_experiment()

    def _lock_server(self) -> AbstractContextManager[Any]:
        """Let one process of ours at a time touch a database server, whose new database MLflow would migrate."""
        if store_uri.is_remote(self.uri) or store_uri.sqlite_file(self.uri) is not None:
            return nullcontext()
        from filelock import FileLock

        return FileLock(self.run_dir.parent / ".mlflow.lock", timeout=300)

    def _ensure_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.card["experiment"]
        if self.client.get_experiment_by_name(name) is None:
            try:
                self.client.create_experiment(name, self._artifact_location(name), EXPERIMENT_TAGS)
            except MlflowException as error:  # another process of the sweep was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        known = self.client.get_experiment_by_name(name)
        if known.lifecycle_stage == "deleted":
            self.client.restore_experiment(known.experiment_id)
        if not saved.has_views(known.tags):
            saved.save(self.client, known.experiment_id)
        return str(known.experiment_id)

    def _artifact_location(self, experiment: str) -> str | None:
        """Return where artifacts go: near the run dirs; a server knows by itself."""
        if store_uri.is_remote(self.uri):
            return None
        database = store_uri.sqlite_file(self.uri)
        root = database.parent if database else self.run_dir.parent
        return (root / "mlruns" / re.sub(r"[^\w\-.]", "_", experiment)).as_uri()

    def _find_run(self) -> Any:
        """Return this run from an earlier attempt, open again; None if the store does not have it."""
        from mlflow.exceptions import MlflowException

        written = self.run_dir / RUN_ID_FILE
        try:
            if written.exists():
                run = self.client.get_run(written.read_text().strip())
            else:  # killed, perhaps, between making the run and writing down its id
                experiment = self.client.get_experiment_by_name(self.card["experiment"])
                query = f"tags.`{RUN_KEY_TAG}` = '{self.card['key']}'"
                [run] = self.client.search_runs([experiment.experiment_id], query, max_results=1) or [None]
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run is None or run.info.lifecycle_stage == "deleted":
            return None
        disk.write_atomically(written, run.info.run_id + "\n")
        if self.card["status"] is None:
            self.client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _create_run(self, experiment: str) -> Any:
        tags = {
            RUN_KEY_TAG: self.card["key"],
            "aem.run_dir": str(self.run_dir),
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "aem_exp",
            "mlflow.source.type": "LOCAL",
            NOTE_TAG: f"Run dir: `{self.run_dir}` on `{socket.gethostname()}`",
            **self.card["tags"],
        }
        if "git.commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git.commit"].rstrip("+")
        run = self.client.create_run(
            experiment, run_name=self.card["run_name"], tags=_redact_and_truncate(tags, MAX_TAG_CHARS)
        )
        disk.write_atomically(self.run_dir / RUN_ID_FILE, run.info.run_id + "\n")
        note = {
            NOTE_TAG: f"{_curve_links(experiment, run.info.run_id)}\n\n{tags[NOTE_TAG]}"
        }  # its links name the run itself
        self.client.set_tag(run.info.run_id, NOTE_TAG, _redact_and_truncate(note, MAX_TAG_CHARS)[NOTE_TAG])
        return run

    def _send_params(self, run: Any) -> None:
        """Send the params that MLflow lacks: it lets none change, and a resumed run is the same science."""
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in self.card["params"].items() if name not in run.data.params]
        for start in range(0, len(params), MAX_BATCH_PARAMS):
            self.client.log_batch(run.info.run_id, params=params[start : start + MAX_BATCH_PARAMS])

    def send(self, points: list[MetricPoint]) -> int:
        """Append the points that MLflow does not have; return how many these were."""
        from mlflow.entities import Metric

        fresh = [point for point in points if (point[0], point[3]) not in self.stored_points]
        for start in range(0, len(fresh), MAX_BATCH_POINTS):
            batch = fresh[start : start + MAX_BATCH_POINTS]
            self.client.log_batch(self.id, metrics=[Metric(*point) for point in batch])
            self.stored_points |= {(name, step) for name, _, _, step in batch}
        return len(fresh)

    def send_file(self, path: Path) -> None:
        """Copy a file or folder of the run dir to the run's artifacts, under the same relative name."""
        folder = path.parent.relative_to(self.run_dir) if path.is_relative_to(self.run_dir) else Path()
        self.client.log_artifact(self.id, str(path), folder.as_posix() if folder.parts else None)

    def end(self, status: str) -> None:
        if self.client.get_run(self.id).info.status != status:  # or its end would move
            self.client.set_terminated(self.id, status)


def _curve_links(experiment: str, run: str) -> str:
    """Return the first line of a run's description: links to what its page, sorted by name, shows late or not at all."""
    keys = quote(json.dumps(HEADLINE_METRICS, separators=(",", ":")))
    curves = f"#/metric?runs=%5B%22{run}%22%5D&metric=%22{quote(HEADLINE_METRICS[0])}%22&experiments=%5B%22{experiment}%22%5D"
    links = {
        "Success, entropy and loss": f"{curves}&plot_metric_keys={keys}&x_axis=step&{saved.WORKFLOW_QUERY}",
        **saved.links("", experiment),
    }
    return ", ".join(f"[{name}]({link.removeprefix('/')})" for name, link in links.items())


def _redact_and_truncate(values: dict[str, str], chars: int) -> dict[str, str]:
    """Redact values, and cut them to what MLflow stores."""
    safe = {name: errors.redact(value) for name, value in values.items()}
    return {name: value if len(value) <= chars else value[: chars - 1] + "…" for name, value in safe.items()}


class _Writer(threading.Thread):
    """Carries points, files and the end of a run to MLflow, in order; waits longer after each failure."""

    def __init__(self, run: _RemoteRun) -> None:
        super().__init__(name="aem_exp.tracking", daemon=True)
        self.remote = run
        self.wake = threading.Condition()
        self.points: list[MetricPoint] = []
        self.files: list[Path] = []
        self.status: str | None = None
        self.urgent = False
        self.pause = 0.0  # seconds before the next try; 0 while the tracker answers
        self.deadline: float | None = None  # of the last try
        self.idle = False  # everything is sent
        self.tried = threading.Event()  # the first try is over, and was not merely one of too many at once
        self.error: Exception | None = None  # of the newest try

    def put(self, points: Iterable[MetricPoint] = (), files: Iterable[Path] = (), urgent: bool = False) -> None:
        with self.wake:
            self.points += points
            self.files += files
            self.urgent = self.urgent or urgent or len(self.points) >= URGENT_POINTS
            self.idle = False
            self.wake.notify_all()

    def close(self, status: str, patience: float) -> None:
        with self.wake:
            self.status, self.deadline = status, time.monotonic() + patience
            self.urgent, self.idle, self.pause = True, False, 0.0
            self.wake.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        with self.wake:
            return self.wake.wait_for(lambda: self.idle, timeout)

    def run(self) -> None:
        crowded = time.monotonic() + LOCKED_TIMEOUT
        while True:
            self._send_pending()
            if self.error is None or "is locked" not in str(self.error) or time.monotonic() > crowded:
                self.tried.set()
            with self.wake:
                if self.deadline is None:
                    self.wake.wait_for(self._is_due, self.pause or SEND_INTERVAL)
                elif self.idle or time.monotonic() + self.pause > self.deadline:
                    return
                elif self.pause:
                    self.wake.wait(self.pause)

    def _is_due(self) -> bool:
        return self.deadline is not None or (self.urgent and not self.pause)

    def _send_pending(self) -> None:
        try:
            self.remote.connect()
            self._drain()
            self.error, self.pause = None, 0.0
        except Exception as error:  # whatever ails it: the run goes on, and the run dir has everything
            self.error, self.pause = error, min(2 * self.pause or 1.0, 60.0)

    def _drain(self) -> None:
        """Send what is there: points, then files; the end is told even when a file is refused."""
        with self.wake:
            self.urgent = False
            points, files, status = list(self.points), list(self.files), self.status
        self.remote.send(points)
        with self.wake:
            del self.points[: len(points)]
        try:
            for path in files:
                self.remote.send_file(path)
                with self.wake:
                    self.files.remove(path)
        finally:
            if status is not None:
                self.remote.end(status)
        with self.wake:
            self.idle = not self.points and not self.files and status == self.status
            self.wake.notify_all()
