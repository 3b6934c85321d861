"""Limits of the memory of this machine: control groups, SLURM, and processes that share it."""

import pytest

from aem_exp.cluster import node_memory
from aem_exp.cluster.slurm import Site
from aem_exp.config import Launch

GIB = 2.0**30


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "LOCAL_WORLD_SIZE", node_memory.SHARED_BY):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64G", 64 * GIB), ("64GB", 64 * GIB), ("2048", 2 * GIB), ("512m", GIB / 2), ("0", 0), ("", 0), ("half", 0)],
)
def test_sizes_in_the_notation_of_slurm(text, size):
    assert node_memory.parse_size(text) == size


def test_memory_of_a_job_comes_from_the_site():
    assert node_memory.job_bytes(Site(), Launch()) == 0
    assert node_memory.job_bytes(Site(mem_gb=64), Launch()) == 64 * GIB
    assert node_memory.job_bytes(Site(mem_gb=64, sbatch={"mem": "32G"}), Launch()) == 32 * GIB
    assert node_memory.job_bytes(Site(sbatch={"mem-per-cpu": "2G"}), Launch(cpus_per_task=4)) == 8 * GIB


def test_slurm_job_limits_the_machine(monkeypatch):
    whole = node_memory.machine_bytes()
    assert whole > 0
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert node_memory.machine_bytes() == GIB / 2
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # the whole node
    assert node_memory.machine_bytes() == whole
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "256")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert node_memory.machine_bytes() == GIB / 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(node_memory.SHARED_BY, "2")
    assert node_memory.process_bytes() == GIB / 8


@pytest.mark.parametrize(
    ("line", "file", "text", "limit"),
    [
        ("0::/user/job", "user/memory.max", "1073741824\n", GIB),  # version 2: the limit of a parent
        ("0::/user/job", "user/job/memory.max", "max\n", 0),
        ("4:memory:/job", "memory/job/memory.limit_in_bytes", "1073741824\n", GIB),  # version 1
        ("4:memory:/job", "memory/memory.limit_in_bytes", "9223372036854771712\n", 0),  # no limit
        ("4:memory:/elsewhere", "memory/memory.limit_in_bytes", "1073741824\n", GIB),  # inside a container
    ],
)
def test_control_groups_limit_the_machine(monkeypatch, tmp_path, line, file, text, limit):
    (tmp_path / "own").write_text(f"1:cpu:/\n{line}\n")
    monkeypatch.setattr(node_memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(node_memory, "CGROUPS", tmp_path)
    whole = node_memory.machine_bytes()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert node_memory.machine_bytes() == (limit or whole)


def test_memory_of_this_process():
    assert 0 < node_memory.resident_bytes() < node_memory.machine_bytes() + GIB
    assert node_memory.free_bytes() > 0
