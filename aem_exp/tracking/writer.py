"""The thread that sends rows to MLflow, in order and in batches, and retries during the whole run."""

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
from aem_exp.tracking.mlflow_store import check_database, create_sqlite, import_mlflow
from aem_exp.tracking.run_card import RUN_ID_FILE

SEND_INTERVAL = 2.0  # seconds between batches
URGENT_POINTS = 500  # with so many points, the next batch is sent at once
LOCKED_TIMEOUT = 60.0  # seconds to wait at the start for a sqlite file that is locked by other runs
MAX_BATCH_POINTS, MAX_BATCH_PARAMS = 1000, 100  # MLflow's limits per batch
MAX_PARAM_CHARS, MAX_TAG_CHARS = 6000, 8000  # MLflow's limits per value
RUN_KEY_TAG = "mlflow.aemRunKey"  # unique key of the run; MLflow hides tags that begin with `mlflow.`
NOTE_TAG = "mlflow.note.content"  # the description of a run or an experiment
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # otherwise MLflow's page asks for the kind
# A link in a run's description shows these metrics on one page.
HEADLINE_METRICS = ("train/success", "train/response_entropy", "train/loss")


class RemoteRun:
    """One run in MLflow. Any method may fail, and may then be called again."""

    def __init__(self, run_dir: Path, uri: str, card: dict[str, Any]) -> None:
        self.run_dir, self.uri, self.card = run_dir, uri, card
        self.client: Any = None
        self.id = ""
        self.stored_points: set[tuple[str, int]] = set()  # (metric, step) pairs that MLflow has

    def connect(self) -> None:
        """Open the store, and find or create this run in it."""
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
        """Open or create the store and the experiment in it; return the experiment's id."""
        mlflow = import_mlflow()
        if (database := store_uri.sqlite_file(self.uri)) is not None:
            create_sqlite(database)
        if not store_uri.is_remote(self.uri):
            check_database(self.uri)
        with self._lock_server():
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            return self._ensure_experiment()

    def _lock_server(self) -> AbstractContextManager[Any]:
        """Return a lock of a database server for our processes: only one of them may migrate a new database."""
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
            except MlflowException as error:  # another process of the sweep created it
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        known = self.client.get_experiment_by_name(name)
        if known.lifecycle_stage == "deleted":
            self.client.restore_experiment(known.experiment_id)
        if not saved.has_views(known.tags):
            saved.save(self.client, known.experiment_id)
        return str(known.experiment_id)

    def _artifact_location(self, experiment: str) -> str | None:
        """Return the folder of artifacts, beside the run directories; None for a server, which has its own."""
        if store_uri.is_remote(self.uri):
            return None
        database = store_uri.sqlite_file(self.uri)
        root = database.parent if database else self.run_dir.parent
        return (root / "mlruns" / re.sub(r"[^\w\-.]", "_", experiment)).as_uri()

    def _find_run(self) -> Any:
        """Find this run of an earlier start and reopen it; None if the store does not have it."""
        from mlflow.exceptions import MlflowException

        written = self.run_dir / RUN_ID_FILE
        try:
            if written.exists():
                run = self.client.get_run(written.read_text().strip())
            else:  # an earlier start may have been killed before it wrote the id
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
            experiment, run_name=self.card["run_name"], tags=redact_and_truncate(tags, MAX_TAG_CHARS)
        )
        disk.write_atomically(self.run_dir / RUN_ID_FILE, run.info.run_id + "\n")
        note = {
            NOTE_TAG: f"{_curve_links(experiment, run.info.run_id)}\n\n{tags[NOTE_TAG]}"
        }  # its links need the id of the run
        self.client.set_tag(run.info.run_id, NOTE_TAG, redact_and_truncate(note, MAX_TAG_CHARS)[NOTE_TAG])
        return run

    def _send_params(self, run: Any) -> None:
        """Send the params that MLflow lacks. MLflow does not allow changes, and a resumed run has the same experiment."""
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in self.card["params"].items() if name not in run.data.params]
        for start in range(0, len(params), MAX_BATCH_PARAMS):
            self.client.log_batch(run.info.run_id, params=params[start : start + MAX_BATCH_PARAMS])

    def send(self, points: list[MetricPoint]) -> int:
        """Append the points that MLflow does not have; return their number."""
        from mlflow.entities import Metric

        fresh = [point for point in points if (point[0], point[3]) not in self.stored_points]
        for start in range(0, len(fresh), MAX_BATCH_POINTS):
            batch = fresh[start : start + MAX_BATCH_POINTS]
            self.client.log_batch(self.id, metrics=[Metric(*point) for point in batch])
            self.stored_points |= {(name, step) for name, _, _, step in batch}
        return len(fresh)

    def send_file(self, path: Path) -> None:
        """Copy a file or folder of the run directory to the run's artifacts, under the same relative path."""
        folder = path.parent.relative_to(self.run_dir) if path.is_relative_to(self.run_dir) else Path()
        self.client.log_artifact(self.id, str(path), folder.as_posix() if folder.parts else None)

    def end(self, status: str) -> None:
        if self.client.get_run(self.id).info.status != status:  # a second call would change the end time
            self.client.set_terminated(self.id, status)


def _curve_links(experiment: str, run: str) -> str:
    """Return the first line of a run's description: links to charts that its page shows late or not at all."""
    keys = quote(json.dumps(HEADLINE_METRICS, separators=(",", ":")))
    curves = f"#/metric?runs=%5B%22{run}%22%5D&metric=%22{quote(HEADLINE_METRICS[0])}%22&experiments=%5B%22{experiment}%22%5D"
    links = {
        "Success, entropy and loss": f"{curves}&plot_metric_keys={keys}&x_axis=step&{saved.WORKFLOW_QUERY}",
        **saved.links("", experiment),
    }
    return ", ".join(f"[{name}]({link.removeprefix('/')})" for name, link in links.items())


def redact_and_truncate(values: dict[str, str], chars: int) -> dict[str, str]:
    """Redact values, and shorten them to MLflow's limit."""
    safe = {name: errors.redact(value) for name, value in values.items()}
    return {name: value if len(value) <= chars else value[: chars - 1] + "…" for name, value in safe.items()}


class Writer(threading.Thread):
    """Sends points, files and the end of a run to MLflow, in order. After each failure it waits longer."""

    def __init__(self, run: RemoteRun) -> None:
        super().__init__(name="aem_exp.tracking", daemon=True)
        self.remote = run
        self.wake = threading.Condition()
        self.points: list[MetricPoint] = []
        self.files: list[Path] = []
        self.status: str | None = None
        self.urgent = False
        self.pause = 0.0  # seconds before the next try; 0 while the store answers
        self.deadline: float | None = None  # time after which it no longer retries
        self.idle = False  # everything is sent
        self.tried = threading.Event()  # the first try is over; a locked sqlite file does not count as a try
        self.error: Exception | None = None  # error of the newest try

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
        lock_deadline = time.monotonic() + LOCKED_TIMEOUT
        while True:
            self._send_pending()
            if self.error is None or "is locked" not in str(self.error) or time.monotonic() > lock_deadline:
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
        except Exception as error:  # any error of MLflow: the run continues, and its run directory has everything
            self.error, self.pause = error, min(2 * self.pause or 1.0, 60.0)

    def _drain(self) -> None:
        """Send the waiting points, then the files. The end of the run is sent even if a file fails."""
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
