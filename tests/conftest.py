"""Settings of all tests, and shared fixtures."""

import gc
import json
import os
import signal
import subprocess
import sys

from support import process_settings  # noqa: F401  (before all other imports)

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell with `&` sets this; processes of the tests must receive Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from filelock import FileLock
from hypothesis import settings
from support.runs import SMALL_RUN, find_run_dir, run_command, skip_or_fail, weights_moved


def pytest_xdist_auto_num_workers(config):
    """The whole suite runs in three processes, as tests of clusters and servers mostly wait; anything less runs in this one."""
    whole = config.args_source == config.ArgsSource.TESTPATHS and config.option.markexpr != "fast"
    return 3 if whole else 0


settings.register_profile("tests", deadline=None)  # a busy machine may take long over any example
settings.load_profile("tests")

TRAINED = {"unbroken", "trained", "first_execution"}  # fixtures that train a policy in a process of its own


def pytest_itemcollected(item):
    """A test with an expensive fixture is in the slow lane; every test without another lane is in the fast lane."""
    if TRAINED & set(getattr(item, "fixturenames", ())):
        item.add_marker("slow")
    if not any(item.get_closest_marker(name) for name in ("slow", "machine", "real")):
        item.add_marker("fast")


def pytest_collection_finish():
    """Keep the imported libraries out of garbage collection: accelerate collects after each training, which would take 0.3 s."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Start files with slow tests first, so that they run in parallel with the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder that all workers share: the first worker that needs an expensive result makes it there."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(common):
    """The cache of policies ($AEM_CACHE) of all workers."""
    return common / "cache"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM cluster for the tests of one worker; with $AEM_REQUIRE_ALL=1, a missing one is a failure."""
    from support.slurm_cluster import Cluster, missing

    if why := missing():
        skip_or_fail(why)
    started = Cluster.start(tmp_path_factory.mktemp("slurm") / "c")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def unbroken(cache, common):
    """A small run without interruptions, and its finished process; tests read it and do not change it."""
    outputs, record = common / "unbroken", common / "process.json"
    with FileLock(common / "lock"):
        if not record.exists():
            done = run_command(cache, outputs, *SMALL_RUN)
            assert done.returncode == 0, done.stderr
            assert weights_moved(find_run_dir(outputs))
            record.write_text(json.dumps({"args": [], "returncode": 0, "stdout": done.stdout, "stderr": done.stderr}))
    return find_run_dir(outputs), subprocess.CompletedProcess(**json.loads(record.read_text()))


@pytest.fixture
def no_mlflow(unbroken, monkeypatch):
    """No MLflow, whose import takes 4 s per process. The run of `unbroken` is made with it in any case."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """An empty current folder, no folders from the environment, and sys.path restored afterwards."""
    for name in ("AEM_OUTPUTS", "AEM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
