"""Experiment tracking: metrics are first written to `metrics.jsonl` in the run directory. A background thread sends them to
MLflow, so an unavailable server never stops a run.

Nothing is logged twice. `python -m aem_exp.tracking sync RUN_DIR` sends later what MLflow lacks.
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
from aem_exp.tracking.mlflow_store import error_reason, import_store, raise_store_error
from aem_exp.tracking.run_card import flatten_params, read_card, save_card
from aem_exp.tracking.sync import sync_run
from aem_exp.tracking.writer import MAX_PARAM_CHARS, MAX_TAG_CHARS, RemoteRun, Writer, redact_and_truncate

FINISH_TIMEOUT = 10.0  # seconds that `finish` retries if the store does not answer


class Tracker:
    """Logs the metrics and artifacts of a run. Use it as a context manager: MLflow gets the status with which the block ends.

    `trouble`: at the end, a sentence if MLflow did not receive all of the run.
    """

    def __init__(
        self, run_dir: Path, metrics_file: MetricsFile, card: dict[str, Any], writer: Writer | None, later: bool = False
    ) -> None:
        self._later = later
        self.run_dir, self.metrics_file, self._card, self._writer = run_dir, metrics_file, card, writer
        self._finished = False
        self.trouble: str | None = None

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
        """Start or continue the log of a run.

        Args:
            resume_step: rows after this step are removed, because they are measured again; None removes all rows.
            wait: wait until the store has the run. With False, a sqlite store is created in the background, and the caller
                calls `wait_until_ready` before the first step. A server is always waited for.
            live: send metrics during the run. With False, everything is sent at the end, one process at a time, so that
                many machines do not write to one sqlite file.

        Raises:
            ConfigError: the store cannot be used.
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
            "params": redact_and_truncate(flatten_params(params or {}), MAX_PARAM_CHARS),
            "tags": redact_and_truncate(tags or {}, MAX_TAG_CHARS),
            "status": None,
            "artifacts": [],
        }
        save_card(run_dir, card)
        writer = None
        if uri != store_uri.OFF and live:
            import_store(uri)
            writer = Writer(RemoteRun(run_dir, uri, card))
            writer.start()
            if wait or store_uri.sqlite_file(uri) is None:
                _wait_until_ready(writer)
        metrics_file = MetricsFile(run_dir, resume_step)
        if writer is not None:
            writer.put(metrics.points(metrics_file.rows))
        return cls(run_dir, metrics_file, card, writer, later=uri != store_uri.OFF and not live)

    def wait_until_ready(self) -> None:
        """Wait until MLflow has the run.

        Raises:
            ConfigError: the store cannot be used.
        """
        if self._writer is not None:
            _wait_until_ready(self._writer)
            save_card(self.run_dir, self._card)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics of a step: to disk at once, to MLflow some seconds later. None values are skipped, NaNs are logged."""
        points = self.metrics_file.add(step, metrics)
        if self._writer is not None:
            self._writer.put(points)

    def log_artifact(self, path: Path) -> None:
        """Send a file or folder of the run directory to MLflow, now and with every `sync_run`."""
        path = path.absolute()
        name = str(path.relative_to(self.run_dir)) if path.is_relative_to(self.run_dir) else str(path)
        if name not in self._card["artifacts"]:
            self._card["artifacts"].append(name)
            save_card(self.run_dir, self._card)
        if self._writer is not None:
            self._writer.put(files=[path])

    def flush(self, wait: float = 0.0) -> bool:
        """Flush all rows to disk, as before a checkpoint; return whether MLflow has them too after at most `wait` seconds."""
        self.metrics_file.sync()
        if self._writer is None:
            return True
        self._writer.put(urgent=True)
        return self._writer.wait_idle(wait)

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the run (FINISHED, FAILED or KILLED); return `trouble`."""
        if self._finished:
            return self.trouble
        self._finished = True
        if self._writer is not None:  # before the writes to disk, which fail if the disk is full
            self._writer.close(status, FINISH_TIMEOUT)
            self._writer.join()
            self.trouble = None if self._writer.idle else _describe_trouble(self._writer)
        self.metrics_file.sync()
        self.metrics_file.file.close()
        self._card["status"] = status
        save_card(self.run_dir, self._card)
        if self._later and status != "KILLED":  # a killed run has no time for this, and may be resumed
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
    """The tracker of all processes of a run except the first: it logs nothing."""

    trouble: str | None = None

    def wait_until_ready(self) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def flush(self, wait: float = 0.0) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def _wait_until_ready(writer: Writer) -> None:
    writer.tried.wait()
    if writer.error is not None and not writer.remote.id:
        writer.close("FAILED", patience=0.0)
        raise_store_error(writer.remote.uri, writer.error)


def _sync_or_explain(run_dir: Path) -> str | None:
    """Send a whole run; return a sentence if that fails."""
    try:
        sync_run(run_dir)
    except ConfigError as error:
        return _incomplete_message(run_dir, read_card(run_dir)["uri"], str(error))
    return None


def _describe_trouble(writer: Writer) -> str:
    why = "the store is slow" if writer.error is None else error_reason(writer.error)
    return _incomplete_message(writer.remote.run_dir, errors.redact(writer.remote.uri), why)


def _incomplete_message(run_dir: Path, store: str, why: str) -> str:
    command = shlex.join([sys.executable, "-m", "aem_exp.tracking", "sync", str(run_dir)])
    return f"MLflow at {store} did not receive all of this run ({why}). Nothing is lost; to send the rest: {command}"
