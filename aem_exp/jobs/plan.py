"""The lines that `plan=true` prints: environments, rows, memory, disk space and GPU-hours of an experiment.

All sizes are upper bounds. Nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core import extras
from aem_exp.core.errors import ConfigError
from aem_exp.jobs.memory import (
    BANDWIDTH,
    CHECKPOINTS_ON_DISK,
    LIBRARIES,
    MemoryEstimate,
    ServerSpec,
    attention_shape,
    disk_space,
    estimate_memory,
)
from aem_exp.jobs.sizes import GB, ProcessSpec, StepSizes, format_gb, gpu_memory, process_count, read_shape
from aem_exp.rundir import measured_memory

UTILISATION: Final = 0.3  # share of the bf16 peak of a GPU; a common value for training at such lengths


def plan_lines(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """The plan as headings and texts. For a policy that is made on this machine, it has only the first line.

    Raises:
        ConfigError: the shape of the model is not known.
        MissingResource: config.json of the model, or torch, which the estimates need, is missing.
    """
    yield "step", _format_step(experiment)
    if experiment.model.path is None:
        return
    extras.require_training("model.path", experiment.model.path, "the estimate of memory, disk and cost", LIBRARIES)
    launch, need = experiment.launch, estimate_memory(ProcessSpec.from_experiment(experiment))
    yield "memory", _format_memory(experiment, need)
    others = ", ".join(f"{name} {format_gb(sum(p.values()))}" for name, p in need.phases.items() if name != need.phase)
    yield "", f"{others}; {_format_weights(need)}"
    if launch.gpus_per_node and (measured := measured_memory.read(config.run_dir(experiment))):
        corrected = f"{format_gb(measured.correct(need.total))} GB, corrected by step {measured.step}"
        yield "", f"{corrected}, which used {format_gb(measured.peak)} GB (x {measured.ratio:.2f} of its estimate)"
    if servers := ServerSpec.from_experiment(experiment, need):
        yield "serve", str(servers)
    yield "disk", _format_disk(experiment, need)
    if launch.gpus_per_node:
        if not gpu_memory(launch):
            yield "note", "launch.gpu_memory_gb=0: GPU memory is unknown, so its limit is not checked"
        yield "cost", _format_cost(experiment, need)


def _format_step(experiment: Experiment) -> str:
    sizes, launch = StepSizes.from_experiment(experiment), experiment.launch
    nodes = f", {-(-sizes.live // launch.nodes):,} per node" if launch.nodes > 1 else ""
    tokens = f"{_format_count(sizes.tokens)} tokens, {_format_count(min(sizes.sampled, sizes.tokens))} of them sampled"
    updates = f"{sizes.updates:,} update{'s' if sizes.updates > 1 else ''}"
    return f"{sizes.live:,} environments at once{nodes}; up to {sizes.rows:,} rows, {tokens}; {updates}"


def _format_memory(experiment: Experiment, need: MemoryEstimate) -> str:
    launch = experiment.launch
    have, unit = gpu_memory(launch), "per GPU" if launch.gpus_per_node else "per process, without Python itself"
    parts = ", ".join(
        f"{name} {format_gb(size)}" for name, size in sorted(need.peak.items(), key=lambda p: -p[1]) if size > GB / 20
    )
    return f"{format_gb(need.total)} {f'of {have:g} GB' if have else 'GB'} {unit}, in {need.phase}: {parts}"


def _format_weights(need: MemoryEstimate) -> str:
    trained = f", {need.trained / 1e6:,.1f} M of them trained" if need.trained < need.weights else ""
    return f"{need.weights / 1e9:.2f} B weights{trained}"


def _format_disk(experiment: Experiment, need: MemoryEstimate) -> str:
    least, free, weights = disk_space(experiment, need)
    saved = f"up to {CHECKPOINTS_ON_DISK} checkpoints of {format_gb(need.saved)} GB"
    each = f"{format_gb(least)} GB: {saved} and the final weights"
    once = (experiment.launch.trainer.get("fsdp_config") or {}).get("cpu_ram_efficient_loading")
    readers = 1 if once else max(1, experiment.launch.gpus_per_node)
    loaded = f"{format_gb(readers * weights)} GB of node memory while loading"
    return f"{each}; {format_gb(free)} GB free on this machine{' (too little)' if free < least else ''}; {loaded}"


def _format_cost(experiment: Experiment, need: MemoryEstimate) -> str:
    t, launch = experiment.trainer, experiment.launch
    if not launch.gpu_tflops:
        return "unknown, because launch.gpu_tflops=0"
    hours, gpus, decoding_bound = _step_hours(experiment, need)
    total = sum(hours.values())
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in hours.items())
    total *= t.steps
    slow = f" and {BANDWIDTH / 1e12:g} TB/s for decoding" if decoding_bound else ""
    cost = f"about {total:,.0f} GPU-hours, {total / gpus / 24:,.1f} days, if every context is full: {shares}"
    return f"{cost}; at {UTILISATION:.0%} of {launch.gpu_tflops:g} TFLOP/s{slow}, without evaluation and environments"


def _step_hours(experiment: Experiment, need: MemoryEstimate) -> tuple[dict[str, float], int, bool]:
    """GPU-hours of a step by part, the number of GPUs, and whether memory bandwidth limits decoding."""
    launch, process = experiment.launch, ProcessSpec.from_experiment(experiment)
    sizes, gpus = StepSizes.from_experiment(experiment), process_count(launch)
    rate, decoding_bound = UTILISATION * launch.gpu_tflops * 1e12, False
    hours = {name: count / rate / 3600 for name, count in _step_flops(experiment, process, need).items()}
    if servers := ServerSpec.from_experiment(experiment, need):  # trainer and servers work alternately
        all_gpus = gpus + servers.nodes * servers.gpus
        hours = {name: part * all_gpus / gpus for name, part in hours.items()} | {
            "play": servers.play_hours(sizes) * all_gpus
        }
        gpus, decoding_bound = all_gpus, True
    if process.sampler == "local":  # a process decodes its episodes in portions, one token of each episode at a time
        portions = -(-sizes.episodes // (gpus * process.episodes))
        decoding = portions * sizes.sampled / sizes.episodes * 2 * need.weights / BANDWIDTH * gpus / 3600
        if decoding > hours["play"]:
            hours["play"], decoding_bound = decoding, True
    return hours, gpus, decoding_bound


def _step_flops(experiment: Experiment, process: ProcessSpec, need: MemoryEstimate) -> dict[str, float]:
    """FLOPs of a step by part: 2 per weight and token forward, twice that backward, attention to half a context on average."""
    t, sizes = experiment.trainer, StepSizes.from_experiment(experiment)
    _, heads, layers, width = attention_shape(process)
    forward = 2 * need.weights + 2 * process.tokens * heads * width * layers
    turns = experiment.env.max_turns if experiment.env.history == "window" else 1
    return {
        "play": forward * sizes.episodes * turns * process.tokens,
        "update": forward * sizes.tokens * (4 if process.passes.checkpointing else 3) * t.num_iterations,
        "scoring": forward * sizes.tokens * (process.scoring_pass + process.reference),
    }


def context_warnings(experiment: Experiment) -> list[str]:
    """Warnings about contexts that exceed the position limit of the model."""
    if experiment.model.path is None:
        return []
    from aem_exp import policy

    env, panels = experiment.env, experiment.evaluation
    try:
        positions, scaled = policy.max_positions(json.loads(read_shape(experiment.model)))
    except ConfigError:  # raised again where the shape is needed
        return []
    context = max(env.context_tokens, panels.context_tokens)
    if not 0 < positions < context:
        return []
    field = "env.context_tokens" if context == env.context_tokens else "evaluation.context_tokens"
    problem = f"{field}={context}: the config.json of the model has {positions:,} positions; beyond them, the model extrapolates"
    remedy = (
        "a vLLM server refuses this" if scaled else "for YaRN, set rope_parameters there; trainer and servers read it"
    )
    return [f"{problem}; {remedy}"]


def _format_count(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M" if tokens >= 1e5 else f"{tokens:,}"
