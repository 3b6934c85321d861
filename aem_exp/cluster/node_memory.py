"""The memory (RAM) of this machine, its limits for this process, and the memory that a SLURM job gets."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from aem_exp.cluster.slurm import Site
from aem_exp.config import Launch

SHARED_BY: Final = "AEM_SHARED_BY"  # environment variable: number of runs that this machine executes at the same time
CGROUPS: Final = Path("/sys/fs/cgroup")
OWN_CGROUPS: Final = Path("/proc/self/cgroup")
UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # of SLURM; a number without a unit is in megabytes


def machine_bytes() -> float:
    """Bytes that all processes of this machine, container or job may use; 0 if unknown."""
    limits = [limit for limit in (_physical_bytes(), *_cgroup_limits(), _allocated_bytes()) if limit > 0]
    return min(limits, default=0.0)


def process_bytes() -> float:
    """Bytes for one of the processes that share this machine: those of the run, and other runs of a sweep; 0 if unknown."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * int(os.environ.get(SHARED_BY, "1"))
    return machine_bytes() / max(1, processes)


def job_bytes(site: Site, launch: Launch) -> float:
    """Bytes that a job of a cluster gets on each node; 0 if its settings do not say so."""
    if "mem" in site.sbatch:
        return parse_size(site.sbatch["mem"])
    if site.mem_gb:
        return site.mem_gb * 2.0**30
    return parse_size(site.sbatch.get("mem-per-cpu", "")) * max(1, launch.cpus_per_task)


def free_bytes() -> float:
    """Bytes that are free on this machine at the moment; infinite if unknown."""
    return _read_kilobytes("/proc/meminfo", "MemAvailable") or float("inf")


def resident_bytes() -> float:
    """Bytes that this process uses at the moment; 0 if unknown."""
    return _read_kilobytes("/proc/self/status", "VmRSS")


def parse_size(text: str) -> float:
    """Bytes of a size in the notation of `sbatch --mem`, such as 64G; 0 if it is not one, or asks for the whole node."""
    size = text.strip().upper().removesuffix("B")
    digits, unit = (size[:-1], size[-1]) if size[-1:] in UNITS else (size, "M")
    return float(digits) * UNITS[unit] if digits.isdecimal() else 0.0


def _physical_bytes() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return 0.0


def _allocated_bytes() -> float:
    """Bytes of the SLURM job of this process on this node; 0 outside of a job."""
    if node := os.environ.get("SLURM_MEM_PER_NODE"):
        return parse_size(node)
    return parse_size(os.environ.get("SLURM_MEM_PER_CPU", "")) * int(os.environ.get("SLURM_CPUS_ON_NODE") or 1)


def _cgroup_limits() -> Iterator[float]:
    """The limits of the control groups of this process: version 2 (`memory.max`) and version 1."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield _read_limit(group / name)


def _read_limit(file: Path) -> float:
    """Bytes of a limit; 0 if there is none."""
    try:
        text = file.read_text().strip()
    except OSError:  # the group is outside of this container
        return 0.0
    return float(text) if text.isdecimal() and int(text) < sys.maxsize // 2 else 0.0  # version 1 has a huge number


def _read_kilobytes(file: str, name: str) -> float:
    """The value of a line such as `VmRSS: 123 kB`, in bytes; 0 if it is missing."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0.0)
