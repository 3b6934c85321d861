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
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import quote
from uuid import uuid4

from aem_exp import stores
from aem_exp import views as saved
from aem_exp.core import cli, disk, errors
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import metrics
from aem_exp.rundir.metrics import Mirror, Point

RUN_ID = "mlflow_run_id"
CARD = "tracking.json"  # what this run is called in MLflow, and where: enough to send it again

EVERY = 2.0  # seconds between batches
SOON = 500  # points that do not wait for the next batch
PATIENCE = 10.0  # seconds that `finish` keeps trying while the tracker refuses
CROWD = 60.0  # seconds that a start waits for a sqlite file that other runs keep busy
POINTS, PARAMS, PARAM_CHARS, TAG_CHARS = 1000, 100, 6000, 8000  # what MLflow takes, per batch and value

DRIVERS = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
KEY = "mlflow.aemRunKey"  # tells this run from all others; MLflow shows no tag that begins with `mlflow.`
NOTE, REPORTS = "mlflow.note.content", "Reports of sweeps:"  # an experiment's description, and our part of it
REPORT = "aem.report"  # tag of the run that holds a report: the sweep
KIND = {"mlflow.experimentKind": "custom_model_development"}  # or MLflow's pages ask what this experiment is
HEADLINES = ("train/success", "train/response_entropy", "train/loss")  # of a run, on one page
CHARTS = "model-metrics?workflowType=machine_learning"  # of a run's page, with the menu for trained models


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a config to MLflow's params: `{"trainer.learning_rate": "0.001"}`."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[metrics.sanitised(f"{prefix}{key}")] = (
                value if isinstance(value, str) else json.dumps(value, default=str)
            )
    return flat


def read_card(run_dir: Path) -> dict[str, Any]:
    """What this run is called in MLflow; empty where it is not there."""
    path = run_dir / CARD
    return disk.read(path, "uri", "run_id", "experiment_id") if path.exists() else {}


def save_card(run_dir: Path, card: dict[str, Any]) -> None:
    disk.write(run_dir / CARD, json.dumps(card, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------- the store


def _mlflow() -> Any:
    """Import MLflow (2 to 4 s), silent and with short waits: the thread tries again by itself."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what it raises is told here, in a sentence
    return mlflow


def _import(uri: str) -> None:
    """Import all of MLflow that a store needs, in the caller's thread: two that import can meet half-made modules."""
    _mlflow()
    if not stores.served(uri):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


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
    cache = disk.cache()
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
        experiment = self.reach()
        run = self._found() or self._made(experiment)
        name = run.info.run_id
        self.held = {
            (key, point.step) for key in run.data.metrics for point in self.client.get_metric_history(name, key)
        }
        self._params(run)
        self.card["experiment_id"], self.card["run_id"], self.id = run.info.experiment_id, name, name

    def reach(self) -> str:
        """Reach the store, made where it is not there yet, and the experiment in it; its id."""
        mlflow = _mlflow()
        if (database := stores.sqlite_file(self.uri)) is not None:
            create_sqlite(database)
        if not stores.served(self.uri):
            _ask_database(self.uri)
        with self._alone():
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            return self._experiment()

    def _alone(self) -> AbstractContextManager[Any]:
        """Let one process of ours at a time touch a database server, whose new database MLflow would migrate."""
        if stores.served(self.uri) or stores.sqlite_file(self.uri) is not None:
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
        if not saved.exist(known.tags):
            saved.save(self.client, known.experiment_id)
        return str(known.experiment_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Return where artifacts go: near the run dirs; a server knows by itself."""
        if stores.served(self.uri):
            return None
        database = stores.sqlite_file(self.uri)
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
        disk.write(written, run.info.run_id + "\n")
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
            NOTE: f"Run dir: `{self.run_dir}` on `{socket.gethostname()}`",
            **self.card["tags"],
        }
        if "git.commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git.commit"].rstrip("+")
        run = self.client.create_run(experiment, run_name=self.card["run_name"], tags=_fit(tags, TAG_CHARS))
        disk.write(self.run_dir / RUN_ID, run.info.run_id + "\n")
        note = {NOTE: f"{_curves(experiment, run.info.run_id)}\n\n{tags[NOTE]}"}  # its links name the run itself
        self.client.set_tag(run.info.run_id, NOTE, _fit(note, TAG_CHARS)[NOTE])
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
        if self.client.get_run(self.id).info.status != status:  # or its end would move
            self.client.set_terminated(self.id, status)


def _curves(experiment: str, run: str) -> str:
    """Return the first line of a run's description: links to what its page, sorted by name, shows late or not at all."""
    keys = quote(json.dumps(HEADLINES, separators=(",", ":")))
    curves = f"#/metric?runs=%5B%22{run}%22%5D&metric=%22{quote(HEADLINES[0])}%22&experiments=%5B%22{experiment}%22%5D"
    links = {
        "Success, entropy and loss": f"{curves}&plot_metric_keys={keys}&x_axis=step&{saved.MENU}",
        **saved.links("", experiment),
    }
    return ", ".join(f"[{name}]({link.removeprefix('/')})" for name, link in links.items())


def _fit(values: dict[str, str], chars: int) -> dict[str, str]:
    """Redact values, and cut them to what MLflow stores."""
    safe = {name: errors.redact(value) for name, value in values.items()}
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

    def __init__(
        self, run_dir: Path, mirror: Mirror, card: dict[str, Any], writer: _Writer | None, later: bool = False
    ) -> None:
        self._later = later
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
        live: bool = True,
    ) -> Self:
        """Start or continue a run's log; rows past `resume_step` (None: all rows) are dropped, to be measured again.

        `live=False` leaves the store alone until the run ends, and then sends all at once, one process at a time: many
        machines do not write to one sqlite file.
        `wait=False` makes a local store while the caller goes on, who calls `ready` before the first step; a server is
        always waited for. Raises ConfigError where the tracker cannot be used.
        """
        run_dir = run_dir.absolute()
        if uri != stores.OFF:
            stores.probe(uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        card = {
            "key": uuid4().hex,
            "experiment_id": None,
            "run_id": None,
            **read_card(run_dir),
            "uri": errors.redact(uri),
            "experiment": experiment,
            "run_name": run_name,
            "params": _fit(flatten(params or {}), PARAM_CHARS),
            "tags": _fit(tags or {}, TAG_CHARS),
            "status": None,
            "artifacts": [],
        }
        save_card(run_dir, card)
        writer = None
        if uri != stores.OFF and live:
            _import(uri)
            writer = _Writer(_Run(run_dir, uri, card))
            writer.start()
            if wait or stores.sqlite_file(uri) is None:
                _ready(writer)
        mirror = Mirror(run_dir, resume_step)
        if writer is not None:
            writer.put(metrics.points(mirror.rows))
        return cls(run_dir, mirror, card, writer, later=uri != stores.OFF and not live)

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
        if self._later and status != "KILLED":  # who is killed has no time, and will go on
            self.trouble = _sent(self.run_dir)
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


class Silent:
    """The tracker of all processes of a run but the first, which speaks for them."""

    trouble: str | None = None

    def ready(self) -> None: ...

    def log(self, step: int, metrics: dict[str, float | None]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def flush(self, wait: float = 0.0) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def _ready(writer: _Writer) -> None:
    writer.tried.wait()
    if writer.error is not None and not writer.remote.id:
        writer.close("FAILED", patience=0.0)
        refused(writer.remote.uri, writer.error)


def _sent(run_dir: Path) -> str | None:
    """Send a whole run; one sentence where that fails."""
    try:
        sync(run_dir)
    except ConfigError as error:
        return _lacking(run_dir, read_card(run_dir)["uri"], str(error))
    return None


def _trouble(writer: _Writer) -> str:
    why = "it is slow" if writer.error is None else _reason(writer.error)
    return _lacking(writer.remote.run_dir, errors.redact(writer.remote.uri), why)


def _lacking(run_dir: Path, store: str, why: str) -> str:
    command = shlex.join([sys.executable, "-m", "aem_exp.tracking", "sync", str(run_dir)])
    return f"MLflow at {store} lacks part of this run ({why}); nothing is lost, send it with: {command}"


def refused(uri: str, error: Exception) -> NoReturn:
    """Turn what a store answered at start into a sentence for whoever named it."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        place = error.filename2 or error.filename  # a copy names its source first
        stores.refuse(uri, f"cannot be written ({error.strerror}: {place})", "make room or rights there")
    if "disk is full" in text:
        stores.refuse(uri, "cannot be written (the disk is full)", "free space there and ask again")
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", errors.redact(uri)])
        stores.refuse(uri, "was made by another version of MLflow", f"upgrade it with `{upgrade}`")
    if re.search(r"\b40[13]\b", text):
        stores.refuse(
            uri, "refuses these credentials", "set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if isinstance(error, ImportError):
        stores.refuse(uri, f"needs a driver: pip install {DRIVERS.get(str(error.name), error.name)}")
    stores.refuse(uri, f"cannot be used ({_reason(error)})")


def _reason(error: BaseException) -> str:
    """Return the root of an error in one short line without credentials."""
    text = str(error)
    for known in ("Connection refused", "timed out", "database or disk is full", "file is not a database", "is locked"):
        if known in text:
            return known
    return errors.redact((text.splitlines() or [type(error).__name__])[0])[:200]


# -------------------------------------------------------------------------------------------------- finding it again


def page(run_dir: Path) -> stores.Page | None:
    """Return where to see a run, from its run dir alone; None if MLflow has no page of it."""
    card = read_card(run_dir)
    uri = card.get("uri", stores.OFF)
    if uri == stores.OFF or card["run_id"] is None or stores.serverless(uri):
        return None
    number = card["experiment_id"]
    there = stores.page(uri, f"#/experiments/{number}/runs/{card['run_id']}/{CHARTS}")
    views_of_all = saved.links(there.link.partition("/#/")[0], number)
    return replace(there, more=tuple((name.rpartition(" ")[2], link) for name, link in views_of_all.items()))


def sync(run_dir: Path, uri: str | None = None) -> str:
    """Send MLflow what it lacks of a run; return one sentence. Asking twice sends nothing twice."""
    run_dir = run_dir.absolute()
    card = read_card(run_dir)
    if not card:
        raise ConfigError("RUN_DIR", str(run_dir), remedy=f"name the folder of a run; it has a {CARD}")
    uri = uri or card["uri"]
    if uri == stores.OFF or "***" in uri:
        raise ConfigError("--uri", None, remedy=f"required: {run_dir.name} was logged to {card['uri']}")
    stores.probe(uri)
    run = _Run(run_dir, uri, card)
    points = metrics.points(metrics.read(run_dir))
    files = [path for name in card["artifacts"] if (path := run_dir / name).exists()]
    try:
        with _turn(uri):
            run.connect()
            sent = run.send(points)
            for path in files:
                run.send_file(path)
            if card["status"] is not None:
                run.end(card["status"])
    except Exception as error:  # all become a sentence
        refused(uri, error)
    save_card(run_dir, {**card, "uri": errors.redact(uri)})
    return f"sent {sent} of {len(points)} points and {len(files)} artifacts of run {run.id} to {errors.redact(uri)}"


def _turn(uri: str) -> AbstractContextManager[Any]:
    """Wait for one's turn at a sqlite file, which takes one writer at a time."""
    database = stores.sqlite_file(uri)
    if database is None:
        return nullcontext()
    from filelock import FileLock

    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(database.with_name(f".{database.name}.sync.lock"), timeout=600)


def mark(run_dir: Path, tags: dict[str, str]) -> None:
    """Give a run more tags: in its card, and in MLflow where it is there already."""
    card = read_card(run_dir)
    new = {name: value for name, value in tags.items() if card.get("tags", {}).get(name) != value}
    if not card or not new:
        return
    save_card(run_dir, {**card, "tags": {**card["tags"], **new}})
    if card["run_id"] and (client := _client(card["uri"])):
        for name, value in new.items():
            client.set_tag(card["run_id"], name, value)


def views(outputs: Path, uri: str, experiments: Iterable[str], sweep: str) -> list[tuple[str, str]]:
    """Save a sweep's views, and tell how to open them: a command that serves the store, if none does, and links.

    The store and its experiments are made where they are not there yet, once and before any run writes to them.
    Best effort: a store that is away costs nothing but the links.
    """
    if uri == stores.OFF:
        return []
    there, links = stores.page(uri), list[str]()
    try:
        stores.probe(uri)
        for experiment in experiments:
            store = _Run(outputs / experiment, uri, {"experiment": experiment})
            number = store.reach()
            saved.save(store.client, number, sweep, saved.tag(sweep))
            links += saved.links(there.link, number, sweep).values()
    except Exception as error:  # of many kinds; nothing depends on it
        return [("mlflow", f"no links: {_reason(error)}")]
    return there.lines(*links)


def report(
    outputs: Path, uri: str, experiment: str, sweep: str, folder: Path, files: Iterable[Path]
) -> list[tuple[str, str]]:
    """Log the files of a sweep's report as artifacts of a run of its own, name it on the experiment's page, and tell where.

    Best effort, as `views`.
    """
    try:
        stores.probe(uri)
        store = _Run(outputs / experiment, uri, {"experiment": experiment})
        number, client = store.reach(), store.client
        known = client.search_runs([number], f"tags.`{REPORT}` = '{sweep}'", max_results=1)
        run = known[0] if known else client.create_run(number, run_name=f"report of {sweep}", tags={REPORT: sweep})
        for file in files:
            inside = file.relative_to(folder).parent
            client.log_artifact(run.info.run_id, str(file), None if inside == Path(".") else str(inside))
        client.set_terminated(run.info.run_id)
        there = stores.page(uri, _shown(number, run.info.run_id))
        client.set_experiment_tag(number, f"{saved.tag(sweep)}.report", run.info.run_id)
        _describe(client, number)
    except Exception as error:  # of many kinds; nothing depends on it
        return [("mlflow", f"the report is not there: {_reason(error)}")]
    return there.lines()


def _shown(experiment: str, run: str) -> str:
    """Where MLflow shows a report."""
    return f"#/experiments/{experiment}/runs/{run}/artifacts/index.html?workflowType=machine_learning"


def _describe(client: Any, experiment: str) -> None:
    """Link the reports of all sweeps in the description of an experiment, which its page shows; what else stands there stays."""
    tags = client.get_experiment(experiment).tags
    runs = {
        name.removeprefix("aem.sweep.").removesuffix(".report"): run
        for name, run in tags.items()
        if name.endswith(".report")
    }
    lines = [f"- [{sweep}]({_shown(experiment, run)})" for sweep, run in sorted(runs.items())]
    others = [part for part in tags.get(NOTE, "").split("\n\n") if part and not part.startswith(REPORTS)]
    client.set_experiment_tag(experiment, NOTE, "\n\n".join([*others, "\n".join([REPORTS, *lines])]))


def _client(uri: str) -> Any:
    """A client of a store that answers; None where it does not, or its credentials were not kept."""
    if uri == stores.OFF or "***" in uri:
        return None
    try:
        stores.probe(uri)
        client = _mlflow().MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception:  # of many kinds; nothing depends on it
        return None
    return client


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    return cli.answer(lambda: _act(_read(argv)))


def _read(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser("python -m aem_exp.tracking", description="Send MLflow what it lacks of runs.")
    verb = parser.add_subparsers(metavar="sync", required=True).add_parser("sync", help="rebuild runs in MLflow")
    verb.add_argument("run_dir", type=Path, nargs="+", help="run dirs, or a folder of them")
    verb.add_argument("--uri", help="the store, if not the one that the run was logged to")
    verb.add_argument("--reconcile", action="store_true", help="also end runs there that nobody is at any more")
    return parser.parse_args(argv)


def _act(asked: argparse.Namespace) -> int:
    uri = asked.uri and stores.resolve_uri(asked.uri, Path.cwd())
    runs = [run for folder in asked.run_dir for run in _runs(folder)]
    if asked.reconcile:
        _reconcile(runs)
    for run_dir in runs:
        print(sync(run_dir, uri), flush=True)
    return 0


def _runs(folder: Path) -> list[Path]:
    """A run dir, or those that lie in a folder."""
    inside = sorted(card.parent for card in folder.glob(f"*/{CARD}"))
    return inside if inside and not (folder / CARD).exists() else [folder]


def _reconcile(runs: Iterable[Path]) -> None:
    """Note the end of runs that were killed before they could: MLflow would show them as running for ever."""
    from aem_exp.cluster import run_state

    ends = {run_state.DONE: "FINISHED", run_state.FAILED: "FAILED", run_state.STOPPED: "KILLED"}
    for run_dir, found in run_state.read([run for run in runs if (run / CARD).exists()]).items():
        card = read_card(run_dir)
        if card["status"] is None and found.what in ends:
            save_card(run_dir, {**card, "status": ends[found.what]})


if __name__ == "__main__":
    sys.exit(main())
