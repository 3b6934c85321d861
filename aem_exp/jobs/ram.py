"""Refuses experiments on CPUs that cannot fit into memory (RAM), and warns if only their largest rows would not fit.

A refusal needs to be certain, so it assumes rows of a typical length: the prompts of some training tasks, with full responses.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from aem_exp import config, policy
from aem_exp.cluster import node_memory, slurm
from aem_exp.config import Experiment
from aem_exp.core import user_code
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs import World, panel
from aem_exp.envs.executor import SerialExecutor
from aem_exp.evaluate.panels import MAX_PANEL_EPISODES
from aem_exp.jobs import fit, world_check
from aem_exp.jobs.memory import MemoryEstimate, estimate_memory
from aem_exp.jobs.sizes import FIRST_PROMPT_DIVISOR, GB, ProcessSpec, RowLengths, format_gb, gpu_memory
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Episode, Trajectory
from aem_exp.rundir import measured_memory
from aem_exp.rundir.measured_memory import MeasuredMemory

PYTHON_BYTES: Final = 0.7e9  # Python with torch, transformers and TRL, before a model is loaded
MARGIN: Final = 1.25  # refuse only an experiment that needs this multiple of the memory
SAMPLE_TASKS: Final = 4  # training tasks whose prompts are measured
SAMPLE_TURNS: Final = 4  # turns of each of them, at most


@dataclass(frozen=True)
class RamNeed:
    """The memory that a process needs on a CPU, in bytes, including Python."""

    have: float
    """What it may use; 0 if unknown."""
    typical: float
    """With rows of a typical length."""
    worst: float
    """With the largest rows that the config allows."""
    lengths: RowLengths
    """The typical lengths."""
    measured: MeasuredMemory | None
    """The measurement of an earlier start of the run, which corrects both estimates."""

    def __str__(self) -> str:
        of = f" of {format_gb(self.have)}" if self.have else ""
        rows = f"with rows of {self.lengths.row:,} tokens, {format_gb(self.worst)} GB if every row is full"
        basis = f"; corrected by the first step (x {self.measured.ratio:.2f})" if self.measured else ""
        return f"about {format_gb(self.typical)}{of} GB per process {rows}{basis}"

    def warnings(self, experiment: Experiment) -> list[str]:
        """Sentences about memory that may become too small."""
        if 0 < self.have < self.worst:
            return [_describe_worst_case(experiment, self.worst, self.have)]
        free = node_memory.free_bytes() + node_memory.resident_bytes()
        if self.have and self.typical > free and not _runs_elsewhere(experiment):
            return [
                f"the run needs about {format_gb(self.typical)} GB of RAM; {format_gb(free)} GB are free at the moment"
            ]
        return []


def check_ram(experiment: Experiment, world: World | None = None) -> RamNeed | None:
    """Check that an experiment on CPUs fits into memory.

    Args:
        world: its opened world; None: the length of its prompts is unknown.

    Returns:
        The needed memory; None if there is nothing to check (GPUs, or a policy that is made on this machine), or if it cannot be
        estimated.

    Raises:
        ConfigError: it cannot fit; with the needed and available memory, and a value that would fit if there is one.
    """
    if experiment.launch.gpus_per_node or experiment.model.path is None:
        return None
    try:
        played = _play_sample(experiment, world)
        lengths = _typical_lengths(experiment, played)
        process = _with_panels(experiment, ProcessSpec.from_experiment(experiment, lengths), world)
        need = estimate_memory(process)
        worst = _estimate_worst_case(experiment, world)
    except MissingResource:
        return None
    have, measured = available_bytes(experiment), measured_memory.read(config.run_dir(experiment))
    typical = _add_python(need.total, measured)
    if have and typical > MARGIN * have:
        rows = f"with rows of {lengths.row:,} tokens ({'prompts of the env' if played else 'short prompts'}, full responses)"
        largest = max(need.peak, key=need.peak.__getitem__)
        amounts = f"{format_gb(typical)} GB of RAM per process, and {format_gb(have)} GB are available"
        problem = f"needs {amounts}; in {need.phase}, {rows}, most of it {largest}"
        fits = lambda lighter: _add_python(estimate_memory(lighter).total, measured) <= have  # noqa: E731
        raise fit.memory_error(experiment, process, need.phase, problem, fits, "a machine with more memory")
    return RamNeed(have, typical, _add_python(worst.total, measured), lengths, measured)


def correct_worst_case(experiment: Experiment, measured: MeasuredMemory, world: World) -> str:
    """A warning if the largest allowed rows would not fit, by the measured memory; "" if they fit or the limit is unknown."""
    expected = measured.correct(_estimate_worst_case(experiment, world).total)
    have = gpu_or_ram_bytes(experiment)
    if not 0 < have < expected:
        return ""
    used = f"step {measured.step} used {format_gb(measured.peak)} GB with rows of {measured.tokens:,} tokens"
    return f"{used}; {_describe_worst_case(experiment, expected, have)}"


def available_bytes(experiment: Experiment) -> float:
    """Bytes of RAM for a process of the experiment, on this machine or in its job; 0 if unknown."""
    if _runs_elsewhere(experiment):
        return node_memory.job_bytes(slurm.read_site()[0], experiment.launch)
    return node_memory.process_bytes()


def gpu_or_ram_bytes(experiment: Experiment) -> float:
    """Bytes of the device that trains: a GPU, or the RAM for a process; 0 if unknown. Called where the run is."""
    return gpu_memory(experiment.launch) * GB if experiment.launch.gpus_per_node else node_memory.process_bytes()


def _runs_elsewhere(experiment: Experiment) -> bool:
    """Whether the experiment is for a cluster, and this process is not a job of it."""
    return experiment.launch.where == "slurm" and not {slurm.JOB_VARIABLE, "SLURM_JOB_ID"} & {*os.environ}


def _add_python(estimate: float, measured: MeasuredMemory | None) -> float:
    return measured.correct(estimate) if measured else PYTHON_BYTES + estimate


def _estimate_worst_case(experiment: Experiment, world: World | None) -> MemoryEstimate:
    return estimate_memory(_with_panels(experiment, ProcessSpec.from_experiment(experiment), world))


def _with_panels(experiment: Experiment, process: ProcessSpec, world: World | None) -> ProcessSpec:
    """The process, if evaluation plays more episodes at the same time than training."""
    settings, at_once = experiment.evaluation, experiment.launch.device_episodes
    splits = (settings.panel, settings.final)
    tasks = (
        max(len(panel.build_panel(world, split, settings.tasks).tasks) for split in splits) if world else settings.tasks
    )
    episodes = -(-min(tasks * settings.repeats, MAX_PANEL_EPISODES) // process.ranks)
    return replace(process, episodes=max(process.episodes, min(episodes, at_once or episodes)))


def _describe_worst_case(experiment: Experiment, worst: float, have: float) -> str:
    limits = "lower launch.device_tokens or launch.device_episodes"
    if experiment.launch.gpus_per_node:
        limits += ", or use launch.trainer.gradient_checkpointing"
    context = f"env.context_tokens={experiment.env.context_tokens}"
    return f"if every row is full ({context}), a process needs {format_gb(worst)} of {format_gb(have)} GB of memory; {limits}"


# Typical lengths.


def _typical_lengths(experiment: Experiment, played: list[Trajectory]) -> RowLengths:
    """Lengths of rows with the prompts of `played` and full responses, at most those that the config allows.

    If nothing was played, a first prompt is assumed to fill a quarter of the context, with one response.
    """
    env, full = experiment.env, RowLengths.from_experiment(experiment)
    prompt = env.context_tokens // FIRST_PROMPT_DIVISOR
    row = episode = prompt + env.response_tokens
    if played:
        prompts = [[len(r.prompt) for r in t.responses] for t in played]
        if env.history == "window":
            prompt = max(map(max, prompts))
            row = episode = prompt + env.response_tokens
        else:
            prompt, later = max(p[0] for p in prompts), [n for p in prompts for n in p[1:]]
            each = env.response_tokens + (sum(later) / len(later) if later else 0)
            row = episode = round(prompt + env.max_turns * each)
    return RowLengths(min(row, full.row), min(prompt, full.prompt), min(episode, full.episode))


def _play_sample(experiment: Experiment, world: World | None) -> list[Trajectory]:
    """A few turns of some training tasks with empty responses; empty if that is not possible in a few seconds."""
    if world is None or world_check.starts_programs(world):
        return []
    try:
        tokenizer = policy.load_tokenizer(experiment.model, policy.locate(experiment.model))
        chat = Chat(tokenizer, experiment.model.system, experiment.model.thinking)
    except ConfigError:  # the model is not on this machine
        return []
    tasks = panel.select_tasks(world, "train", panel.list_tasks(world, "train"), range(SAMPLE_TASKS))
    rules = replace(experiment.env, max_turns=min(experiment.env.max_turns, SAMPLE_TURNS))

    def play(over: threading.Event) -> list[Trajectory]:
        rollout = Rollout(SerialExecutor(world), rules, chat)
        try:
            return rollout.play(
                [Episode(task, i, 0, (i,)) for i, task in enumerate(tasks)], _EmptySampler(chat.end_ids[0])
            )
        finally:
            rollout.close()

    played = user_code.run_with_timeout(play, user_code.CHECK_SECONDS) or []
    return [t for t in played if t.responses]


class _EmptySampler:
    """Ends each response with its first token."""

    def __init__(self, end: int) -> None:
        self._end = end

    def session(self) -> "_EmptySampler":
        return self

    def generate(
        self, slots: Sequence[int], prompts: Sequence[list[int]], keys: Sequence[tuple], budgets: Sequence[int]
    ) -> list[Sample]:
        return [Sample([self._end], [0.0], [0.0]) for _ in slots]
