"""Fifty runs that log at the same time to an MLflow server on PostgreSQL, as recommended for a cluster."""

import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mlflow_runs import LOG_IN_PARALLEL, MLflowServer, all_steps, read_mlflow_run, run_script
from support.runs import skip_or_fail, wait_until

RUNS = 50
BIN = max(glob.glob("/usr/lib/postgresql/*/bin"), default="")

pytestmark = [pytest.mark.machine, pytest.mark.slow]


@pytest.fixture
def database() -> Iterator[str]:
    """Start a new PostgreSQL server that listens on a socket in its own folder; yield the URI of its database."""
    if not shutil.which("initdb", path=BIN):
        skip_or_fail("PostgreSQL is missing: apt-get install -y --no-install-recommends postgresql")
    folder = Path(tempfile.mkdtemp(prefix="aem-postgres-"))
    as_user = []  # PostgreSQL refuses to run as root
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data = ["-D", str(folder / "data")]
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [*as_user, f"{BIN}/initdb", *data, "-A", "trust", "-U", "postgres", "--no-sync"], check=True, **options
    )
    settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    process = subprocess.Popen([*as_user, f"{BIN}/postgres", *data, *settings], **options)

    def ready():
        assert process.poll() is None
        return not subprocess.run([f"{BIN}/pg_isready", "-q", "-h", str(folder)], check=False).returncode

    wait_until(ready, "PostgreSQL")
    yield f"postgresql+psycopg2:///postgres?host={folder}&user=postgres"
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowServer]:
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "20")
    server = MLflowServer(database, tmp_path)
    server.wait()
    yield server
    server.close()


def test_fifty_parallel_runs_are_complete(
    tmp_path: Path, server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    done = run_script(LOG_IN_PARALLEL, str(tmp_path / "outputs"), str(RUNS), "live")
    assert done.returncode == 0, done.stderr
    runs = [read_mlflow_run(server.uri, tmp_path / "outputs" / f"run{index}") for index in range(RUNS)]
    assert len({run.info.run_id for run in runs}) == RUNS
    assert len({run.info.experiment_id for run in runs}) == 1
    assert all(run.data.params == {"seed": "0"} for run in runs)
    assert all(run.steps == all_steps([1, 2, 3]) for run in runs)
    assert all(run.info.status == "FINISHED" for run in runs)
