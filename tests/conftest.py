"""One thread (two are up to 15 times slower on a busy machine), no network, and a toy world whose returns always differ."""

import gc
import json
import os
import subprocess
import sys

os.environ.update(
    OMP_NUM_THREADS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
from doors import SMALL, door, folder_of, moved
from filelock import FileLock


def pytest_collection_finish():
    """accelerate collects garbage after each training: a third of a second if it looks through all of torch and TRL."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of all workers, and a lock: what is dear is made by the first of them that wants it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(shared):
    return shared / "cache"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM, for the tests of one worker; $AEM_REQUIRE_ALL=1 makes a missing one a failure."""
    from cluster import Cluster, missing

    if why := missing():
        (pytest.fail if os.environ.get("AEM_REQUIRE_ALL") == "1" else pytest.skip)(why)
    started = Cluster.start(tmp_path_factory.mktemp("slurm") / "c")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def unbroken(cache, shared):
    """A small run from its beginning to its end, and what it said; to be read, not changed."""
    outputs, said = shared / "unbroken", shared / "said.json"
    with FileLock(shared / "lock"):
        if not said.exists():
            done = door(cache, outputs, *SMALL)
            assert done.returncode == 0, done.stderr
            assert moved(folder_of(outputs))
            said.write_text(json.dumps({"args": [], "returncode": 0, "stdout": done.stdout, "stderr": done.stderr}))
    return folder_of(outputs), subprocess.CompletedProcess(**json.loads(said.read_text()))


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No folder of the machine takes part; sys.path is left as it was."""
    for name in ("AEM_OUTPUTS", "AEM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
