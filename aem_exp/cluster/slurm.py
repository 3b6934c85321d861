"""Submits run directories to SLURM with submitit, queries job states, and requeues a job.

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

SERVER_SCRIPT = "vllm_server.sh"  # in the site folder: starts the vLLM server of a node
JOB_FILE = "job.json"  # in a run directory: its last job
JOB_VARIABLE = "AEM_JOB"  # environment variable with the job id, in jobs that this module submitted
LOGIN_HINT = "submit from a login node of your cluster, or choose launch=local"
LIVE_STATES = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED", "COMPLETING", "RESIZING", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Site:
    """The settings of `slurm/site.yaml`. An omitted setting uses the default of the cluster."""

    partition: str | None = None
    """Partition of the jobs."""
    account: str | None = None
    """Account that the jobs are charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, such as h100."""
    mem_gb: Annotated[int, AT_LEAST_1] | None = None
    """Memory per node, in GB."""
    at_once: Annotated[int, AT_LEAST_1] = 32
    """Maximum number of jobs of one array that run at the same time."""
    interface: str | None = None
    """Network interface on which servers listen, such as ib0. null: the interface of the node's host name."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other options of sbatch, such as `exclude: node[3-4]`."""
    srun: list[str] = field(default_factory=list)
    """Other arguments of srun."""


@dataclass(frozen=True)
class Job:
    """A job, as reported by the scheduler."""

    id: str
    state: str
    """The SLURM state: PENDING, RUNNING, COMPLETED, OUT_OF_MEMORY, ..."""
    reason: str = ""
    """The reason that it is pending, or its exit code."""

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES


def read_site() -> tuple[Site, Path]:
    """Read the settings of the cluster from $AEM_SITE, or from `slurm/` next to `conf/`; also return that folder."""
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
    """Submit run directories as one job array and return the job ids. Each job runs `python -m MODULE FOLDER`.

    Args:
        folders: run directories, which hold the experiment and its code.
        at_once: maximum number of jobs that run at the same time; 0 uses the setting of the site.

    Raises:
        ConfigError: SLURM is not available on this machine, or it rejects the job (with its message).
    """
    check_available()
    import cloudpickle
    import submitit
    from submitit.core.utils import FailedJobError

    site, site_folder = read_site()
    nodes = launch.nodes if launch.server_nodes else 0
    if nodes and not (site_folder / SERVER_SCRIPT).is_file():
        raise ConfigError(
            "AEM_SITE", str(site_folder), f"must contain {SERVER_SCRIPT}, which starts a server on a node"
        )
    if nodes and module != "aem_exp.run":
        raise ConfigError(
            "launch.server_nodes", launch.server_nodes, "works for single runs only; for a study, use launch.servers"
        )
    if launch.worker_nodes and (len(folders) > 1 or module != "aem_exp.run"):
        remedy = "works for single runs only: an array of jobs cannot be heterogeneous; set launch.worker_nodes=0"
        raise ConfigError("launch.worker_nodes", launch.worker_nodes, remedy)
    executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=0)
    executor.update_parameters(**_sbatch_options(site, site_folder, launch, name, at_once))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # later edits of this file do not affect queued jobs
    try:
        with redirect_stderr(io.StringIO()), executor.batch():  # submitit prints the message of sbatch, too
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
    """Check the site settings, and that SLURM answers on this machine.

    Raises:
        ConfigError: a setting is invalid, or a job cannot be submitted from here.
    """
    read_site()
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise ConfigError("launch.where", "slurm", f"{program} is not on the PATH; {LOGIN_HINT}")
    if shutil.which("sinfo") is None:
        return
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        raise ConfigError("launch.where", "slurm", f"SLURM does not answer ({why.strip()}); {LOGIN_HINT}")


def _sbatch_options(site: Site, site_folder: Path, launch: Launch, name: str, at_once: int) -> dict[str, Any]:
    """The options of sbatch, with submitit's names."""
    tasks = max(1, launch.gpus_per_node)
    setup = site_folder / "setup.sh"
    options = {
        "job_name": name,
        "nodes": launch.nodes + launch.server_nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": launch.cpus_per_task or None,
        "gpus_per_node": launch.gpus_per_node or None,
        "time": _minutes(launch),
        "signal_delay_s": launch.warn_seconds,
        "array_parallelism": at_once or site.at_once,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": f"{site.mem_gb}GB" if site.mem_gb else None,
        # sbatch reads directives up to the first command, so those of the second component come first.
        "setup": [*_worker_directives(site, launch), *([f"source {setup}"] if setup.is_file() else [])] or None,
        "stderr_to_stdout": True,
        # A failed process must end the job. Since SLURM 22.05, srun does not inherit --cpus-per-task.
        "srun_args": ["--kill-on-bad-exit=1", *_cpu_arguments(launch), *_distribution_arguments(launch), *site.srun],
        "additional_parameters": {"requeue": True, **site.sbatch},
    }
    return {key: value for key, value in options.items() if value is not None}


def _minutes(launch: Launch) -> int:
    """The time limit of a job."""
    return max(1, round(60 * launch.hours))


def _worker_directives(site: Site, launch: Launch) -> list[str]:
    """The lines of the batch script that describe the nodes of `launch.worker_nodes`."""
    if not launch.worker_nodes:
        return []
    options = {
        "nodes": str(launch.worker_nodes),
        "ntasks-per-node": "1",
        "time": str(_minutes(launch)),
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
    } | launch.worker_sbatch
    words = [f"--{name}={value}" if value else f"--{name}" for name, value in options.items() if value is not None]
    return ["#SBATCH hetjob", *(f"#SBATCH {word}" for word in [*words, "--requeue"])]


def _cpu_arguments(launch: Launch) -> list[str]:
    return [f"--cpus-per-task={launch.cpus_per_task}"] if launch.cpus_per_task else []


def _distribution_arguments(launch: Launch) -> list[str]:
    """Block distribution gives the lowest ranks to the nodes that train."""
    return ["--distribution=block"] if launch.server_nodes else []


def _exec_task(folder: str, module: str, nodes: int, site_folder: str) -> None:
    """Replace this task of a job by the command `python -m MODULE FOLDER`. Pickled by value.

    Args:
        nodes: number of nodes that train, if the other nodes run servers; 0 if all nodes train.
        site_folder: the folder of the site settings.
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
        # Prevents Python from importing from the submission folder before `code` (see cli.JOB_SAFE_PATH).
        "PYTHONSAFEPATH": os.environ.get("PYTHONSAFEPATH") or "job",
        "AEM_JOB": os.environ["SLURM_JOB_ID"],
        "HF_HUB_OFFLINE": "1",  # `aem_exp.prepare` has downloaded everything
        "COLUMNS": "120",
    }
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, folder])


def requeue_and_wait(number: int) -> None:
    """Requeue this job, then wait for SLURM to end it. Called after a signal, when everything is saved.

    On SIGUSR2 (the time limit is near), the main process requeues the job. SLURM itself requeues a preempted job, but only if its
    processes are still running: therefore this function waits. Outside of a job it returns immediately.
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
        raise RunError(f"time limit reached, and scontrol cannot requeue job {job}: {done.stderr.strip()}", "time")


def read_job_record(folder: Path) -> dict[str, Any]:
    """The last job of a run directory; empty if there is none."""
    file = folder / JOB_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def query_jobs(ids: Iterable[str]) -> Mapping[str, Job]:
    """The states of these jobs. Jobs that the scheduler no longer knows are left out."""
    wanted = sorted(set(ids))
    if not wanted or shutil.which("squeue") is None:
        return {}
    parents = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    queue = _query_queue()
    jobs = {
        job.id: job for job in _query_accounting(parents)
    }  # queried second: includes jobs that left the queue meanwhile
    if queue is not None:  # a job that is not in the queue has ended, even if accounting does not know yet
        jobs = {name: job for name, job in jobs.items() if not job.is_live} | queue
    return {job: jobs[job] for job in wanted if job in jobs}


def _query_queue() -> dict[str, Job] | None:
    """The jobs in the queue, with one entry per array task; None if the controller does not answer."""
    lines = _run_client("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r")
    if lines is None:
        return None
    rows = [line.split("|", 2) for line in lines]
    jobs = [Job(_leader_id(job), state, "" if why == "None" else why) for job, state, why in rows]
    return {job.id: job for job in jobs if job.id}


def _query_accounting(parents: str) -> Iterable[Job]:
    """The jobs in the accounting database, which may lag behind the queue."""
    words = ("--allocations", "--noheader", "--parsable2", "--format=JobID,State,ExitCode", "--jobs", parents)
    for line in _run_client("sacct", *words) or ():
        job, state, code = line.split("|")
        if leader := _leader_id(job):
            yield Job(leader, state.split()[0] if state else "", "" if code == "0:0" else f"exit code {code}")


def _leader_id(job: str) -> str:
    """The id of a job. Of a heterogeneous job (`12+0`, `12+1`) it is the id of the first component, and "" for the others."""
    leader, plus, component = job.partition("+")
    return "" if plus and component != "0" else leader


def _run_client(*words: str) -> list[str] | None:
    """The output lines of a SLURM command; None if it fails, for example because the site has no accounting."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else None


def _raise_refusal(error: Exception, site: Site, launch: Launch) -> NoReturn:
    """Raise a ConfigError with the message of sbatch."""
    lines = [line for line in str(error).splitlines() if "error:" in line]
    refusal = "; ".join(line.partition("error: ")[2] for line in lines) or " ".join(str(error).split())[:300]
    partitions = " ".join(
        sorted({line.rstrip("*") for line in _run_client("sinfo", "--noheader", "--format=%R") or ()})
    )
    request = f"{launch.nodes} x {launch.gpus_per_node} GPUs, partition {site.partition or 'default'}"
    raise ConfigError(
        "launch", request, f"sbatch rejected the job: {refusal}; partitions: {partitions}; see site.yaml and launch.*"
    )
