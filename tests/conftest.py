"""One thread (two are up to 15 times slower on a busy machine), no network, and a toy world whose returns always differ."""

import gc
import json
import os
import signal
import subprocess
import sys

os.environ.update(
    OMP_NUM_THREADS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by a shell with `&`; what tests start must hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from filelock import FileLock
from support.runs import SMALL_RUN, find_run_dir, run_command, skip_or_fail, weights_moved


def pytest_collection_finish():
    """accelerate collects garbage after each training: a third of a second if it looks through all of torch and TRL."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files that wait for clusters begin first, or the last of them would wait alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder of all workers: what is dear is made there once, by the first of them that wants it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(common):
    return common / "cache"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM, for the tests of one worker; $AEM_REQUIRE_ALL=1 makes a missing one a failure."""
    from support.slurm_cluster import Cluster, missing

    if why := missing():
        skip_or_fail(why)
    started = Cluster.start(tmp_path_factory.mktemp("slurm") / "c")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def unbroken(cache, common):
    """A small run from its beginning to its end, and what it said; to be read, not changed."""
    outputs, said = common / "unbroken", common / "said.json"
    with FileLock(common / "lock"):
        if not said.exists():
            done = run_command(cache, outputs, *SMALL_RUN)
            assert done.returncode == 0, done.stderr
            assert weights_moved(find_run_dir(outputs))
            said.write_text(json.dumps({"args": [], "returncode": 0, "stdout": done.stdout, "stderr": done.stderr}))
    return find_run_dir(outputs), subprocess.CompletedProcess(**json.loads(said.read_text()))


@pytest.fixture
def no_mlflow(unbroken, monkeypatch):
    """For tests that are not about MLflow: its import takes 4 s a start. The unbroken run has it all the same."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No folder of the machine takes part; sys.path is left as it was."""
    for name in ("AEM_OUTPUTS", "AEM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
