"""Experiment tracking: metrics are written to `metrics.jsonl` in the run directory first and sent to MLflow by a
background thread, so an unavailable tracker never stops a run.

Nothing is logged twice, and `python -m aem_exp.tracking sync RUN_DIR` sends later what MLflow lacks. The only module that
imports MLflow.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from aem_exp.core import errors
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import metrics
from aem_exp.rundir.metrics import MetricsFile
from aem_exp.tracking import store_uri
from aem_exp.tracking.mlflow_store import _import_store, _reason, raise_store_error
from aem_exp.tracking.run_card import flatten_params, read_card, save_card
from aem_exp.tracking.sync import sync_run
from aem_exp.tracking.writer import MAX_PARAM_CHARS, MAX_TAG_CHARS, _redact_and_truncate, _RemoteRun, _Writer

FINISH_TIMEOUT = 10.0  # seconds that `finish` keeps trying while the tracker refuses


class Tracker:
    """A run's metrics and artifacts. A context manager: the run ends in MLflow as it ended."""

    def __init__(
        self, run_dir: Path, mirror: MetricsFile, card: dict[str, Any], writer: _Writer | None, later: bool = False
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
        `wait=False` makes a local store in the background; the caller calls `wait_until_ready` before the first step. A server
        is always waited for. Raises ConfigError where the tracker cannot be used.
        """
        run_dir = run_dir.absolute()
        if uri != store_uri.OFF:
            store_uri.probe(uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        card = {
            "key": uuid4().hex,
            "experiment_id": None,
            "run_id": None,
            **read_card(run_dir),
            "uri": errors.redact(uri),
            "experiment": experiment,
            "run_name": run_name,
            "params": _redact_and_truncate(flatten_params(params or {}), MAX_PARAM_CHARS),
            "tags": _redact_and_truncate(tags or {}, MAX_TAG_CHARS),
            "status": None,
            "artifacts": [],
        }
        save_card(run_dir, card)
        writer = None
        if uri != store_uri.OFF and live:
            _import_store(uri)
            writer = _Writer(_RemoteRun(run_dir, uri, card))
            writer.start()
            if wait or store_uri.sqlite_file(uri) is None:
                _wait_until_ready(writer)
        mirror = MetricsFile(run_dir, resume_step)
        if writer is not None:
            writer.put(metrics.points(mirror.rows))
        return cls(run_dir, mirror, card, writer, later=uri != store_uri.OFF and not live)

    def wait_until_ready(self) -> None:
        """Wait until MLflow has the run; a ConfigError says why it cannot."""
        if self._writer is not None:
            _wait_until_ready(self._writer)
            save_card(self.run_dir, self._card)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write metrics of a step: on disk when this returns, in MLflow seconds later. None is no value; NaN is one."""
        points = self._mirror.add(step, metrics)
        if self._writer is not None:
            self._writer.put(points)

    def log_artifact(self, path: Path) -> None:
        """Send a file or folder of the run dir to MLflow, now and with every `sync_run`."""
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
            self._writer.close(status, FINISH_TIMEOUT)
            self._writer.join()
            self.trouble = None if self._writer.idle else _describe_trouble(self._writer)
        self._mirror.sync()
        self._mirror.file.close()
        self._card["status"] = status
        save_card(self.run_dir, self._card)
        if self._later and status != "KILLED":  # who is killed has no time, and will go on
            self.trouble = _sync_or_explain(self.run_dir)
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


class NullTracker:
    """The tracker of all processes of a run but the first, which speaks for them."""

    trouble: str | None = None

    def wait_until_ready(self) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def flush(self, wait: float = 0.0) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def _wait_until_ready(writer: _Writer) -> None:
    writer.tried.wait()
    if writer.error is not None and not writer.remote.id:
        writer.close("FAILED", patience=0.0)
        raise_store_error(writer.remote.uri, writer.error)


def _sync_or_explain(run_dir: Path) -> str | None:
    """Send a whole run; one sentence where that fails."""
    try:
        sync_run(run_dir)
    except ConfigError as error:
        return _incomplete_message(run_dir, read_card(run_dir)["uri"], str(error))
    return None


def _describe_trouble(writer: _Writer) -> str:
    why = "it is slow" if writer.error is None else _reason(writer.error)
    return _incomplete_message(writer.remote.run_dir, errors.redact(writer.remote.uri), why)


def _incomplete_message(run_dir: Path, store: str, why: str) -> str:
    command = shlex.join([sys.executable, "-m", "aem_exp.tracking", "sync", str(run_dir)])
    return f"MLflow at {store} lacks part of this run ({why}); nothing is lost, send it with: {command}"
