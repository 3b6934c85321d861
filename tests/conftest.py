"""One thread (two are up to 15 times slower on a busy machine), no network, and a toy world whose returns always differ."""

import gc
import os
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


def pytest_collection_finish():
    """accelerate collects garbage after each training: a third of a second if it looks through all of torch and TRL."""
    gc.freeze()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


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
def unbroken(cache, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("unbroken")
    done = door(cache, outputs, *SMALL)
    assert done.returncode == 0, done.stderr
    assert moved(folder_of(outputs))
    return folder_of(outputs), done


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No folder of the machine takes part; sys.path is left as it was."""
    for name in ("AEM_OUTPUTS", "AEM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
