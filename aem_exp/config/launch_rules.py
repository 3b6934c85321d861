"""Refuses contradictions within `launch`, and between it and the rest of an experiment or this machine."""

import os
from importlib.util import find_spec

from aem_exp.config.schema import Experiment
from aem_exp.core.errors import ConfigError, MissingResource


def check_launch(e: Experiment) -> None:
    """Refuse settings of `launch` that the rest of it leaves without effect, or that collide with it."""
    launch, t = e.launch, e.launch.trainer
    for key in t:
        corrects = launch.sampler == "served" and key.startswith("vllm_importance_sampling_")
        if key.startswith("vllm_") and not t.get("use_vllm") and not corrects:
            raise ConfigError(f"launch.trainer.{key}", t[key], "only read with launch.trainer.use_vllm=true")
    if t.get("use_vllm") and launch.sampler != "engine":
        raise ConfigError("launch.trainer.use_vllm", True, "only read with launch.sampler=engine")
    if t.get("use_vllm") and t.get("vllm_mode", "colocate") != "colocate":
        raise ConfigError(
            "launch.trainer.vllm_mode", t["vllm_mode"], "vLLM in other processes is launch.sampler=served"
        )
    if t.get("use_vllm") and (size := t.get("vllm_tensor_parallel_size") or 1) > 1:
        remedy = (
            "must be 1: its processes would have to ask alike, and each plays its own episodes; for larger models, "
        )
        raise ConfigError("launch.trainer.vllm_tensor_parallel_size", size, remedy + "launch.sampler=served")
    if launch.gpus_per_node == 0 and t.get("use_vllm"):
        raise ConfigError("launch.trainer.use_vllm", True, "vLLM needs GPUs, and launch.gpus_per_node=0")
    if launch.gpus_per_node and t.get("use_cpu"):
        raise ConfigError("launch.trainer.use_cpu", True, f"collides with launch.gpus_per_node={launch.gpus_per_node}")
    if launch.workers_at is not None and not launch.workers:
        raise ConfigError("launch.workers_at", launch.workers_at, "only read with launch.workers above 0")
    if launch.env_seconds != type(launch)().env_seconds and not launch.workers:
        raise ConfigError("launch.env_seconds", launch.env_seconds, "only read with launch.workers above 0")
    tests = e.env.make.get("tests_seconds", 0.0)
    needed = tests + 240.0  # to read, lay out, and apply a patch, before it is tested
    if launch.workers and tests and launch.env_seconds < needed:
        remedy = f"must be at least {needed:g}, env.make.tests_seconds and 240: grading would be taken for hanging"
        raise ConfigError("launch.env_seconds", launch.env_seconds, remedy)
    if launch.where == "local" and launch.nodes > 1:
        raise ConfigError("launch.nodes", launch.nodes, "several nodes need launch.where=slurm")
    if launch.where == "slurm" and not launch.hours:
        raise ConfigError("launch.hours", launch.hours, "launch.where=slurm needs a time limit above 0")


def check_servers(e: Experiment) -> None:
    """Refuse settings of servers where none are asked, and servers that nothing starts or names."""
    launch, neutral = e.launch, type(e.launch)()
    for key in ("servers", "server_nodes", "server_weights", "server_seconds"):
        if launch.sampler != "served" and getattr(launch, key) != getattr(neutral, key):
            raise ConfigError(f"launch.{key}", getattr(launch, key), "only read with launch.sampler=served")
    if launch.sampler != "served":
        return
    if launch.servers is None and not launch.server_nodes:
        remedy = "launch.sampler=served needs the folder that says where they are, or launch.server_nodes above 0"
        raise ConfigError("launch.servers", None, remedy)
    if launch.servers is not None and launch.server_nodes:
        raise ConfigError(
            "launch.servers", launch.servers, "are those that launch.server_nodes starts, or others: not both"
        )
    if launch.server_nodes and launch.where != "slurm":
        raise ConfigError(
            "launch.server_nodes", launch.server_nodes, "needs launch.where=slurm; elsewhere, launch.servers"
        )
    if launch.server_weights == "nccl" and not launch.gpus_per_node:
        raise ConfigError("launch.server_weights", "nccl", "goes from GPU to GPU, and launch.gpus_per_node=0: files")


def check_fsdp(e: Experiment) -> None:
    """Refuse what a sharded policy cannot do."""
    launch, t = e.launch, e.launch.trainer
    how = t.get("fsdp_config") or {}
    if not t.get("fsdp"):
        if how:
            raise ConfigError("launch.trainer.fsdp_config", how, "only read with launch.trainer.fsdp=true")
        return
    if launch.nodes * max(1, launch.gpus_per_node) < 2:
        raise ConfigError("launch.trainer.fsdp", True, "needs a run of several processes: launch.gpus_per_node above 1")
    if how.get("version", 2) != 2:
        raise ConfigError("launch.trainer.fsdp_config.version", how["version"], "must be 2: a policy is played whole")
    if e.model.lora and how.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
        remedy = "of an adapter, it must be FULL_STATE_DICT: in pieces, peft does not find its weights again"
        raise ConfigError("launch.trainer.fsdp_config.state_dict_type", how["state_dict_type"], remedy)
    if how.get("cpu_ram_efficient_loading") and e.trainer.beta:
        remedy = (
            "leaves TRL's reference policy, which trainer.beta asks for, without its weights on all processes but one"
        )
        raise ConfigError("launch.trainer.fsdp_config.cpu_ram_efficient_loading", True, remedy)
    if t.get("gradient_checkpointing"):
        remedy = "of a policy in pieces, it is launch.trainer.fsdp_config.activation_checkpointing"
        raise ConfigError("launch.trainer.gradient_checkpointing", True, remedy)
    if launch.sampler == "engine" and not t.get("use_vllm"):
        remedy = "of a policy in pieces, HF generate would wait for other processes for ever: choose local, or vLLM"
        raise ConfigError("launch.sampler", "engine", remedy)


def check_machine(experiment: Experiment) -> None:
    """Refuse what another machine, or another number of processes, would have to run."""
    launch, here = experiment.launch, int(os.environ.get("WORLD_SIZE", "1"))
    wanted = launch.nodes * max(1, launch.gpus_per_node)
    if here != wanted:
        asked = f"{launch.nodes} nodes x {launch.gpus_per_node} GPUs"
        remedy = f"is a run of {wanted} processes, and here are {here}: choose launch=gpu1 or launch=local, submit it"
        raise MissingResource("launch", asked, f"{remedy} (launch.where=slurm), or start them with torchrun")
    vllm = "vLLM is not installed: pip install 'vllm>=0.22,<=0.31.0' (Linux, CUDA), or"
    if launch.trainer.get("use_vllm") and find_spec("vllm") is None:
        raise MissingResource("launch.trainer.use_vllm", True, f"{vllm} false")
    if launch.server_weights == "nccl" and find_spec("vllm") is None:
        raise MissingResource("launch.server_weights", "nccl", f"{vllm} files")
