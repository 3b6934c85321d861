"""Submits run directories to SLURM with submitit, asks SLURM about jobs, and requeues a job.

The only module that imports submitit.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

from aem_exp import config
from aem_exp.cluster import distributed
from aem_exp.config import Launch
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.core.typed import AT_LEAST_1, build_from_mapping

SERVER_SCRIPT = "vllm_server.sh"  # of the site: what a node that serves runs
JOB_FILE = "job.json"  # in a run dir: which job has it
JOB_VARIABLE = "AEM_JOB"  # in a job's environment: its id, where it was submitted here
LOGIN_HINT = "submit from a login node of your cluster, or choose launch=local"
LIVE_STATES = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED", "COMPLETING", "RESIZING", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Site:
    """What `slurm/site.yaml` may say. Whatever is left out is the cluster's own default."""

    partition: str | None = None
    """Partition of the jobs."""
    account: str | None = None
    """Account that the jobs are charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, such as h100."""
    mem_gb: Annotated[int, AT_LEAST_1] | None = None
    """Memory of a node."""
    at_once: Annotated[int, AT_LEAST_1] = 32
    """Jobs of one array that run at a time."""
    interface: str | None = None
    """The network interface that servers of a node listen on, such as ib0; null: that of the node's name."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other options of sbatch: `exclude: node[3-4]`."""
    srun: list[str] = field(default_factory=list)
    """Other arguments of srun."""


@dataclass(frozen=True)
class Job:
    """A job as the scheduler knows it."""

    id: str
    state: str
    """In SLURM's words: PENDING, RUNNING, COMPLETED, OUT_OF_MEMORY ..."""
    reason: str = ""
    """Why it waits, or its exit code."""

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES


def read_site() -> tuple[Site, Path]:
    """The cluster's settings, and the folder that they come from: $AEM_SITE, else `slurm/` beside `conf/`."""
    import yaml

    folder = Path(os.environ.get("AEM_SITE") or config.conf_root().parent / "slurm").expanduser().absolute()
    file = folder / "site.yaml"
    if not file.is_file():
        if "AEM_SITE" in os.environ:
            raise ConfigError("AEM_SITE", str(folder), "must be a folder with site.yaml")
        return Site(), folder
    try:
        return build_from_mapping(Site, yaml.safe_load(file.read_text()) or {}, str(file)), folder
    except yaml.YAMLError as error:
        raise ConfigError(str(file), "not YAML", " ".join(str(error).split())) from error


def submit(
    folders: Sequence[Path],
    launch: Launch,
    name: str,
    logs: Path,
    at_once: int = 0,
    module: str = "aem_exp.run",
) -> list[str]:
    """Send run dirs, which hold experiments and code, to the queue: one array, `at_once` of it at a time; the ids.

    A job is `python -m MODULE FOLDER`.

    Raises:
        ConfigError: there is no SLURM here, or it refuses the job; in its own words.
    """
    check_available()
    import cloudpickle
    import submitit
    from submitit.core.utils import FailedJobError

    site, site_folder = read_site()
    nodes = launch.nodes if launch.server_nodes else 0
    if nodes and not (site_folder / SERVER_SCRIPT).is_file():
        raise ConfigError("AEM_SITE", str(site_folder), f"must have {SERVER_SCRIPT}, which starts a server on a node")
    if nodes and module != "aem_exp.run":
        raise ConfigError(
            "launch.server_nodes", launch.server_nodes, "are of one run; a study's trials take launch.servers"
        )
    executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=0)
    executor.update_parameters(**_sbatch_options(site, site_folder, launch, name, at_once))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # edits made while the job waits do not reach it
    try:
        with redirect_stderr(io.StringIO()), executor.batch():  # submitit would say what sbatch said, too
            jobs = [executor.submit(_exec_task, str(folder), module, nodes, str(site_folder)) for folder in folders]
    except FailedJobError as error:
        _raise_refusal(error, site, launch)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    for folder, job in zip(folders, jobs, strict=True):
        card = {"job": job.job_id, "at": time.time(), "log": str(job.paths.stdout)}
        disk.write_atomically(folder / JOB_FILE, json.dumps(card, indent=1) + "\n")
    return [job.job_id for job in jobs]


def check_available() -> None:
    """Refuse to submit where nothing can be submitted, or the site's settings are wrong."""
    read_site()
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise ConfigError("launch.where", "slurm", f"{program} is not on the PATH; {LOGIN_HINT}")
    if shutil.which("sinfo") is None:
        return
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        raise ConfigError("launch.where", "slurm", f"SLURM does not answer here ({why.strip()}); {LOGIN_HINT}")


def _sbatch_options(site: Site, site_folder: Path, launch: Launch, name: str, at_once: int) -> dict[str, Any]:
    """The options of sbatch, as submitit calls them."""
    tasks = max(1, launch.gpus_per_node)
    setup = site_folder / "setup.sh"
    options = {
        "job_name": name,
        "nodes": launch.nodes + launch.server_nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": launch.cpus_per_task or None,
        "gpus_per_node": launch.gpus_per_node or None,
        "time": max(1, round(60 * launch.hours)),
        "signal_delay_s": launch.warn_seconds,
        "array_parallelism": at_once or site.at_once,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": f"{site.mem_gb}GB" if site.mem_gb else None,
        "setup": [f"source {setup}"] if setup.is_file() else None,
        "stderr_to_stdout": True,
        # One process that fails ends all; and newer SLURMs hand --cpus-per-task to srun only where told.
        "srun_args": ["--kill-on-bad-exit=1", *_cpu_arguments(launch), *_distribution_arguments(launch), *site.srun],
        "additional_parameters": {"requeue": True, **site.sbatch},
    }
    return {key: value for key, value in options.items() if value is not None}


def _cpu_arguments(launch: Launch) -> list[str]:
    return [f"--cpus-per-task={launch.cpus_per_task}"] if launch.cpus_per_task else []


def _distribution_arguments(launch: Launch) -> list[str]:
    """The nodes that train come first."""
    return ["--distribution=block"] if launch.server_nodes else []


def _exec_task(folder: str, module: str, nodes: int, site_folder: str) -> None:
    """What each task of a job does: become the command that a person would type. Pickled whole.

    `nodes`: how many train, where the others serve; 0: all of them train. `site_folder`: the cluster's settings.
    """
    import os
    import sys

    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    world = found.world_size * nodes // int(os.environ["SLURM_NNODES"]) if nodes else found.world_size
    if found.rank >= world:
        module = "aem_exp.serve"
        os.environ["AEM_SITE"] = site_folder
    elif world > 1:
        os.environ.setdefault("MASTER_ADDR", found.master_addr)
        os.environ |= {
            "MASTER_PORT": str(found.master_port),
            "RANK": str(found.rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(found.local_rank),
            "LOCAL_WORLD_SIZE": str(found.local_world_size),
        }
    before = os.environ.get("PYTHONPATH")
    code = os.path.join(folder, "code")
    os.environ |= {
        "PYTHONPATH": f"{code}{os.pathsep}{before}" if before else code,
        # Not the folder that the job was submitted from, before the code (see cli.JOB_SAFE_PATH).
        "PYTHONSAFEPATH": os.environ.get("PYTHONSAFEPATH") or "job",
        "AEM_JOB": os.environ["SLURM_JOB_ID"],
        "HF_HUB_OFFLINE": "1",  # whatever is needed was prepared
        "COLUMNS": "120",
    }
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, folder])


def requeue_and_wait(number: int) -> None:
    """Requeue this job, then wait for SLURM to end it: after a signal, with all saved. Outside of a job it returns.

    Where the time is nearly up (USR2), the first process requeues the job. Where a job is preempted, SLURM does that itself,
    but only for one that has not ended.
    """
    if JOB_VARIABLE not in os.environ or number == signal.SIGINT:
        return
    if number == signal.SIGUSR2 and distributed.is_main_process():
        _requeue(os.environ[JOB_VARIABLE])
    while True:
        time.sleep(1)


def _requeue(job: str) -> None:
    done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"its time is up, and scontrol does not requeue job {job}: {done.stderr.strip()}", "time")


def read_job_record(folder: Path) -> dict[str, Any]:
    """Which job had a run dir last; empty where none did."""
    file = folder / JOB_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def query_jobs(ids: Iterable[str]) -> Mapping[str, Job]:
    """What the scheduler knows of these jobs; those that it no longer has are left out."""
    wanted = sorted(set(ids))
    if not wanted or shutil.which("squeue") is None:
        return {}
    parents = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    queue = _query_queue()
    jobs = {job.id: job for job in _query_accounting(parents)}  # after the queue: it has the jobs that left it since
    if queue is not None:  # a job that is not in the queue has ended, though accounting may not know yet
        jobs = {name: job for name, job in jobs.items() if not job.is_live} | queue
    return {job: jobs[job] for job in wanted if job in jobs}


def _query_queue() -> dict[str, Job] | None:
    """Jobs in the queue, array tasks one by one; None where the controller does not answer."""
    lines = _run_client("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r")
    if lines is None:
        return None
    rows = [line.split("|", 2) for line in lines]
    return {job: Job(job, state, "" if why == "None" else why) for job, state, why in rows}


def _query_accounting(parents: str) -> Iterable[Job]:
    """Jobs as accounting knows them, which lags behind."""
    words = ("--allocations", "--noheader", "--parsable2", "--format=JobID,State,ExitCode", "--jobs", parents)
    for line in _run_client("sacct", *words) or ():
        job, state, code = line.split("|")
        yield Job(job, state.split()[0] if state else "", "" if code == "0:0" else f"exit code {code}")


def _run_client(*words: str) -> list[str] | None:
    """What a client of SLURM prints; None where it fails: a site may keep no accounts."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else None


def _raise_refusal(error: Exception, site: Site, launch: Launch) -> NoReturn:
    """sbatch's own words, as a sentence."""
    lines = [line for line in str(error).splitlines() if "error:" in line]
    refusal = "; ".join(line.partition("error: ")[2] for line in lines) or " ".join(str(error).split())[:300]
    partitions = " ".join(
        sorted({line.rstrip("*") for line in _run_client("sinfo", "--noheader", "--format=%R") or ()})
    )
    request = f"{launch.nodes} x {launch.gpus_per_node} GPUs, partition {site.partition or 'default'}"
    raise ConfigError(
        "launch", request, f"sbatch refuses: {refusal}; partitions here: {partitions}; see site.yaml and launch.*"
    )
