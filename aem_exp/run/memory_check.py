"""Compares the peak memory of the first step with its estimate, and warns if the largest allowed rows would not fit."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aem_exp.cluster import distributed, node_memory
from aem_exp.core.errors import ConfigError
from aem_exp.jobs import ram
from aem_exp.jobs.memory import estimate_memory
from aem_exp.jobs.sizes import ProcessSpec
from aem_exp.rollout.types import Trajectory
from aem_exp.run.context import RunContext
from aem_exp.rundir import measured_memory
from aem_exp.rundir.measured_memory import MeasuredMemory

log = logging.getLogger("aem_exp")
BatchSizes = Sequence[Sequence[tuple[int, int]]]
"""For each update of a step: rows and tokens per row of its micro-batches."""


@dataclass
class MemoryCheck:
    """Collects what was played until the end of the first step, then compares once.

    A policy that is made on this machine (`model.make`) is small and is not checked.
    """

    context: RunContext
    base: float = field(default_factory=node_memory.resident_bytes)
    """Resident bytes before the policy is loaded."""
    _episodes: int = 0
    _prompt: int = 0
    _context_tokens: int = 0
    _is_done: bool = False

    def add_played(self, played: Sequence[Trajectory]) -> None:
        """Take note of the episodes that were played at the same time, and of the lengths of their prompts and contexts."""
        if self._is_done:
            return
        window = self.context.experiment.env.history == "window"
        self._episodes = max(self._episodes, len(played))
        for responses in (t.responses for t in played if t.responses):
            sizes = [(len(r.prompt), len(r.prompt) + len(r.sample.ids)) for r in responses]
            self._prompt = max(self._prompt, max(p for p, _ in sizes) if window else sizes[0][0])
            longest = max(n for _, n in sizes) if window else sum(n for _, n in sizes)
            self._context_tokens = max(self._context_tokens, longest)

    def finish_step(self, step: int, peak: float, updates: BatchSizes) -> None:
        """Compare the peak, in bytes, with the estimate for the sizes that were seen. A step without updates is skipped."""
        if self._is_done or not any(updates) or not distributed.is_main_process():
            return
        self._is_done = True
        experiment = self.context.experiment
        if experiment.model.path is None or peak <= (0 if experiment.launch.gpus_per_node else self.base):
            return
        try:
            measured = self._measure(step, peak, updates)
            expected = ram.correct_worst_case(experiment, measured, self.context.world)
        except ConfigError:  # the model cannot be traced
            return
        measured_memory.write(self.context.folder, measured)
        if expected:
            log.warning(expected)

    def _measure(self, step: int, peak: float, updates: BatchSizes) -> MeasuredMemory:
        experiment = self.context.experiment
        process = ProcessSpec.from_experiment(experiment)
        episodes = -(-self._episodes // process.ranks)
        process = replace(
            process,
            episodes=min(episodes, experiment.launch.device_episodes or episodes),
            prompt=self._prompt,
            play_tokens=self._context_tokens,
        )
        estimate = self._estimate(process, updates)
        rows, tokens = max((size for update in updates for size in update), key=math.prod)
        base = 0.0 if process.passes.gpu else self.base
        return MeasuredMemory(step, peak, base, estimate, rows, tokens, process.episodes)

    def _estimate(self, process: ProcessSpec, updates: BatchSizes) -> float:
        """The estimate for the micro-batches of a step. Gradients exist from the second micro-batch of an update on, and the
        moments of the optimizer exist from the second update on."""
        resumed, largest = self.context.start.checkpoint is not None, dict[tuple[bool, bool], tuple[int, int]]()
        for i, update in enumerate(updates):
            for j, size in enumerate(update):
                kind = (i > 0 or resumed, j > 0)
                largest[kind] = max(largest.get(kind, (0, 0)), size, key=math.prod)
        estimates = []
        for (has_moments, accumulates), (rows, tokens) in largest.items():
            need = estimate_memory(replace(process, rows=rows, tokens=tokens, accumulates=accumulates))
            estimates.append(need.total if has_moments else need.total_before_moments)
        return max(estimates)
