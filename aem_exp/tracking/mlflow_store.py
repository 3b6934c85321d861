"""Opens an MLflow store, creates a sqlite store if it does not exist, and turns errors of a store into a ConfigError."""

import logging
import os
import re
import shlex
import shutil
import sqlite3
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from aem_exp.core import disk, errors, extras
from aem_exp.tracking import store_uri

DRIVERS = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


def require_mlflow() -> None:
    """Raise an error if MLflow is not installed."""
    extras.require_training("tracking", "mlflow", "the store", ["mlflow"])


def import_mlflow() -> Any:
    """Import MLflow (2 to 4 s), without its log output and with short timeouts, because the writer thread retries by itself."""
    require_mlflow()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # its errors become one sentence, see `raise_store_error`
    return mlflow


def import_store(uri: str) -> None:
    """Import the MLflow modules of a store in the caller's thread; imports in two threads can see incomplete modules."""
    import_mlflow()
    if not store_uri.is_remote(uri):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def create_sqlite(database: Path) -> None:
    """Create an MLflow store atomically. Many processes may call this at once; none of them opens an incomplete file."""
    if _is_created(database):
        return
    from filelock import FileLock

    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=300):
        if _is_created(database):
            return
        half = database.with_name(f".{database.name}.{os.getpid()}")
        try:
            shutil.copyfile(_template_database(), half)
            root = (database.parent / "mlruns" / "0").as_uri()
            with sqlite3.connect(half) as connection:
                connection.execute("UPDATE experiments SET artifact_location = ?", (root,))
            connection.close()
            half.replace(database)
        finally:
            half.unlink(missing_ok=True)


def _is_created(database: Path) -> bool:
    return database.exists() and database.stat().st_size > 0


def _template_database() -> Path:
    """Return an empty store, created once per machine and MLflow version: its migrations take seconds, a copy is instant."""
    version = import_mlflow().__version__
    cache = disk.cache_dir()
    template = cache / f"mlflow-{version}.db"
    if not _is_created(template):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        cache.mkdir(parents=True, exist_ok=True)
        half = cache / f".mlflow-{version}-{uuid4().hex}.db"
        try:
            SqlAlchemyStore(f"sqlite:///{half}", "mlruns").engine.dispose()
            half.replace(template)
        finally:
            half.unlink(missing_ok=True)
    return template


def check_database(uri: str) -> None:
    """Send one query to a database, to fail early; MLflow itself would retry for hours."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()


def raise_store_error(uri: str, error: Exception) -> NoReturn:
    """Raise a ConfigError that describes the error of a store."""
    if isinstance(error, errors.MissingResource):
        raise error
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        place = error.filename2 or error.filename  # of a copy, the second name is the target
        store_uri.refuse(
            uri, f"cannot be written ({error.strerror}: {place})", "free disk space or change the permissions there"
        )
    if "disk is full" in text:
        store_uri.refuse(uri, "cannot be written (the disk is full)", "free disk space and try again")
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", errors.redact(uri)])
        store_uri.refuse(uri, "was created by another version of MLflow", f"upgrade it with `{upgrade}`")
    if re.search(r"\b40[13]\b", text):
        store_uri.refuse(
            uri, "rejects these credentials", "set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if isinstance(error, ImportError):
        store_uri.refuse(uri, f"needs a driver: pip install {DRIVERS.get(str(error.name), error.name)}")
    store_uri.refuse(uri, f"cannot be used ({error_reason(error)})")


def error_reason(error: BaseException) -> str:
    """Return the cause of an error in one short line without credentials."""
    text = str(error)
    for known in ("Connection refused", "timed out", "database or disk is full", "file is not a database", "is locked"):
        if known in text:
            return known
    return errors.redact((text.splitlines() or [type(error).__name__])[0])[:200]


def lock_sqlite(uri: str) -> AbstractContextManager[Any]:
    """Return a lock of a sqlite store, which can have only one writer at a time."""
    database = store_uri.sqlite_file(uri)
    if database is None:
        return nullcontext()
    from filelock import FileLock

    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(database.with_name(f".{database.name}.sync.lock"), timeout=600)


def open_client(uri: str) -> Any:
    """Return a client of a store; None if the store does not answer, or if its credentials were not saved."""
    if uri == store_uri.OFF or "***" in uri:
        return None
    try:
        store_uri.probe(uri)
        client = import_mlflow().MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception:  # any error of MLflow; the caller works without a client
        return None
    return client
