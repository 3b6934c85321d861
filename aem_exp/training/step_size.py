"""Measures the size of each step in three ways: gradients, weights, and the policy's distributions on fixed states.

The norm of the gradient is not the size of a step. Adam divides a gradient by a running average of its own magnitude, so a
constant factor of all gradients changes almost nothing. A factor that differs between updates or between weights does change the
step. Compare arms by the change of the weights (`train/weight_change`) or of the policy (`train/step_kl`).

The measurements use no random numbers and change no weight: a run trains the same bits with and without them.
"""

import time as clock_time
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from aem_exp.rundir import FIXED_STATES
from aem_exp.training import fsdp
from aem_exp.training.fixed_states import FixedStates, choose_contexts, load_contexts, save_contexts, vocabulary_size

if TYPE_CHECKING:
    from aem_exp.rollout.types import Trajectory
    from aem_exp.training.trainer import AEMTrainer

SAMPLED_ELEMENTS: Final = 1 << 16  # about this many elements of a larger tensor are compared, at equal distances


class WeightSample:
    """A copy of the trained weights: exact for small tensors, some elements of large ones.

    `distance` is exact if no tensor has more than `SAMPLED_ELEMENTS` elements. The squared change of a larger tensor is the sum
    over the copied elements, times all elements per copied element.
    """

    def __init__(self, model: torch.nn.Module):
        fsdp.free_full_weights(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._values = [_sample(p).clone() for p in self._parameters]

    @torch.no_grad()
    def squared_distance(self) -> Tensor:
        """Squared norm of the change of the weights since the copy, in float64; with sharded weights, the share of this rank."""
        parts = [torch.zeros((), dtype=torch.float64)]
        for parameter, value in zip(self._parameters, self._values, strict=True):
            now = _sample(parameter)
            if now.numel():
                scale = _local(parameter).numel() / (now.numel() * _replicas(parameter))
                parts.append((now.double() - value.double()).square().sum().cpu() * scale)
        return torch.stack(parts).sum()


def _local(parameter: Tensor) -> Tensor:
    """The elements of a parameter that this rank has."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _replicas(parameter: Tensor) -> int:
    """Number of ranks that have the same shard of a sharded parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    sizes = [mesh.size(dim) for dim, placement in enumerate(parameter.placements) if placement.is_replicate()]
    return int(torch.tensor(sizes or [1]).prod())


def _sample(parameter: Tensor) -> Tensor:
    """Elements of a parameter at equal distances. The distance and the row length have no common divisor, so that all columns
    of a matrix are visited."""
    local = _local(parameter)
    stride = -(-local.numel() // SAMPLED_ELEMENTS)
    while stride > 1 and gcd(stride, local.shape[-1]) > 1:
        stride += 1
    return local.reshape(-1)[:: max(1, stride)]


class StepSizeMeter(TrainerCallback):
    """Measures each step, and adds the results to the metrics of the step.

    Each rank measures; all ranks must call the same methods. With sharded weights, each rank has a share of the weights and of
    the fixed states.

    Attributes:
        states: the fixed states, from the first step on; None if no response could be chosen.
    """

    def __init__(self, trainer: "AEMTrainer"):
        self._trainer = trainer
        self._file = Path(trainer.args.output_dir) / FIXED_STATES
        self._gradient_norms: list[float] = []
        self._weights: WeightSample | None = None
        self._log_probs: list[Tensor] = []
        self._is_trained = False
        self.states: FixedStates | None = None

    def begin_step(self, played: "list[Trajectory]", is_trained: bool) -> None:
        """Remember the policy before the updates of a step.

        Args:
            played: all trajectories of the step, dropped ones included.
            is_trained: whether the step has updates.
        """
        start = clock_time.perf_counter()
        self._is_trained, self._gradient_norms = is_trained, []
        if self._weights is None:  # the first step of this process; later, the end of the last step is remembered
            self.states = self._open_states(played)
            self._log_probs = self.states.log_probs() if self.states else []
            self._weights = WeightSample(self._trainer.model)
        self._trainer.aem_callback.metrics["time/step_size"] = clock_time.perf_counter() - start

    def _open_states(self, played: "list[Trajectory]") -> FixedStates | None:
        """The states of the run, chosen in its first step and later read from its directory. A continued run has its parent's."""
        trainer = self._trainer
        if trainer.time.step > 0 and self._file.exists():
            contexts = load_contexts(self._file)
        else:
            history, groups = trainer.rollout.env.history, trainer.dynamic_sampling.groups
            contexts = choose_contexts(played, history, groups, vocabulary_size(trainer.model))
            if trainer.accelerator.is_main_process:
                save_contexts(self._file, contexts)
        return FixedStates(trainer, contexts, trainer.update_settings.device_rows) if contexts else None

    def add_gradient_norm(self, norm: float) -> None:
        """Add the norm of the gradient of one update, before clipping."""
        self._gradient_norms.append(norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the step after its last update."""
        trainer = self._trainer
        if trainer.time.is_last_update and self._weights is not None:
            start = clock_time.perf_counter()
            trainer.aem_callback.metrics |= self._measure_step()
            trainer.aem_callback.metrics["time/step_size"] += clock_time.perf_counter() - start

    def _measure_step(self) -> dict[str, float]:
        """The metrics of a step; the policy is then remembered as the start of the next step."""
        norms = self._gradient_norms if self._is_trained else []
        out = {"train/grad_norm_mean": sum(norms) / len(norms) if norms else 0.0}
        out["train/weight_change"] = self._weight_change()
        if sum(norms) > 0:
            out["train/effective_learning_rate"] = out["train/weight_change"] / sum(norms)
        if self.states:
            out["train/step_kl"] = self._step_kl(self.states)
        return out

    def _weight_change(self) -> float:
        if not self._is_trained:
            return 0.0
        assert self._weights is not None
        squared, accelerator = self._weights.squared_distance(), self._trainer.accelerator
        self._weights = WeightSample(self._trainer.model)
        if any(isinstance(p, DTensor) for p in self._trainer.model.parameters()):
            squared = accelerator.reduce(squared.float().to(accelerator.device), "sum").cpu()
        return float(squared.sqrt())

    def _step_kl(self, states: FixedStates) -> float:
        if not self._is_trained:
            return 0.0
        before, self._log_probs = self._log_probs, states.log_probs()
        return states.mean_kl(before, self._log_probs)
