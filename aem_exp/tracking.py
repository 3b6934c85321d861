"""What a run measured: `metrics.jsonl` in its folder first, MLflow second. The only room that speaks MLflow.

The run dir is the truth. A row is on its way to the disk before `log` returns; one thread carries it on to MLflow, in
order and in batches, and tries again for as long as the run lives. So a tracker that dies costs the run nothing, and
`python -m aem_exp.tracking sync RUN_DIR` sends later what it missed.

Nothing is logged twice. MLflow can only append, so what it already holds for a (metric, step) stands; and a point keeps
the time of its row, so that MLflow recognises a batch that is sent again because its answer got lost.
"""

import argparse
import getpass
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from uuid import uuid4

from aem_exp.values import ConfigError

OFF = "off"
METRICS = "metrics.jsonl"
RUN_ID = "mlflow_run_id"
CARD = "tracking.json"  # what this run is called in MLflow, and where: enough to send it again
LOGGED_AT = "time/logged_at"  # ms since 1970, in each row; MLflow gets it as the time of the row's points

EVERY = 2.0  # seconds between batches
SOON = 500  # points that do not wait for the next batch
PATIENCE = 10.0  # seconds that `finish` keeps trying while the tracker refuses
CROWD = 60.0  # seconds that a start waits for a sqlite file that other runs keep busy
REACH = 3.0  # seconds for a tracker's port to answer at start
POINTS, PARAMS, PARAM_CHARS, TAG_CHARS, NAME_CHARS = (
    1000,
    100,
    6000,
    8000,
    250,
)  # what MLflow takes, per batch and value

CHOICES = "sqlite:////folder/mlflow.db, http://host:port, postgresql://…, mysql://…, databricks, off"
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
DRIVERS = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
KEY = "mlflow.aemRunKey"  # tells this run from all others; MLflow shows no tag that begins with `mlflow.`
KIND = {"mlflow.experimentKind": "custom_model_development"}  # or MLflow's pages ask what this experiment is
CHARTS = "model-metrics?workflowType=machine_learning"  # of a run's page, with the menu for trained models

Point = tuple[str, float, int, int]  # metric, value, ms, step
Row = dict[str, float]


# ------------------------------------------------------------------------------------------------ names and addresses


def sanitised(name: str) -> str:
    """Spell a metric or param as MLflow allows: `pass@1` becomes `pass_at_1`."""
    name = re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))[:NAME_CHARS]


def redact(text: str) -> str:
    """Hide the credentials of any URI in `text`, and those that the environment holds for the tracker."""
    text = re.sub(r"(\w://)[^\s/]*@", r"\1***@", text)
    text = re.sub(r"([?&](?:password|pwd|token|secret)=)[^&\s'\"]+", r"\1***", text, flags=re.IGNORECASE)
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return text


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a config to MLflow's params: `{"trainer.learning_rate": "0.001"}`."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[sanitised(f"{prefix}{key}")] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def resolve_uri(tracking: str | None, outputs: Path) -> str:
    """Return an absolute URI: the one asked for, else $MLFLOW_TRACKING_URI, else a sqlite file in `outputs`."""
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outputs.absolute() / 'mlflow.db'}"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{Path(uri).expanduser()}"
    if (database := _sqlite(uri)) is not None:
        return f"sqlite:///{database}"  # relative to where it was asked for, not to where it is read
    if uri != OFF and _scheme(uri) not in PORTS and not _serverless(uri):
        _refuse(uri, "is not a store that MLflow 3 writes to")
    return uri


def git_commit(folder: Path) -> str | None:
    """Return the commit that `folder` is at (with `+` where tracked files differ from it), or None outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], check=False, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not (commit := git("rev-parse", "HEAD")):
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.partition("+")[0]


def _sqlite(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _serverless(uri: str) -> bool:
    return uri == "databricks" or uri.startswith("databricks:")


def _served(uri: str) -> bool:
    return uri.startswith("http") or _serverless(uri)


def _refuse(uri: str, problem: str, remedy: str = "") -> NoReturn:
    other = f"choose from {CHOICES} ({METRICS} alone)"
    raise ConfigError("tracking", redact(uri), remedy=f"{redact(problem)}; {remedy}{', or ' if remedy else ''}{other}")


# -------------------------------------------------------------------------------------------------------- the run dir


def read_metrics(run_dir: Path) -> list[Row]:
    """Return the rows of a run in step order; a last line that a kill cut short is left out."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class _Mirror:
    """`metrics.jsonl`, open for writing: one row per step."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        """Keep the rows up to `resume_step`; what was measured past a checkpoint will be measured again."""
        path = run_dir / METRICS
        self.rows = [row for row in read_metrics(run_dir) if resume_step is not None and row["step"] <= resume_step]
        lines = [_line(row) for row in self.rows]
        _write(path, "".join(lines))
        self.file = path.open("r+b")
        self.end = self.file.seek(0, os.SEEK_END)
        self.start = self.end - (len(lines[-1]) if lines else 0)  # of the last row

    def add(self, step: int, metrics: dict[str, float | None]) -> list[Point]:
        """Write what is new about this step and return it; the first value of a metric stands, here as in MLflow."""
        fresh = {sanitised(name): float(value) for name, value in metrics.items() if value is not None}
        if not self.rows or self.rows[-1]["step"] != step:
            assert not self.rows or self.rows[-1]["step"] < step, f"step {step} after step {self.rows[-1]['step']}"
            self.rows.append({"step": step, LOGGED_AT: round(time.time() * 1000)})
            self.start = self.end
        row = self.rows[-1]
        fresh = {name: value for name, value in fresh.items() if name not in row}
        row.update(fresh)
        self.file.seek(self.start)  # the same row, longer, over the shorter one: there is no moment without it
        self.file.write(_line(row).encode())
        self.file.flush()
        self.end = self.file.tell()
        return [(name, value, int(row[LOGGED_AT]), step) for name, value in fresh.items()]

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def _points(rows: Iterable[Row]) -> list[Point]:
    return [
        (name, value, int(row[LOGGED_AT]), int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name not in ("step", LOGGED_AT)
    ]


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _write(path: Path, text: str) -> None:
    """Replace a file at once, or leave it as it was."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with half.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def read_card(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CARD
    return json.loads(path.read_text()) if path.exists() else {}


def save_card(run_dir: Path, card: dict[str, Any]) -> None:
    _write(run_dir / CARD, json.dumps(card, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------- the store


def _mlflow() -> Any:
    """Import MLflow (2 to 4 s), silent and with short waits: the thread tries again by itself."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow


def _import(uri: str) -> None:
    """Import all of MLflow that a store needs, in the caller's thread: two that import can meet half-made modules."""
    _mlflow()
    if not _served(uri):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def probe(uri: str) -> None:
    """Refuse a tracker whose port does not answer, within seconds and without importing MLflow."""
    parts, scheme = urlsplit(uri), _scheme(uri)
    if scheme not in PORTS or parts.hostname is None:
        return
    if scheme in getproxies() and not proxy_bypass(parts.hostname):
        return  # only the proxy can tell
    try:
        socket.create_connection((parts.hostname, parts.port or PORTS[scheme]), timeout=REACH).close()
    except OSError as error:
        _refuse(uri, f"does not answer ({error.strerror or error})", "start it, correct the address")


def create_sqlite(database: Path) -> None:
    """Make an MLflow store that appears whole: many processes may ask at once, and none ever opens half of one."""
    if _made(database):
        return
    from filelock import FileLock

    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=300):
        if _made(database):
            return
        half = database.with_name(f".{database.name}.{os.getpid()}")
        try:
            shutil.copyfile(_template(), half)
            root = (database.parent / "mlruns" / "0").as_uri()
            with sqlite3.connect(half) as connection:
                connection.execute("UPDATE experiments SET artifact_location = ?", (root,))
            connection.close()
            half.replace(database)
        finally:
            half.unlink(missing_ok=True)


def _made(database: Path) -> bool:
    return database.exists() and database.stat().st_size > 0


def _template() -> Path:
    """Return an empty store, made once per machine and MLflow version: migrating takes seconds, copying none."""
    version = _mlflow().__version__
    cache = Path(os.environ.get("AEM_CACHE") or Path.home() / ".cache" / "aem_exp")
    template = cache / f"mlflow-{version}.db"
    if not _made(template):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        cache.mkdir(parents=True, exist_ok=True)
        half = cache / f".mlflow-{version}-{uuid4().hex}.db"
        try:
            SqlAlchemyStore(f"sqlite:///{half}", "mlruns").engine.dispose()
            half.replace(template)
        finally:
            half.unlink(missing_ok=True)
    return template


def _ask_database(uri: str) -> None:
    """Ask a database one question, because MLflow would repeat a hopeless one for hours."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()


class _Run:
    """One run in MLflow: found again or made, appended to, ended. Any call may fail and may be repeated."""

    def __init__(self, run_dir: Path, uri: str, card: dict[str, Any]) -> None:
        self.run_dir, self.uri, self.card = run_dir, uri, card
        self.client: Any = None
        self.id = ""
        self.held: set[tuple[str, int]] = set()  # (metric, step) that MLflow has

    def connect(self) -> None:
        """Reach the store, and this run in it."""
        if self.id:
            return
        mlflow = _mlflow()
        if (database := _sqlite(self.uri)) is not None:
            create_sqlite(database)
        if not _served(self.uri):
            _ask_database(self.uri)
        with self._alone():
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            experiment = self._experiment()
        run = self._found() or self._made(experiment)
        name = run.info.run_id
        self.held = {
            (key, point.step) for key in run.data.metrics for point in self.client.get_metric_history(name, key)
        }
        self._params(run)
        self.card["experiment_id"], self.card["run_id"], self.id = run.info.experiment_id, name, name

    def _alone(self) -> AbstractContextManager[Any]:
        """Let one process of ours at a time touch a database server, whose new database MLflow would migrate."""
        if _served(self.uri) or _sqlite(self.uri) is not None:
            return nullcontext()
        from filelock import FileLock

        return FileLock(self.run_dir.parent / ".mlflow.lock", timeout=300)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.card["experiment"]
        if self.client.get_experiment_by_name(name) is None:
            try:
                self.client.create_experiment(name, self._artifacts(name), KIND)
            except MlflowException as error:  # another process of the sweep was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        known = self.client.get_experiment_by_name(name)
        if known.lifecycle_stage == "deleted":
            self.client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Return where artifacts go: near the run dirs; a server knows by itself."""
        if _served(self.uri):
            return None
        database = _sqlite(self.uri)
        root = database.parent if database else self.run_dir.parent
        return (root / "mlruns" / re.sub(r"[^\w\-.]", "_", experiment)).as_uri()

    def _found(self) -> Any:
        """Return this run from an earlier attempt, open again; None if the store does not have it."""
        from mlflow.exceptions import MlflowException

        written = self.run_dir / RUN_ID
        try:
            if written.exists():
                run = self.client.get_run(written.read_text().strip())
            else:  # killed, perhaps, between making the run and writing down its id
                experiment = self.client.get_experiment_by_name(self.card["experiment"])
                query = f"tags.`{KEY}` = '{self.card['key']}'"
                [run] = self.client.search_runs([experiment.experiment_id], query, max_results=1) or [None]
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run is None or run.info.lifecycle_stage == "deleted":
            return None
        _write(written, run.info.run_id + "\n")
        if self.card["status"] is None:
            self.client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _made(self, experiment: str) -> Any:
        tags = {
            KEY: self.card["key"],
            "aem.run_dir": str(self.run_dir),
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "aem_exp",
            "mlflow.source.type": "LOCAL",
            "mlflow.note.content": f"Run dir: `{self.run_dir}` on `{socket.gethostname()}`",
            **self.card["tags"],
        }
        if "git.commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git.commit"].rstrip("+")
        run = self.client.create_run(experiment, run_name=self.card["run_name"], tags=_fit(tags, TAG_CHARS))
        _write(self.run_dir / RUN_ID, run.info.run_id + "\n")
        return run

    def _params(self, run: Any) -> None:
        """Send the params that MLflow lacks: it lets none change, and a resumed run is the same science."""
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in self.card["params"].items() if name not in run.data.params]
        for start in range(0, len(params), PARAMS):
            self.client.log_batch(run.info.run_id, params=params[start : start + PARAMS])

    def send(self, points: list[Point]) -> int:
        """Append the points that MLflow does not have; return how many these were."""
        from mlflow.entities import Metric

        fresh = [point for point in points if (point[0], point[3]) not in self.held]
        for start in range(0, len(fresh), POINTS):
            batch = fresh[start : start + POINTS]
            self.client.log_batch(self.id, metrics=[Metric(*point) for point in batch])
            self.held |= {(name, step) for name, _, _, step in batch}
        return len(fresh)

    def send_file(self, path: Path) -> None:
        """Copy a file or folder of the run dir to the run's artifacts, under the same relative name."""
        folder = path.parent.relative_to(self.run_dir) if path.is_relative_to(self.run_dir) else Path()
        self.client.log_artifact(self.id, str(path), folder.as_posix() if folder.parts else None)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, status)


def _fit(values: dict[str, str], chars: int) -> dict[str, str]:
    """Redact values, and cut them to what MLflow stores."""
    safe = {name: redact(value) for name, value in values.items()}
    return {name: value if len(value) <= chars else value[: chars - 1] + "…" for name, value in safe.items()}


class _Writer(threading.Thread):
    """Carries points, files and the end of a run to MLflow, in order; waits longer after each failure."""

    def __init__(self, run: _Run) -> None:
        super().__init__(name="aem_exp.tracking", daemon=True)
        self.remote = run
        self.wake = threading.Condition()
        self.points: list[Point] = []
        self.files: list[Path] = []
        self.status: str | None = None
        self.urgent = False
        self.pause = 0.0  # seconds before the next try; 0 while the tracker answers
        self.deadline: float | None = None  # of the last try
        self.idle = False  # everything is sent
        self.tried = threading.Event()  # the first try is over, and was not merely one of too many at once
        self.error: Exception | None = None  # of the newest try

    def put(self, points: Iterable[Point] = (), files: Iterable[Path] = (), urgent: bool = False) -> None:
        with self.wake:
            self.points += points
            self.files += files
            self.urgent = self.urgent or urgent or len(self.points) >= SOON
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
        crowded = time.monotonic() + CROWD
        while True:
            self._try()
            if self.error is None or "is locked" not in str(self.error) or time.monotonic() > crowded:
                self.tried.set()
            with self.wake:
                if self.deadline is None:
                    self.wake.wait_for(self._due, self.pause or EVERY)
                elif self.idle or time.monotonic() + self.pause > self.deadline:
                    return
                elif self.pause:
                    self.wake.wait(self.pause)

    def _due(self) -> bool:
        return self.deadline is not None or (self.urgent and not self.pause)

    def _try(self) -> None:
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


# ---------------------------------------------------------------------------------------------------------- the room


class Tracker:
    """A run's metrics and artifacts. A context manager: the run ends in MLflow as it ended."""

    def __init__(self, run_dir: Path, mirror: _Mirror, card: dict[str, Any], writer: _Writer | None) -> None:
        self.run_dir, self._mirror, self._card, self._writer = run_dir, mirror, card, writer
        self._finished = False
        self.trouble: str | None = None  # one sentence at the end of a run that MLflow did not get whole

    @classmethod
    def open(
        cls,
        run_dir: Path,
        uri: str,
        experiment: str,
        run_name: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        resume_step: int | None = None,
        wait: bool = True,
    ) -> Self:
        """Start or continue a run's log; rows past `resume_step` (None: all rows) are dropped, to be measured again.

        `wait=False` makes a local store while the caller goes on, who calls `ready` before the first step; a server is
        always waited for. Raises ConfigError where the tracker cannot be used.
        """
        run_dir = run_dir.absolute()
        if uri != OFF:
            probe(uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        card = {
            "key": uuid4().hex,
            "experiment_id": None,
            "run_id": None,
            **read_card(run_dir),
            "uri": redact(uri),
            "experiment": experiment,
            "run_name": run_name,
            "params": _fit(flatten(params or {}), PARAM_CHARS),
            "tags": _fit(tags or {}, TAG_CHARS),
            "status": None,
            "artifacts": [],
        }
        save_card(run_dir, card)
        writer = None
        if uri != OFF:
            _import(uri)
            writer = _Writer(_Run(run_dir, uri, card))
            writer.start()
            if wait or _sqlite(uri) is None:
                _ready(writer)
        mirror = _Mirror(run_dir, resume_step)
        if writer is not None:
            writer.put(_points(mirror.rows))
        return cls(run_dir, mirror, card, writer)

    def ready(self) -> None:
        """Wait until MLflow has the run; a ConfigError says why it cannot."""
        if self._writer is not None:
            _ready(self._writer)
            save_card(self.run_dir, self._card)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Write metrics of a step: on disk when this returns, in MLflow seconds later. None is no value; NaN is one."""
        points = self._mirror.add(step, metrics)
        if self._writer is not None:
            self._writer.put(points)

    def artifact(self, path: Path) -> None:
        """Send a file or folder of the run dir to MLflow, now and with every `sync`."""
        path = path.absolute()
        name = str(path.relative_to(self.run_dir)) if path.is_relative_to(self.run_dir) else str(path)
        if name not in self._card["artifacts"]:
            self._card["artifacts"].append(name)
            save_card(self.run_dir, self._card)
        if self._writer is not None:
            self._writer.put(files=[path])

    def flush(self, wait: float = 0.0) -> bool:
        """Make the rows survive a power cut (before a checkpoint counts); whether MLflow has them `wait` seconds on."""
        self._mirror.sync()
        if self._writer is None:
            return True
        self._writer.put(urgent=True)
        return self._writer.wait_idle(wait)

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the run (FINISHED, FAILED or KILLED); return `trouble`."""
        if self._finished:
            return self.trouble
        self._finished = True
        if self._writer is not None:  # first, so that a run that ends because its disk is full is seen to end
            self._writer.close(status, PATIENCE)
            self._writer.join()
            self.trouble = None if self._writer.idle else _trouble(self._writer)
        self._mirror.sync()
        self._mirror.file.close()
        self._card["status"] = status
        save_card(self.run_dir, self._card)
        return self.trouble

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


def _ready(writer: _Writer) -> None:
    writer.tried.wait()
    if writer.error is not None and not writer.remote.id:
        writer.close("FAILED", patience=0.0)
        _refused(writer.remote.uri, writer.error)


def _trouble(writer: _Writer) -> str:
    why = "it is slow" if writer.error is None else _reason(writer.error)
    command = shlex.join([sys.executable, "-m", "aem_exp.tracking", "sync", str(writer.remote.run_dir)])
    store = redact(writer.remote.uri)
    return f"MLflow at {store} lacks part of this run ({why}); nothing is lost, send it with: {command}"


def _refused(uri: str, error: Exception) -> NoReturn:
    """Turn what a store answered at start into a sentence for whoever named it."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        _refuse(uri, f"cannot be written ({error.strerror}: {error.filename})", "make room or rights there")
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", redact(uri)])
        _refuse(uri, "was made by another version of MLflow", f"upgrade it with `{upgrade}`")
    if re.search(r"\b40[13]\b", text):
        _refuse(
            uri, "refuses these credentials", "set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if isinstance(error, ImportError):
        _refuse(uri, f"needs a driver: pip install {DRIVERS.get(str(error.name), error.name)}")
    _refuse(uri, f"cannot be used ({_reason(error)})")


def _reason(error: BaseException) -> str:
    """Return the root of an error in one short line without credentials."""
    text = str(error)
    for known in ("Connection refused", "timed out", "database or disk is full", "file is not a database", "is locked"):
        if known in text:
            return known
    return redact((text.splitlines() or [type(error).__name__])[0])[:200]


# -------------------------------------------------------------------------------------------------- finding it again


@dataclass(frozen=True)
class Page:
    """Where a person sees a run: the link, the command that serves it (None: a server does), the way there by ssh."""

    link: str
    command: str | None = None
    tunnel: str | None = None


def page(run_dir: Path) -> Page | None:
    """Return where to see a run, from its run dir alone; None if MLflow has no page of it."""
    card = read_card(run_dir)
    uri = card.get("uri", OFF)
    if uri == OFF or card["run_id"] is None or _serverless(uri):
        return None
    path = f"#/experiments/{card['experiment_id']}/runs/{card['run_id']}/{CHARTS}"
    if _served(uri):
        return Page(f"{uri.replace('***@', '').rstrip('/')}/{path}")
    port = _free_port()
    command, site = serve_command(uri, port)
    return Page(f"{site}/{path}", command, _tunnel(port))


def serve_command(uri: str, port: int = 5000) -> tuple[str, str]:
    """Return the command that serves a store on loopback, and the address it serves."""
    lean = ["MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"]  # starts in half the time
    words = ["env", *lean, sys.executable, "-m", "mlflow", "server", "--backend-store-uri", redact(uri)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return shlex.join(words), f"http://127.0.0.1:{port}"


def _free_port(first: int = 5000) -> int:
    """Return the first port that nobody listens on: another store may be served already."""
    for port in range(first, first + 100):
        with socket.socket() as door:
            door.settimeout(0.2)
            if door.connect_ex(("127.0.0.1", port)) != 0:
                return port
    return first


def _tunnel(port: int) -> str | None:
    """Return the `ssh -L` line for someone who came here by ssh."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return None
    there = [] if words[3] == "22" else ["-p", words[3]]
    return shlex.join(["ssh", "-N", "-L", f"{port}:127.0.0.1:{port}", *there, f"{getpass.getuser()}@{words[2]}"])


def sync(run_dir: Path, uri: str | None = None) -> str:
    """Send MLflow what it lacks of a run; return one sentence. Asking twice sends nothing twice."""
    run_dir = run_dir.absolute()
    card = read_card(run_dir)
    if not card:
        raise ConfigError("RUN_DIR", str(run_dir), remedy=f"name the folder of a run; it has a {CARD}")
    uri = uri or card["uri"]
    if uri == OFF or "***" in uri:
        raise ConfigError("--uri", None, remedy=f"required: {run_dir.name} was logged to {card['uri']}")
    probe(uri)
    run = _Run(run_dir, uri, card)
    points = _points(read_metrics(run_dir))
    files = [path for name in card["artifacts"] if (path := run_dir / name).exists()]
    try:
        run.connect()
        sent = run.send(points)
        for path in files:
            run.send_file(path)
        if card["status"] is not None:
            run.end(card["status"])
    except Exception as error:  # all become a sentence
        _refused(uri, error)
    save_card(run_dir, {**card, "uri": redact(uri)})
    return f"sent {sent} of {len(points)} points and {len(files)} artifacts of run {run.id} to {redact(uri)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aem_exp.tracking", description="Send MLflow what it lacks of a run."
    )
    door = parser.add_subparsers(dest="door", required=True).add_parser("sync", help="rebuild a run in MLflow")
    door.add_argument("run_dir", type=Path)
    door.add_argument("--uri", help="the store, if not the one that the run was logged to")
    asked = parser.parse_args()
    try:
        print(sync(asked.run_dir, asked.uri and resolve_uri(asked.uri, Path.cwd())))  # noqa: T201
    except ConfigError as error:
        print(f"aem_exp: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
