"""Decides lambda, and what happens at the end of a step: evaluation, metrics, checkpoints and stopping."""

import resource
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from aem_exp.training.step_counter import StepCounter

_LOGGED = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "kl": "train/kl",
    "clip_ratio/low_mean": "train/clip_low",
    "clip_ratio/high_mean": "train/clip_high",
    "aux_loss": "train/aux_loss",
}


class AEMCallback(TrainerCallback):
    """Computes lambda at each step; evaluates, logs, saves and stops at the end of a step.

    Args:
        time: the step counter, shared with the trainer.
        schedule: lambda as a function of progress in [0, 1]; None: no modulation.
        gate: in nats; see `aem.coefficients`.
        report: receives the number of finished steps and the metrics of the last one, on the first rank.
        evaluate: returns metrics on the dev panel; called every `evaluate_every` steps and after the last step.
        evaluate_every: in steps; 0: only after the last step.
        evaluate_final: returns metrics on the final panel; called after each of `final_steps`.
        save_every: steps between checkpoints; 0: only at the end.
        should_stop: called at the end of a step; if it is true on any rank, all ranks save and stop.
        begin: called once, before the first step.
    """

    def __init__(
        self,
        time: StepCounter,
        schedule: Callable[[float], float] | None = None,
        gate: float = 0.1,
        report: Callable[[int, dict[str, float]], None] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        evaluate_final: Callable[[], dict[str, float]] | None = None,
        final_steps: Collection[int] = (),
        save_every: int = 0,
        should_stop: Callable[[], bool] | None = None,
        begin: Callable[[], None] | None = None,
    ):
        self.should_stop, self.begin = should_stop, begin
        self.time, self.schedule, self.gate = time, schedule, gate
        self.report, self.evaluate = report, evaluate
        self.evaluate_every, self.save_every = evaluate_every, save_every
        self.evaluate_final, self.final_steps = evaluate_final, final_steps
        self.metrics: dict[str, float] = {}

    @property
    def lam(self) -> float | None:
        """lambda of the current step; None: no modulation."""
        return self.schedule(self.time.progress) if self.schedule else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.begin:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.time.is_last_update:
            return
        self.time.step += 1
        if self.evaluate and (self.time.is_finished or self._is_due(self.evaluate_every)):
            self.metrics |= self.evaluate()
        if self.evaluate_final and self.time.step in self.final_steps:
            self.metrics |= self.evaluate_final()
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Report a finished step, then decide whether to save and stop; `report` may have requested a stop."""
        logs = logs or {}
        if "train_runtime" in logs:  # the final summary of transformers
            return
        if self.report and state.is_world_process_zero:
            self.metrics |= _time_shares(self.metrics) | {"memory/peak_gb": _peak_gb()}
            from_trl = {name: logs[key] for key, name in _LOGGED.items() if logs.get(key) is not None}
            self.report(self.time.step, {**self.metrics, **from_trl})
        self.metrics = {}
        stop = self.time.is_finished or (self.should_stop is not None and any(gather_object([self.should_stop()])))
        control.should_save = stop or self._is_due(self.save_every)
        control.should_training_stop = stop

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.time.step % every == 0


def _time_shares(metrics: dict[str, float]) -> dict[str, float]:
    """Shares of the step time per activity, and `time/idle_share`: the share of the rollout in which nothing is generated.

    `time/environment` counts only the time without generation (see `rollout.clock`).
    """
    names = ("weights", "generation", "environment", "scoring", "aem", "update", "step_size")
    seconds = {name: metrics[f"time/{name}"] for name in names if f"time/{name}" in metrics}
    total, idle = sum(seconds.values()), seconds.get("environment", 0.0)
    rollout = idle + seconds.get("generation", 0.0)
    shares = {f"time/{name}_share": value / total for name, value in seconds.items()} if total else {}
    return shares | ({"time/idle_share": idle / rollout} if rollout else {})


def _peak_gb() -> float:
    """Peak memory in GB: on a GPU since the last step, on a CPU since the start of the process."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
