"""Takes the updates of the branches, in the training loop of a run.

The trainer is that of the run, resumed from its checkpoint; only the source of its updates differs. After each update, the
weights and the optimizer are restored exactly.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aem_exp.branch.measures import predict_change
from aem_exp.branch.probe import Probe
from aem_exp.config import ConfigError, Modulation, instantiate
from aem_exp.rollout.types import Trajectory
from aem_exp.training.build import build_variant
from aem_exp.training.credit import MeasuredCredit
from aem_exp.training.snapshot import Snapshot
from aem_exp.training.trainer import AEMTrainer
from aem_exp.training.updates import MicroBatch

Record = Callable[[int, dict[str, Any]], None]  # index of the batch, its measurements


class BranchTrainer(AEMTrainer):
    """An `AEMTrainer` whose updates are branches: each begins at the same weights and the same state of the optimizer."""

    branches: "Branches"
    grad_norm: float = 0.0
    """norm of the newest gradient before clipping"""

    def iterate_updates(self) -> Iterator[list[MicroBatch]]:
        """Yield the updates of all branches. After the last one, training stops."""
        yield from self.branches.iterate_updates(self)
        self.control.should_training_stop = True

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.grad_norm = float(norm)
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.branches.with_optimizer_state:
            super()._load_optimizer_and_scheduler(checkpoint)


@dataclass
class Branches:
    """The branches to take, and how they are measured.

    Attributes:
        arms: name -> modulation.
        batches: indices of the batches to play.
        make_probe: model -> the probe at the fixed states, the same for all batches.
        make_own_probe: trainer, trajectories of the batch, its index -> the probe at its first turns; None: not measured.
        record: receives the measurements of each batch.
        advance: called after each update.
        kl: scale each update to this KL at the fixed states, in nats; None: take it as it is.
        with_optimizer_state: load the optimizer state of the checkpoint.
    """

    arms: Mapping[str, Modulation]
    batches: Sequence[int]
    make_probe: Callable[[BranchTrainer], Probe]
    make_own_probe: Callable[[BranchTrainer, list[Trajectory], int], Probe | None]
    record: Record
    advance: Callable[[], None] = lambda: None
    kl: float | None = None
    with_optimizer_state: bool = True

    def iterate_updates(self, trainer: BranchTrainer) -> Iterator[list[MicroBatch]]:
        """Yield one update per batch and arm. When the next one is requested, the previous one has been made."""
        trainer.time.is_last_update = False  # the step never ends: nothing is logged, evaluated or saved
        _check_learning_rate(trainer)
        probe = self.make_probe(trainer)
        start = Snapshot(trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer.optimizer)
        for batch in self.batches:
            played = trainer.play(batch)
            own = self.make_own_probe(trainer, played.kept, batch)
            measured = {}
            for name, modulation in self.arms.items():
                set_modulation(trainer, modulation)
                trainer.aem_callback.metrics["time/update"] = 0.0
                assigned = trainer.assign_credit(played.kept, played.dropped)
                credit, step_updates = trainer.build_updates(assigned, batch)
                trainer.grad_norm = 0.0
                with torch.random.fork_rng():  # dropout is the same in all arms
                    yield from step_updates
                measured[name] = self._measure(trainer, start, probe, own, credit)
                start.restore()
                self.advance()
            won = [t.won for t in (*played.kept, *played.dropped)]
            self.record(batch, {"success": sum(won) / max(1, len(won)), "arms": measured})

    def _measure(
        self, trainer: BranchTrainer, start: Snapshot, probe: Probe, own: Probe | None, credit: MeasuredCredit
    ) -> dict[str, float]:
        if self.kl is not None:
            start.scale_to_kl(lambda: probe.measure()["kl"], self.kl, lowest=0.0, highest=math.inf)
        out = probe.measure() | predict_change(credit, trainer.rollout.env.history)
        if own is not None:
            out |= {f"own_{name}": value for name, value in own.measure().items()}
        return out | {"norm": start.distance(), "grad_norm": trainer.grad_norm}


def set_modulation(trainer: AEMTrainer, modulation: Modulation) -> None:
    """Let a trainer modulate the credit of the next step like this."""
    trainer.variant = build_variant(modulation)
    trainer.aem_callback.schedule = instantiate(modulation.lam) if modulation.lam else None
    trainer.aem_callback.gate = modulation.gate


def _check_learning_rate(trainer: BranchTrainer) -> None:
    optimizer = trainer.optimizer
    assert optimizer is not None
    if not any(group["lr"] for group in optimizer.param_groups):
        remedy = "the learning rate is 0 there, so no update changes the weights; use an earlier checkpoint or --optimizer sgd"
        raise ConfigError("--step", trainer.time.step, remedy)
