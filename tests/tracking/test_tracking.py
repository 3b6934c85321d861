"""Metrics in metrics.jsonl and MLflow: nothing is lost or logged twice if a process or server dies. Real stores and kills."""

import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_runs import (
    LOG_IN_PARALLEL,
    METRIC_NAMES,
    MLflowServer,
    all_steps,
    local_store,
    open_tracker,
    read_mlflow_run,
    run_script,
    step_metrics,
)

from aem_exp.core import disk, errors
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import metrics
from aem_exp.tracking import command as tracking
from aem_exp.tracking import mlflow_store, publish, run_card, store_uri, sync, writer
from aem_exp.tracking.tracker import Tracker


@pytest.fixture
def no_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


pytestmark = pytest.mark.usefixtures("no_uri")


# --------------------------------------------------------------------------------------------------------- one run


@pytest.mark.slow
def test_run_is_complete_on_disk_and_in_mlflow(tmp_path: Path) -> None:
    outputs, run_dir = tmp_path / "a folder", tmp_path / "a folder" / "run"
    uri = local_store(outputs)
    params = {
        "trainer": {"learning_rate": 1e-3, "long": "x" * 9000},
        "model": {"path": None},
        "tracking": "http://u:pw@h",
    }
    tags = {"aem.group": "grpo+aem", "git.commit": "abc+"}
    with Tracker.open(run_dir, uri, "house hold/1", "grpo+aem/s0", params, tags) as tracker:
        tracker.log(0, {"eval/pass@1": 0.25})
        tracker.log(1, {"train/success": 0.5, "train/loss": math.nan, "train/none": None})
        tracker.log(1, {"eval/pass@1": 0.5, "train/success": 0.9})
        (run_dir / "plots").mkdir()
        (run_dir / "plots" / "a.png").write_bytes(b"png")
        tracker.log_artifact(run_dir / "plots" / "a.png")
        tracker.log_artifact(run_dir / "tracking.json")
    assert tracker.trouble is None
    first, second = metrics.read(run_dir)
    assert first.pop(metrics.LOGGED_AT) <= second.pop(metrics.LOGGED_AT)
    assert first == {"step": 0, "eval/pass_at_1": 0.25}
    assert math.isnan(second.pop("train/loss"))
    assert second == {"step": 1, "train/success": 0.5, "eval/pass_at_1": 0.5}, "the first value of a metric is kept"

    run = read_mlflow_run(uri, run_dir)
    assert run.steps == {"eval/pass_at_1": [0, 1], "train/success": [1], "train/loss": [1]}
    assert math.isnan(run.data.metrics["train/loss"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "grpo+aem/s0"
    assert run.data.params["trainer.learning_rate"] == "0.001"
    assert run.data.params["model.path"] == "null"
    assert len(run.data.params["trainer.long"]) == writer.MAX_PARAM_CHARS
    assert run.data.params["tracking"] == "http://***@h"
    assert run.data.tags.items() >= {*tags.items(), ("mlflow.source.git.commit", "abc"), ("aem.run_dir", str(run_dir))}
    artifacts = Path(urllib.request.url2pathname(run.info.artifact_uri.removeprefix("file://")))
    assert artifacts.is_relative_to(outputs / "mlruns")
    assert sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*")) == [
        "plots/a.png",
        "tracking.json",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError(), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_status_in_mlflow_is_that_of_the_run(tmp_path: Path, error: BaseException | None, status: str) -> None:
    try:
        with open_tracker(tmp_path / "run", local_store(tmp_path)) as tracker:
            tracker.log(1, step_metrics(1))
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    run = read_mlflow_run(local_store(tmp_path), tmp_path / "run")
    assert (run.info.status, run.steps["train/success"]) == (status, [1])
    assert run_card.read_card(tmp_path / "run")["status"] == status


@pytest.mark.slow
def test_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    uri, run_dir = local_store(tmp_path), tmp_path / "run"
    with open_tracker(run_dir, uri) as tracker:
        for step in range(1, 8):
            tracker.log(step, step_metrics(step))
        assert tracker.flush(wait=30)
    with open_tracker(run_dir, uri, resume_step=5) as tracker:
        assert [row["step"] for row in metrics.read(run_dir)] == [1, 2, 3, 4, 5]
        for step in range(6, 11):
            tracker.log(step, step_metrics(step) | ({"eval/success": 1.0} if step == 6 else {}))
    run = read_mlflow_run(uri, run_dir)
    assert [row["step"] for row in metrics.read(run_dir)] == list(range(1, 11))
    assert {name: run.steps[name] for name in METRIC_NAMES} == all_steps(list(range(1, 11)))
    assert run.steps["eval/success"] == [6], "a new metric of a step that MLflow has already"
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_run_that_restarts_without_a_checkpoint_keeps_its_mlflow_run(tmp_path: Path) -> None:
    uri, run_dir = local_store(tmp_path), tmp_path / "run"
    for _ in range(2):
        with open_tracker(run_dir, uri) as tracker:
            tracker.log(1, step_metrics(1))
    assert read_mlflow_run(uri, run_dir).steps["train/success"] == [1]
    (run_dir / "mlflow_run_id").unlink()  # as if the process was killed before it wrote the file
    with open_tracker(run_dir, uri, resume_step=1) as tracker:
        tracker.log(2, step_metrics(2))
    assert read_mlflow_run(uri, run_dir).steps["train/success"] == [1, 2]


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    with open_tracker(tmp_path, store_uri.OFF) as tracker:
        for step in (1, 2):
            tracker.log(step, step_metrics(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/succ')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    with open_tracker(tmp_path, store_uri.OFF, resume_step=2) as tracker:
        tracker.log(3, step_metrics(3))
        assert tracker.flush()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    assert publish.run_page(tmp_path) is None


def test_steps_must_increase(tmp_path: Path) -> None:
    with open_tracker(tmp_path, store_uri.OFF) as tracker:
        tracker.log(2, step_metrics(2))
        with pytest.raises(AssertionError, match="step 1 after step 2"):
            tracker.log(1, step_metrics(1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_raises_an_error(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, store_uri.OFF)
    tracker.metrics_file.file = Path("/dev/full").open("r+b")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        tracker.log(1, step_metrics(1))


FILL_DISK = """
    import sys
    from pathlib import Path
    from aem_exp.core import cli, console; from aem_exp.tracking import store_uri, tracker
    from support.mlflow_runs import open_tracker, step_metrics
    tracker.FINISH_TIMEOUT = 1.0
    console.silence_libraries()
    run_dir, filler = Path(sys.argv[1]), Path(sys.argv[2])
    def act():
        with open_tracker(run_dir, store_uri.resolve_uri(None, run_dir.parent)) as tracker:
            for step in range(1, 4):
                tracker.log(step, step_metrics(step))
            assert tracker.flush(wait=600)
            with filler.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(b"x" * 4096)
                    except OSError:
                        break
            for step in range(4, 100_000):
                tracker.log(step, step_metrics(step))
        return 0
    sys.exit(cli.run_cli(act, lambda: "to continue: COMMAND"))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    from support.runs import skip_or_fail  # not at module level, because scripts import this file

    folder = tmp_path / "disk"
    folder.mkdir()
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*root, "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which(mount[0]) or subprocess.run(mount, capture_output=True, check=False).returncode:
        skip_or_fail("mounting a small disk needs root")
    yield folder
    subprocess.run([*root, "umount", "-l", str(folder)], check=True)  # lazy, because a store may be open


@pytest.mark.machine
def test_full_disk_is_an_error_of_one_line_and_keeps_written_rows(tmp_path: Path, small_disk: Path) -> None:
    run_dir, filler = small_disk / "outputs" / "run", small_disk / "filler"
    done = run_script(FILL_DISK, str(run_dir), str(filler))
    assert done.returncode == 1
    assert done.stdout == ""
    (error,) = done.stderr.splitlines()
    assert "disk is full" in error and "to continue: COMMAND" in error
    assert not list(run_dir.glob(".*")), "incomplete files must be removed"
    rows = metrics.read(run_dir)
    assert [row["step"] for row in rows[:3]] == [1, 2, 3]
    last = int(rows[-1]["step"])

    filler.unlink()
    uri = local_store(run_dir.parent)
    with open_tracker(run_dir, uri, resume_step=last) as tracker:
        tracker.log(last + 1, step_metrics(last + 1))
    assert tracker.trouble is None
    steps = list(range(1, last + 2))
    assert [row["step"] for row in metrics.read(run_dir)] == steps
    assert read_mlflow_run(uri, run_dir).steps == all_steps(steps)


@pytest.mark.machine
@pytest.mark.parametrize("free", [0, 700_000])
def test_store_on_a_full_disk_is_an_error(tmp_path: Path, small_disk: Path, free: int) -> None:
    with open_tracker(tmp_path / "run", store_uri.OFF) as tracker:
        for step in range(2000):
            tracker.log(step, step_metrics(step))
    with (small_disk / "filler").open("wb") as file:
        file.write(b"x" * (shutil.disk_usage(small_disk).free - free))
    uri = f"sqlite:///{small_disk / 'mlflow.db'}"
    with pytest.raises(ConfigError) as error:
        sync.sync_run(tmp_path / "run", uri)
    assert (error.value.field, error.value.value) == ("tracking", uri)
    assert "cannot be written" in error.value.remedy and "space" in error.value.remedy
    assert str(disk.cache_dir()) not in error.value.remedy and "\n" not in error.value.remedy


# ------------------------------------------------------------------------------------------- many runs, killed runs


KILL_AFTER_17_STEPS = """
    import os, signal, sys
    from pathlib import Path
    from support.mlflow_runs import open_tracker, step_metrics
    run_dir, uri = Path(sys.argv[1]), sys.argv[2]
    tracker = open_tracker(run_dir, uri)
    for step in range(1, 18):
        tracker.log(step, step_metrics(step))
        if step == 14:
            assert tracker.flush(wait=600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_run_resumes_without_loss(tmp_path: Path) -> None:
    uri, run_dir = local_store(tmp_path), tmp_path / "run"
    killed = run_script(KILL_AFTER_17_STEPS, str(run_dir), uri)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in metrics.read(run_dir)] == list(range(1, 18))
    left = read_mlflow_run(uri, run_dir)
    assert left.info.status == "RUNNING"
    assert left.steps["train/success"][:14] == list(range(1, 15))
    with open_tracker(run_dir, uri, resume_step=10) as tracker:
        for step in range(11, 21):
            tracker.log(step, step_metrics(step))
    run = read_mlflow_run(uri, run_dir)
    assert run.info.run_id == left.info.run_id
    assert run.info.status == "FINISHED"
    assert run.steps == all_steps(list(range(1, 21)))
    assert [row["step"] for row in metrics.read(run_dir)] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mode"), [(8, "live"), (50, "later")])
def test_many_runs_start_at_once_on_a_new_store(tmp_path: Path, count: int, mode: str) -> None:
    """Mode `later`: a run sends everything at its end, one process at a time, as jobs do with a sqlite store."""
    done = run_script(LOG_IN_PARALLEL, str(tmp_path / "outputs"), str(count), mode, AEM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    runs = [
        read_mlflow_run(local_store(tmp_path / "outputs"), tmp_path / "outputs" / f"run{index}")
        for index in range(count)
    ]
    assert len({run.info.run_id for run in runs}) == count
    assert all(run.data.params == {"seed": "0"} for run in runs)
    assert len({run.info.experiment_id for run in runs}) == 1
    assert all(run.steps == all_steps([1, 2, 3]) for run in runs)
    assert all(run.info.status == "FINISHED" for run in runs)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MLflowServer]:
    uri = local_store(tmp_path)
    with open_tracker(tmp_path / "earlier", uri) as tracker:  # creates the store
        tracker.log(1, step_metrics(1))
    server = MLflowServer(uri, tmp_path)
    yield server
    server.close()


@pytest.mark.slow
def test_nothing_is_lost_if_a_server_hangs_and_dies(
    tmp_path: Path, server: MLflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("aem_exp.tracking.tracker.FINISH_TIMEOUT", 2.0)
    direct, run_dir = local_store(tmp_path), tmp_path / "run"
    server.wait()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    tracker = open_tracker(run_dir, server.uri)
    tracker.log_artifact(run_dir / "tracking.json")
    for step in range(1, 21):
        tracker.log(step, step_metrics(step))
    assert tracker.flush(wait=600)

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.signal(signal.SIGSTOP)
    for step in range(21, 31):
        tracker.log(step, step_metrics(step))
    assert not tracker.flush(wait=1.5), (
        "requests time out; the server answers some of them later, and they are sent again"
    )
    server.signal(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    assert tracker.flush(wait=600)
    assert read_mlflow_run(direct, run_dir).steps == all_steps(list(range(1, 31)))

    server.signal(signal.SIGKILL)
    start = time.monotonic()
    for step in range(31, 41):
        tracker.log(step, step_metrics(step))
    assert time.monotonic() - start < 20, (
        "training must not wait for the server (a deadline 10 times above the usual time)"
    )
    sentence = tracker.finish()
    assert sentence is not None
    assert "\n" not in sentence
    assert shlex.split(sentence.rpartition(": ")[2])[1:] == ["-m", "aem_exp.tracking", "sync", str(run_dir)]
    assert [row["step"] for row in metrics.read(run_dir)] == list(range(1, 41))
    assert read_mlflow_run(direct, run_dir).info.status == "RUNNING"

    for _ in range(2):  # the second call has nothing to send
        monkeypatch.setattr(sys, "argv", ["tracking", "sync", str(run_dir), "--uri", direct])
        assert tracking.main() == 0
        run = read_mlflow_run(direct, run_dir)
        assert run.steps == all_steps(list(range(1, 41)))
        assert run.info.status == "FINISHED"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" points")[0] for line in lines] == ["sent 30 of 120", "sent 0 of 120"]

    elsewhere = f"sqlite:///{tmp_path / 'elsewhere' / 'mlflow.db'}"
    sync.sync_run(run_dir, elsewhere)
    copy = read_mlflow_run(elsewhere, run_dir)
    assert copy.steps == run.steps
    assert copy.data.params == run.data.params
    assert copy.info.run_name == run.info.run_name


# -------------------------------------------------------------------------------------------------------- unusable stores


def open_with_error(uri: str, run_dir: Path, seconds: float = 60) -> ConfigError:
    """Open a tracker that cannot be used, and return its error."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        open_tracker(run_dir, uri)
    assert time.monotonic() - start < seconds
    assert error.value.field == "tracking"
    assert "sqlite:///" in error.value.remedy and "off" in error.value.remedy, "the remedy lists the choices"
    assert "\n" not in error.value.remedy
    return error.value


def test_server_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for uri in (f"http://me:secret@127.0.0.1:{port}", f"postgresql://me:secret@127.0.0.1:{port}/db"):
        error = open_with_error(uri, tmp_path / "run")
        assert error.value == errors.redact(uri) and "does not answer" in error.remedy
        assert "secret" not in str(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_server_that_rejects_or_never_answers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    class Unauthorized(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Unauthorized)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    assert "MLFLOW_TRACKING_TOKEN" in open_with_error(f"http://127.0.0.1:{http.server_port}", tmp_path / "a").remedy
    http.shutdown()
    http.server_close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "timed out" in open_with_error(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "b").remedy


def test_unusable_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    assert "not a database" in open_with_error(f"sqlite:///{tmp_path}/text.db", tmp_path / "a").remedy
    assert (
        "cannot be written" in open_with_error(f"sqlite:///{tmp_path}/text.db/below/mlflow.db", tmp_path / "b").remedy
    )
    for uri in ("file:///tmp/mlruns", "/tmp/mlruns", "gopher://host", "sqlite://"):
        with pytest.raises(ConfigError) as error:
            store_uri.resolve_uri(uri, tmp_path)
        assert (error.value.field, error.value.value) == ("tracking", uri)


def test_store_of_another_mlflow_version_shows_the_upgrade_command(tmp_path: Path) -> None:
    import sqlite3

    database = tmp_path / "mlflow.db"
    mlflow_store.create_sqlite(database)
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    assert "db upgrade" in open_with_error(local_store(tmp_path), tmp_path / "run").remedy


def test_local_store_is_created_in_the_background(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    tracker = open_tracker(tmp_path / "a", f"sqlite:///{tmp_path}/text.db", wait=False)
    tracker.log(0, step_metrics(0))
    with pytest.raises(ConfigError, match=r"^tracking=.*not a database"):
        tracker.wait_until_ready()
    with open_tracker(tmp_path / "b", local_store(tmp_path), wait=False) as tracker:
        tracker.log(0, step_metrics(0))
        tracker.wait_until_ready()
    assert read_mlflow_run(local_store(tmp_path), tmp_path / "b").steps["train/success"] == [0]


@pytest.mark.slow
def test_locked_store_is_waited_for_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, busy = writer.RemoteRun.connect, ["(sqlite3.OperationalError) database is locked"]

    def connect_when_unlocked(run: writer.RemoteRun) -> None:
        if busy:
            raise RuntimeError(busy.pop())
        connect(run)

    monkeypatch.setattr(writer.RemoteRun, "connect", connect_when_unlocked)
    with open_tracker(tmp_path / "run", local_store(tmp_path)) as tracker:
        tracker.log(1, step_metrics(1))
    assert not busy
    assert read_mlflow_run(local_store(tmp_path), tmp_path / "run").steps == all_steps([1])


def test_sync_of_a_folder_without_a_store_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_tracker(tmp_path / "run", store_uri.OFF):
        pass
    for folder in ("nothing", "run"):
        monkeypatch.setattr(sys, "argv", ["tracking", "sync", str(tmp_path / folder)])
        assert tracking.main() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"RUN_DIR={tmp_path / 'nothing'}: " in first
    assert "--uri=null: " in second


# ----------------------------------------------------------------------------------------------- names and addresses


def test_sanitised_names_are_valid_in_mlflow() -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert metrics.sanitise_name("eval/pass@1") == "eval/pass_at_1"
    assert metrics.sanitise_name("train/success") == "train/success"
    for name in ("a//b", "/a", "../a", "a/./b", "é", "x<lambda>", "a b:c.d-e", "time/λ", "x" * 400, "a=b;c"):
        _validate_metric_name(metrics.sanitise_name(name))


def test_credentials_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.redact("see http://me:pw@host:5/x and b") == "see http://***@host:5/x and b"
    assert (
        errors.redact("postgresql+psycopg2://me:p@ss@h/db?password=hm&x=1")
        == "postgresql+psycopg2://***@h/db?password=***&x=1"
    )
    assert errors.redact("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    assert errors.redact("error: hunter22") == "error: ***"
    with open_tracker(tmp_path, store_uri.OFF) as tracker:
        tracker.log(1, step_metrics(1))
    run_card.save_card(
        tmp_path, {**run_card.read_card(tmp_path), "run_id": "r", "experiment_id": "1", "uri": "http://***@h:80"}
    )
    page = publish.run_page(tmp_path)
    assert page is not None
    assert page.link.startswith("http://h:80/#/experiments/1/runs/r/")
    assert page.command is None


def test_resolve_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri.resolve_uri(None, Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert store_uri.resolve_uri("sqlite:///a.db", Path("out")) == f"sqlite:///{tmp_path}/a.db"
    assert store_uri.resolve_uri("a.db", Path("out")) == f"sqlite:///{tmp_path}/a.db"
    assert store_uri.resolve_uri("https://host/mlflow", Path("out")) == "https://host/mlflow"
    assert store_uri.resolve_uri("off", Path("out")) == store_uri.OFF
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:1")
    assert store_uri.resolve_uri(None, Path("out")) == "http://host:1"


def test_page_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 2222")
    card = {"uri": local_store(tmp_path / "a b"), "run_id": "r", "experiment_id": "1"}
    (tmp_path / "tracking.json").write_text(json.dumps(card))
    page = publish.run_page(tmp_path)
    assert page is not None
    assert page.command is not None
    words = shlex.split(page.command)
    assert words[words.index("ui") + 1 :][:2] == ["--uri", str(tmp_path / "a b" / "mlflow.db")]
    port = words[words.index("--port") + 1] if "--port" in words else "5000"
    assert page.link.startswith(f"http://127.0.0.1:{port}/#/experiments/1/runs/r/")
    assert page.tunnel is not None
    assert page.tunnel.startswith(f"ssh -N -L {port}:127.0.0.1:{port} -p 2222 ")
    assert page.tunnel.endswith("@10.0.0.1")


def test_flatten_params() -> None:
    nested = {"a": {"b": 1e-3, "c": {}}, "d": [1, None], "e": True, "f@": "x"}
    assert run_card.flatten_params(nested) == {"a.b": "0.001", "a.c": "{}", "d": "[1, null]", "e": "true", "f_at_": "x"}


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    names = "{'mlflow', 'matplotlib', 'rich'}"
    code = f"import sys, aem_exp.tracking.tracker, aem_exp.run.summary; sys.exit(bool({names} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
