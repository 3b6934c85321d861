"""Refuses experiments that do not fit into GPU memory or onto the disk, and names the key to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.jobs.memory import (
    CHECKPOINTS_ON_DISK,
    VLLM_SLEEP_BYTES,
    MemoryEstimate,
    ServerSpec,
    context_bytes,
    disk_space,
    estimate_memory,
)
from aem_exp.jobs.sizes import GB, ProcessSpec, format_gb, gpu_memory, vllm_share

COMBINED: Final = ("_rows", "_tokens", "_episodes", "_checkpointing")  # ends of keys that may be changed together
Change = tuple[str, Any, Any, ProcessSpec]  # field, current value, proposed value, process with the proposed value


def check_memory(experiment: Experiment) -> None:
    """Check that the experiment fits into the GPU memory of its launch. An unknown size is not refused.

    Raises:
        ConfigError: it does not fit; with the needed memory, and a value that would fit if there is one.
    """
    have = gpu_memory(experiment.launch) * GB
    if experiment.model.path is None or not have:
        return
    try:
        process = ProcessSpec.from_experiment(experiment)
        need = estimate_memory(process)
    except MissingResource:  # the estimate is not possible
        return
    _check_vllm_share(experiment, process, need)
    _check_servers(experiment, need)
    if need.total <= have:
        return
    largest = max(need.peak, key=need.peak.__getitem__)
    problem = f"needs {format_gb(need.total)} of {have / GB:g} GB per GPU in {need.phase}, most of it {largest}"
    fits = lambda lighter: estimate_memory(lighter).total <= have  # noqa: E731
    raise memory_error(experiment, process, need.phase, problem, fits, "more GPUs, larger GPUs")


def memory_error(
    experiment: Experiment,
    process: ProcessSpec,
    phase: str,
    problem: str,
    fits: Callable[[ProcessSpec], bool],
    hardware: str,
) -> ConfigError:
    """The error for a process that needs too much memory in `phase`, with a change that would fit if there is one.

    Args:
        fits: whether a process fits into memory.
        hardware: a remedy besides other settings.
    """
    tried: dict[str, Any] = {}
    for field, old, new, lighter in _propose_changes(experiment, process, phase):
        tried.setdefault(field, old)
        if fits(lighter):
            return ConfigError(field, old, f"{problem}; {_format_value(new)} would fit")
    field, old = next(iter(tried.items()), ("launch", experiment.launch.name))
    if changes := _combine_changes(experiment, process, fits):
        words = " ".join(f"{name}={_format_value(new)}" for name, new in changes.items())
        return ConfigError(field, old, f"{problem}; {words} would fit")
    alone = f"; changing one of {', '.join(tried)} is not enough" if tried else ""
    return ConfigError(field, old, f"{problem}{alone}; combine several changes, or use {hardware} or another model")


def _combine_changes(
    experiment: Experiment, process: ProcessSpec, fits: Callable[[ProcessSpec], bool]
) -> dict[str, Any]:
    """Values of several keys that fit together; empty if none do. Each round lightens the phase that needs the most memory."""
    changes: dict[str, Any] = {}
    while not fits(process):
        proposed = next(_propose_changes(experiment, process, estimate_memory(process).phase), None)
        if proposed is None or not proposed[0].endswith(COMBINED):
            return {}
        field, _, changes[field], process = proposed
    return changes


def check_disk(experiment: Experiment) -> None:
    """Check that the checkpoints of a new run fit on the disk. A plan skips this, as it may be made on another machine.

    Raises:
        ConfigError: the disk has too little free space; with the needed space.
    """
    if experiment.model.path is None or config.run_dir(experiment).exists():
        return
    try:
        least, free, _ = disk_space(experiment, estimate_memory(ProcessSpec.from_experiment(experiment)))
    except MissingResource:
        return
    if free < least:
        problem = f"has {format_gb(free)} GB of free space, and the run needs {format_gb(least)} GB for "
        problem += f"{CHECKPOINTS_ON_DISK} checkpoints and the final weights"
        raise ConfigError(
            "outputs", config.outputs_root(experiment), f"{problem}; choose a folder with more free space"
        )


def _check_vllm_share(experiment: Experiment, process: ProcessSpec, need: MemoryEstimate) -> None:
    """vLLM starts only if the weights and the cache of one full context fit into its share (both in bf16)."""
    if process.sampler != "colocate":
        return
    least = 2 * need.weights + context_bytes(process, process.tokens) + VLLM_SLEEP_BYTES
    if least > process.engine_bytes:
        problem = f"gives vLLM {format_gb(process.engine_bytes)} GB per GPU; the weights and one full context need "
        problem += f"{format_gb(least)} GB"
        raise ConfigError("launch.trainer.vllm_gpu_memory_utilization", vllm_share(experiment.launch), problem)


def _check_servers(experiment: Experiment, need: MemoryEstimate) -> None:
    """A server node must hold the weights and the cache of one full context."""
    servers = ServerSpec.from_experiment(experiment, need)
    if servers is None or servers.free_bytes >= servers.context:
        return
    problem = (
        f"the {servers.gpus} GPUs of a server node hold {format_gb(servers.free_bytes + servers.weights)} GB, but the "
    )
    problem += f"policy needs {format_gb(servers.weights)} GB and one full context {format_gb(servers.context)} GB"
    raise ConfigError("launch.server_nodes", servers.nodes, f"{problem}; use larger GPUs or more GPUs per node")


def _propose_changes(experiment: Experiment, process: ProcessSpec, phase: str) -> Iterator[Change]:
    """Changes that reduce the memory of a process in its largest phase."""
    passes, at = process.passes, "launch.trainer"
    if phase == "play":
        yield from _propose_lighter_play(experiment, process)
    elif phase != "optimizer":
        yield from _propose_lighter_passes(experiment, process)
    if process.engine_bytes and not process.engine_sleeps:
        yield f"{at}.vllm_enable_sleep_mode", False, True, replace(process, engine_sleeps=True)
    if process.ranks > passes.processes:
        yield f"{at}.fsdp", False, True, replace(process, passes=replace(passes, processes=process.ranks))
    elif passes.processes > 1 and not passes.offload:
        yield f"{at}.fsdp_config.cpu_offload", False, True, replace(process, passes=replace(passes, offload=True))


def _propose_lighter_play(experiment: Experiment, process: ProcessSpec) -> Iterator[Change]:
    launch = experiment.launch
    for fewer in _halves(process.episodes):
        yield "launch.device_episodes", launch.device_episodes, fewer, replace(process, episodes=fewer)
    if process.sampler == "colocate":
        field, share = "launch.trainer.vllm_gpu_memory_utilization", vllm_share(launch)
        for factor in (0.9, 0.8, 0.7, 0.6, 0.5):
            lighter = replace(process, engine_bytes=process.engine_bytes * factor)
            yield field, share, round(share * factor, 2), lighter


def _propose_lighter_passes(experiment: Experiment, process: ProcessSpec) -> Iterator[Change]:
    launch, passes = experiment.launch, process.passes
    by_tokens = launch.device_tokens and process.rows < (launch.device_rows or process.rows + 1)
    for fewer in _halves(process.rows):
        lighter = replace(process, rows=fewer, accumulates=True)
        if by_tokens:
            yield "launch.device_tokens", launch.device_tokens, fewer * process.tokens, lighter
        else:
            yield "launch.device_rows", launch.device_rows, fewer, lighter
    if not passes.checkpointing:
        name = "fsdp_config.activation_checkpointing" if passes.processes > 1 else "gradient_checkpointing"
        yield f"launch.trainer.{name}", False, True, replace(process, passes=replace(passes, checkpointing=True))


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
