"""Matched controls: training without modulation, in updates as large as those of the modulation.

The policy is trained with the advantages of the baseline. In each update, a *reference* tells how large the update would be with
the modulated advantages. It is the norm of the gradient (`gradient_norm`), or the effect of a trial of the optimizer step, which
is then undone (`update_norm`, `kl`). The gradient of the baseline, or its change of the weights, is multiplied by a factor, so
that it has the size of the reference. Its direction stays the same. If the factor is 1, nothing is multiplied. With lambda = 0,
the run therefore equals the baseline bit for bit.

The KL divergence is measured on the fixed states of the run (see `fixed_states`). A trial needs a second copy of the trained
weights, their gradients and the state of the optimizer. The change of the weights includes weight decay.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from aem_exp.core.errors import RunError
from aem_exp.training.snapshot import Snapshot, bound, norm
from aem_exp.training.updates import MicroBatch

if TYPE_CHECKING:
    from aem_exp.training.trainer import AEMTrainer

Match = Literal["gradient_norm", "update_norm", "kl"]
REFERENCE: Final = "modulated_advantages"  # key of a micro-batch: (N, T), the advantages of the reference


class SizeMatch(TrainerCallback):
    """Matches the size of each update to the size that the modulated advantages would give it.

    `begin_update` and `end_backward` are called around the backward passes of an update; transformers calls the other two
    methods before and after the step of the optimizer.
    """

    def __init__(self, trainer: "AEMTrainer", match: Match):
        self._trainer, self._match = trainer, match
        self._reference: list[Tensor | None] = []  # the gradients of the reference
        self._start: Snapshot | None = None  # weights and optimizer before the update
        self._before: list[Tensor] = []  # the log-probs before the update, on the fixed states
        self._target = 0.0  # the size of the reference
        self._factors: list[float] = []  # of the current step
        self._errors: list[float] = []

    def begin_update(self, inputs: Sequence[MicroBatch], accumulate: Callable[[Any], Any]) -> None:
        """Compute the gradients of the reference, and set them aside.

        Args:
            inputs: the micro-batches of the update.
            accumulate: runs the forward and backward passes of micro-batches.
        """
        trainer = self._trainer
        metrics = {
            mode: {name: list(values) for name, values in each.items()} for mode, each in trainer._metrics.items()
        }
        devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # both gradients use the same dropout masks
            accumulate([{**batch, "advantages": batch[REFERENCE]} for batch in inputs])
        for mode, each in metrics.items():  # TRL's metrics are those of the training, without the reference
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(each)
        self._reference = [p.grad for p in self._parameters]
        trainer.model.zero_grad(set_to_none=True)

    def end_backward(self) -> None:
        """Scale the gradient of the update, for `gradient_norm`.

        Raises:
            RunError: the gradient of the reference is not finite.
        """
        if not math.isfinite(target := norm(self._reference)):
            step = self._trainer.time.step + 1
            problem = f"the norm of the gradient with the modulated advantages is {target} in step {step}"
            raise RunError(f"{problem}; a lower trainer.learning_rate or trainer.max_grad_norm may help", "nan")
        if self._match == "gradient_norm" and self._reference:
            gradients = [p.grad for p in self._parameters]
            size = norm(gradients)
            factor = target / size if size else 1.0
            _scale(gradients, factor)
            self._record(factor, 0.0)
            self._reference = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the reference with a trial step; then restore the weights, the gradients and the optimizer."""
        if not any(gradient is not None for gradient in self._reference):
            return
        trainer, optimizer = self._trainer, self._trainer.optimizer.optimizer
        self._start = start = Snapshot(trainer.model, optimizer)
        if self._match == "kl":
            self._before = self._states.log_probs()
        own = [p.grad for p in self._parameters]
        self._set_gradients(self._reference)
        if args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), args.max_grad_norm)
        optimizer.step()
        self._target = self._size(start)
        start.restore()
        self._set_gradients(own)
        self._reference = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Scale the change of the weights; at the end of a step, log the factors."""
        if self._start is not None:
            self._rescale(self._start)
            self._start, self._before = None, []
        if self._trainer.time.is_last_update and self._factors:
            self._trainer.aem_callback.metrics |= {
                "aem/match_factor": sum(self._factors) / len(self._factors),
                "aem/match_error": max(self._errors),
            }
            self._factors, self._errors = [], []

    def _rescale(self, start: Snapshot) -> None:
        """Scale the change of the weights so that its size equals that of the reference."""
        if self._match == "kl":
            factor = start.scale_to_kl(lambda: self._size(start), self._target)
        else:
            size = self._size(start)
            factor = bound(self._target / size) if size else 1.0
            start.scale(start.current_weights(), factor)
        reached = self._size(start)
        self._record(factor, abs(reached - self._target) / (max(reached, self._target) or 1.0))

    def _size(self, start: Snapshot) -> float:
        """Size of the change of the weights since the start of the update."""
        return self._states.mean_kl(self._before, self._states.log_probs()) if self._match == "kl" else start.distance()

    @property
    def _states(self) -> Any:
        states = self._trainer.step_size.states
        assert states is not None, "an update trains responses, so the run has fixed states"
        return states

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self._trainer.model.parameters() if p.requires_grad]

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _record(self, factor: float, error: float) -> None:
        self._factors.append(factor)
        self._errors.append(error)


@torch.no_grad()
def _scale(gradients: Sequence[Tensor | None], factor: float) -> None:
    for gradient in gradients:
        if gradient is not None and factor != 1:
            gradient.mul_(factor)
