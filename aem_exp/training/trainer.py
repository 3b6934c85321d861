"""The only room that speaks TRL: AEM as a seam in front of TRL's own loss.

TRL stays the optimiser, the losses, the sharding and the checkpoints. What changes is the batch: `AEMTrainer` plays
episodes, assigns credit per response, modulates it, and hands TRL's loss the (N, T) advantages that it accepts.

A *step* is one rollout batch; an *update* is one optimizer step. One item of the data loader is one update: a list of
micro-batches. So the number of updates in a step may float, and everything that people count (schedules, logs,
evaluations, saves) counts steps.

Where TRL averages over the rows of a micro-batch, dead ones included, the loss is rescaled: the gradient of an update
depends on neither padding nor the split into micro-batches and ranks.
"""

import contextlib
import math
import time as clock_time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from aem_exp import aem
from aem_exp.config import Experiment, instantiate
from aem_exp.config.trainer_keys import ROW_MEAN_LOSSES
from aem_exp.core.errors import RunError
from aem_exp.rollout.clock import Clock
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.rows import Row
from aem_exp.rollout.sampling.base import Sampler, keyed_generator
from aem_exp.rollout.types import CRASHED, Episode, Trajectory
from aem_exp.rundir import checkpoints
from aem_exp.training import fsdp, modulation
from aem_exp.training.arguments import build_grpo_config
from aem_exp.training.batch import DEAD_ROW, pack_rows, plan_updates, sampler_logps_and_entropies, split_micro_batches
from aem_exp.training.callback import AEMCallback, StepCounter
from aem_exp.training.credit import (
    Credit,
    Estimator,
    annotate_responses,
    assign_credit,
    drop_uninformative_groups,
    step_metrics,
)
from aem_exp.training.modulation import ModulationVariant

Batch = dict[str, Tensor]
PAPER = ModulationVariant()

_SAMPLER_GAP = 1e-3  # nats that a float32 session may differ from a scoring pass
_ENGINE_GAP = 0.1  # nats that another engine may differ on average, by its own arithmetic
_COMPARE_EVERY = 50  # steps


@dataclass
class Update:
    """One optimizer step of this rank: its micro-batches, and the sizes of the whole update over all ranks."""

    micro_batches: list[list[int]]
    live_rows: int
    tokens: int
    batches: list[Batch] = field(default_factory=list)


class AEMTrainer(GRPOTrainer):
    """GRPOTrainer whose batches are episodes, with one advantage per response.

    Args:
        callback: owns lambda and the clock.
        draw: (step, round) -> the episodes of one round of a step; the same on every rank.
        rollout: plays them.
        make_sampler: this trainer -> what generates.
        estimator: from `advantages`.
        mini_batch: rows per update; 0: all rows of a step in one update.
        epochs: how often a step's rows are trained (mu in the GRPO paper).
        device_rows: rows per micro-batch and device; 0: no limit.
        device_tokens: tokens per micro-batch and device, padding included; 0: no limit.
        arm: where modulation departs from the paper.
        groups: how many a step should train on.
        drop_equal: groups of equal returns leave the step.
        rounds: rounds of play per step, at most: more are played until there are enough groups (DAPO's dynamic sampling).
        mask_cut: trajectories that the world did not end are not trained; see `credit.assign`.
        count_masked: they count among the rows that a loss is the mean of.
        trust_sampler: the sampler's own log-probs are exact (a local float32 session), so nothing is scored again.
        publish: hands this trainer's weights to whatever generates in other processes, before play that follows an update;
            None: what generates has these very weights, or sees to it.
        penalty: subtracted from the score of an invalid turn.
        keep: receives the number of finished steps and the step's credit, for the record.
        before_save: told before a checkpoint is written: what it counts on must be on disk by then.
    """

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        processing_class: Any,
        *,
        callback: AEMCallback,
        draw: Callable[[int, int], list[Episode]],
        rollout: Rollout,
        make_sampler: Callable[[Any], Sampler],
        estimator: Estimator,
        mini_batch: int = 0,
        epochs: int = 1,
        device_rows: int = 0,
        device_tokens: int = 0,
        arm: ModulationVariant = PAPER,
        groups: int = 0,
        drop_equal: bool = False,
        rounds: int = 1,
        mask_cut: bool = False,
        count_masked: bool = False,
        trust_sampler: bool = True,
        publish: Callable[[Any], None] | None = None,
        penalty: float = 0.0,
        keep: Callable[[int, Credit], None] | None = None,
        before_save: Callable[[int], None] | None = None,
        **kwargs: Any,
    ):
        from datasets import Dataset

        placeholder = Dataset.from_dict({"prompt": [""] * args.generation_batch_size})  # TRL wants one; nobody reads it
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            reward_funcs=_rewards_come_from_environments,
            train_dataset=placeholder,
            callbacks=[callback],
            **kwargs,
        )
        if (
            args.device.type == "cpu"
        ):  # several processes on CPUs are told "cpu:0", to which torch restores no checkpoint
            args.__dict__["_setup_devices"] = torch.device("cpu")
        self.remove_callback(PrinterCallback)  # the terminal is the door's
        self.aem, self.time = callback, callback.time
        self.draw, self.rollout, self.sampler, self.keep = draw, rollout, make_sampler(self), keep
        self.before_save = before_save
        self.credit = partial(
            assign_credit,
            history=rollout.env.history,
            estimator=estimator,
            penalty=penalty,
            mask_cut=mask_cut,
            unit=arm.unit,
        )
        self.arm, self.mask_cut, self.count_masked = arm, mask_cut, count_masked
        self.groups, self.drop_equal, self.rounds = groups, drop_equal, rounds
        self.device_tokens = device_tokens
        self.mini_batch, self.epochs, self.device_rows = mini_batch, epochs, device_rows
        self.trust_sampler, self._bonus = trust_sampler, args.entropy_coef
        self.publish, self._published = publish, -1  # at which update
        # TRL's loss takes the correction for tokens that other weights have sampled.
        self.use_vllm: bool = args.use_vllm or publish is not None
        self.clock = Clock()

    # The way of the data: episodes -> credit -> updates -> TRL's loss.

    def updates(self) -> Iterator[list[Batch]]:
        """The updates of all steps that are left. A step is played when its first update is asked for.

        A step without updates yields one of no micro-batches. It leaves no gradients, so the optimizer skips every weight,
        and what happens at the end of a step happens.
        """
        while not self.time.is_finished:
            step = self.time.step
            played, dropped = self.play(step)
            credit = self.credit(played, dropped=dropped)
            updates = self.batches(credit, step)
            self._record_metrics(credit, len(updates))
            self.time.updates += len(updates)
            for i, batches in enumerate(updates or [[]]):
                self.time.is_last_update = i >= len(updates) - 1
                yield batches

    def play(self, step: int) -> tuple[list[Trajectory], list[Trajectory]]:
        """Play until there are enough groups that can teach: those, and what was played besides (DAPO, arXiv 2503.14476).

        Where all rounds together have too few, the last one is kept whole, as in verl-agent. A round that brings exactly as
        many as are needed ends the play and its equal groups are dropped; verl-agent keeps them in that case. They have no
        advantage, but count in a mean over tokens, and get the KL and entropy terms.
        """
        kept: list[Trajectory] = []
        dropped: list[Trajectory] = []
        for number in range(self.rounds):
            played = self._play_round(self.draw(step, number), step)
            useful, equal = drop_uninformative_groups(played, self.mask_cut) if self.drop_equal else (played, [])
            kept, dropped = kept + useful, dropped + equal
            if len({t.draw for t in kept}) >= self.groups:
                break
        else:
            if self.rounds > 1 or not kept:
                kept, dropped = kept + equal, dropped[: len(dropped) - len(equal)]
        self.aem.metrics["train/rounds"] = number + 1
        return kept, dropped

    def play_distributed(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        """Play: each rank its part. All ranks get all trajectories."""
        size = -(-len(episodes) // self.accelerator.num_processes)
        start = self.accelerator.process_index * size
        if self.publish and self._published != self.state.global_step:
            with self.clock("weights"):
                self.publish(self)
            self._published = self.state.global_step
        with (
            contextlib.nullcontext() if self.use_vllm else self._full_weights()
        ):  # vLLM and servers have weights of their own
            played = self.rollout.play(episodes[start : start + size], sampler)
        return gather_object(played)

    def _full_weights(self) -> contextlib.AbstractContextManager[None]:
        """All weights in each process, where they are trained in pieces."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return fsdp.full_weights(self.model, reshard=plugin is None or plugin.reshard_after_forward)

    def _play_round(self, episodes: list[Episode], step: int) -> list[Trajectory]:
        played = self.play_distributed(episodes, self.sampler)
        if all(t.ended == CRASHED for t in played):
            raise RunError(f"every environment crashed in step {step + 1}; the first: {played[0].error}", "env")
        return played

    def batches(self, credit: Credit, step: int) -> list[list[Batch]]:
        """The updates of a step; none where its loss is zero. Old log-probs, entropies and coefficients are measured once and
        stay fixed.
        """
        updates = self._plan_updates(credit, step)
        told = all(row.logps for row in credit.rows)
        with self.clock("scoring"):
            for update in updates:
                update.batches = [self._score_micro_batch(credit, micro, told) for micro in update.micro_batches]
            credit.surprisal_R = self._sum_over_ranks(credit.surprisal_R)
        with self.clock("aem"):
            credit.entropy_R = self._sum_over_ranks(credit.entropy_R)
            if self.aem.lam is not None:
                self._modulate(credit, step)
            if self._loss_is_zero(credit):
                credit.trained = False
                return []
            for update in updates:
                for micro, batch in zip(update.micro_batches, update.batches, strict=True):
                    batch["advantages"] = _token_advantages(credit, micro, batch["tool_mask"], self.arm.unit)
        for update in updates:
            for batch in update.batches:
                self._set_loss_weights(batch, update, self._loss_denominator(credit) / len(credit.rows))
        return [update.batches for update in updates] * self.epochs

    def _loss_is_zero(self, credit: Credit) -> bool:
        """Whether no term of the loss has a gradient. With one of zero, Adam's momentum would move the weights all the same."""
        other_terms = self.beta or self._bonus or self.aux_loss_enabled
        return not credit.rows or not (other_terms or credit.final_advantage_U.any())

    def _plan_updates(self, credit: Credit, step: int) -> list[Update]:
        lengths = [len(row.prompt) + len(row.completion) for row in credit.rows]
        ranks, me = self.accelerator.num_processes, self.accelerator.process_index
        shares = [
            plan_updates(lengths, self.mini_batch, keyed_generator((self.args.seed, "updates", step)), rank, ranks)
            for rank in range(ranks)
        ]
        out = []
        for update in zip(*shares, strict=True):
            live = [i for share in update for i in share if i != DEAD_ROW]
            tokens = sum(sum(credit.rows[i].mask) for i in live)
            micros = [split_micro_batches(share, lengths, self.device_rows, self.device_tokens) for share in update]
            idle = max(map(len, micros)) - len(micros[me])
            mine = micros[me] + [[DEAD_ROW]] * idle  # ranks that share the weights do as many passes as each other
            out.append(Update(mine, len(live), tokens))
        return out

    def _score_micro_batch(self, credit: Credit, micro: list[int], told: bool) -> Batch:
        """Pack a micro-batch with its old log-probs, and note the entropies and surprisals of its responses.

        `told`: the sampler gave log-probs; another engine's are its own, and are corrected for.
        Where each row is trained once and in one update, old log-probs are left out: the ratio is then 1 exactly.
        """
        batch = pack_rows(credit.rows, micro, self._tokenizer.pad_token_id)
        if self.trust_sampler:
            logps, entropies = sampler_logps_and_entropies(credit.rows, micro, batch["completion_ids"].shape[1])
            self._check_sampler_gap(batch, logps, entropies)
        else:
            logps, entropies = self._score(self.model, batch)
            if told:
                self._set_importance_ratio(batch, credit.rows, micro, logps, entropies)
        if self.mini_batch or self.epochs > 1:
            batch["old_per_token_logps"] = logps
        if self.beta:
            batch["ref_per_token_logps"] = self._reference(batch)
        response_NT = aem.responses(batch["tool_mask"])
        owned = credit.response_ids(micro)
        credit.entropy_R[owned] = aem.response_entropy(entropies, response_NT)
        credit.surprisal_R[owned] = aem.response_entropy(-logps, response_NT)
        if self.arm.unit == "token":
            signal_NT = entropies if self.arm.signal == "entropy" else -logps
            credit.signal_U[credit.unit_ids(micro)] = signal_NT[response_NT >= 0]
        return batch

    def _set_importance_ratio(
        self, batch: Batch, rows: list[Row], micro: list[int], logps: Tensor, entropies: Tensor
    ) -> None:
        """Weigh each token by how much likelier the policy finds it than the engine that sampled it did, up to a cap.

        The engine's entropies are compared as its log-probs are, where it has any.
        """
        sampled, told = sampler_logps_and_entropies(rows, micro, batch["completion_ids"].shape[1])
        apart = (logps - sampled) * batch["tool_mask"]
        gaps = {"sampler_gap": ("log-probs", apart)}
        if all(rows[i].entropies for i in micro if i != DEAD_ROW):
            gaps["sampler_entropy_gap"] = ("entropies", (entropies - told) * batch["tool_mask"])
        for name, (what, difference) in gaps.items():
            gap = (difference.abs().sum() / batch["tool_mask"].sum().clamp(min=1)).item()
            self.aem.metrics[f"train/{name}"] = gap
            if gap > _ENGINE_GAP:
                raise RunError(
                    f"the engine's {what} are {gap:.2g} nats away from the policy's on average (at most {_ENGINE_GAP}): "
                    "it does not sample from these weights, or at another temperature"
                )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            low, high = self.args.vllm_importance_sampling_clip_min or 0.0, self.args.vllm_importance_sampling_clip_max
            batch["importance_sampling_ratio"] = apart.exp().clamp(min=low, max=high)

    def _modulate(self, credit: Credit, step: int) -> None:
        """Give each unit its coefficient; all ranks compute the same."""
        if self.arm.unit == "token":
            credit.signal_U = self._sum_over_ranks(credit.signal_U)
        else:
            credit.signal_U = credit.entropy_R if self.arm.signal == "entropy" else credit.surprisal_R
        trajectory_U = credit.trajectory_R[credit.response_U]
        group_U, advantage_U = credit.group_M[trajectory_U], credit.advantage_R[credit.response_U]
        rng = keyed_generator((self.args.seed, "shuffle", step))
        lam = self.aem.lam or 0.0
        scope_U = modulation.scope_ids(self.arm, group_U, trajectory_U)
        credit.metrics["aem/gated_share"] = aem.gated(credit.signal_U, scope_U, self.aem.gate).float().mean().item()
        alpha_U = modulation.coefficients(self.arm, credit.signal_U, scope_U, lam, self.aem.gate, rng)
        credit.alpha_U = modulation.filter_by_entropy_effect(self.arm, advantage_U, alpha_U)
        if self.arm.keep != "all":
            credit.metrics["aem/kept_share"] = (credit.alpha_U > 0).float().mean().item()
        credit.addition_U = modulation.advantage_bonus(
            self.arm, advantage_U, credit.alpha_U, credit.signal_U, trajectory_U
        )

    def _sum_over_ranks(self, value_U: Tensor) -> Tensor:
        """What each rank measured of its own rows, on all of them."""
        return self.accelerator.reduce(value_U.to(self.accelerator.device), "sum").cpu()

    def _loss_denominator(self, credit: Credit) -> int:
        """How many rows, or trajectories, a loss that is a mean over them divides by in a step; see `count_masked`."""
        counted = [*credit.kept, *(credit.filtered if self.count_masked else ())]
        if self.loss_type == "dr_grpo" or self.rollout.env.history == "full":
            return len(counted)
        return sum(len(t.responses) for t in counted)

    def _set_loss_weights(self, batch: Batch, update: Update, averaged_per_row: float) -> None:
        """Make the sum over micro-batches, and the mean over ranks, an average over the whole update.

        `loss_weight` multiplies what TRL returns. `bonus_weight` takes that back for the entropy bonus, which TRL averages
        over the tokens of a micro-batch whatever the loss. Dr. GRPO divides by a constant per trajectory, not per row, and
        masked trajectories, which have no rows, may count: `averaged_per_row` says how many are counted for each row.
        """
        ranks = self.accelerator.num_processes
        token_share = batch["tool_mask"].sum().item() * ranks / max(1, update.tokens)
        weight = 1.0
        if self.loss_type == "bnpo":
            weight = token_share
        elif self.loss_type in ROW_MEAN_LOSSES:
            weight = len(batch["tool_mask"]) * ranks / (update.live_rows * averaged_per_row)
        batch["num_items_in_batch"] = torch.tensor(float(update.tokens))
        batch["loss_weight"] = torch.tensor(weight)
        batch["bonus_weight"] = torch.tensor(token_share / weight if weight else 0.0)

    def _record_metrics(self, credit: Credit, updates: int) -> None:
        """Leave the step's numbers where the callback finds them."""
        spent = self.clock.read() | self.rollout.clock.read()
        self.aem.metrics |= {f"time/{name}": value for name, value in spent.items()} | step_metrics(credit)
        self.aem.metrics |= {"train/updates": updates, "time/update": 0.0}
        if self.aem.lam is not None:
            self.aem.metrics["aem/lam"] = self.aem.lam
        if self.keep:
            annotate_responses(credit)
            self.keep(self.time.step, credit)

    # What TRL and transformers call.

    def get_train_dataloader(self) -> Any:
        return _UpdateLoader(self.updates)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One update: all its micro-batches, gradients synchronised with the last; in pieces, with each, or none would fit."""
        start = clock_time.perf_counter()
        every = self.accelerator.distributed_type == DistributedType.FSDP
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(inputs):
            sync = every or i == len(inputs) - 1
            with contextlib.nullcontext() if sync else self.accelerator.no_sync(model=model):
                total += super().training_step(model, batch, num_items_in_batch)
        self.aem.metrics["time/update"] += clock_time.perf_counter() - start
        return total

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """What transformers asks between the backward pass and the optimizer: the last moment to stop."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(norm):
            what = f"the norm of the gradient is {norm} in step {self.time.step + 1}, with loss_type={self.loss_type}"
            raise RunError(
                f"{what}; nothing was updated with it. A lower trainer.learning_rate or trainer.max_grad_norm may help",
                "nan",
            )
        return norm

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return {name: value.to(self.accelerator.device) for name, value in inputs.items()}

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        self.entropy_coef = self._bonus * inputs["bonus_weight"].item()
        return super().compute_loss(model, inputs, return_outputs) * inputs["loss_weight"]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate follows steps, like every schedule here: the updates of a step share it."""
        scheduler = super().create_scheduler(self.time.steps - self.time.first_step, optimizer)
        self.lr_scheduler = (
            scheduler if isinstance(scheduler, _PerStepScheduler) else _PerStepScheduler(scheduler, self.time)
        )
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes one with every checkpoint; a run writes one, at its end."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.before_save:
            self.before_save(self.time.step)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            checkpoints.mark_complete(folder, self.time.step, self.time.updates, self.accelerator.num_processes)

    # Scoring.

    @torch.no_grad()
    def _score(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (nats) of the completion tokens, by one forward pass; on the CPU."""
        device = self.accelerator.device
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).to(device)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).to(device)
        own = model is self.model
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=own
            )
        return logps.float().cpu(), entropies.float().cpu() if own else logps

    def _reference(self, batch: Batch) -> Tensor:
        """Log-probs under the policy that training started from: a frozen copy, or this model without its adapter."""
        if self.ref_model is not None:
            return self._score(self.ref_model, batch)[0]
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self._score(self.model, batch)[0]

    def _check_sampler_gap(self, batch: Batch, logps: Tensor, entropies: Tensor) -> None:
        """Now and then, check that the sampler sampled from the distribution that is trained."""
        if self.time.step % _COMPARE_EVERY or "train/sampler_gap" in self.aem.metrics:
            return
        scored = self._score(self.model, batch)
        for what, metric, ours, theirs in (
            ("log-probs", "train/sampler_gap", logps, scored[0]),
            ("entropies", "train/sampler_entropy_gap", entropies, scored[1]),
        ):
            gap = ((theirs - ours).abs() * batch["tool_mask"]).max().item()
            self.aem.metrics[metric] = gap
            if gap > _SAMPLER_GAP:
                raise RuntimeError(
                    f"the sampler's {what} are {gap:.2g} nats away from the trainer's (at most {_SAMPLER_GAP} in float32): "
                    "the two do not share weights, temperature or positions"
                )


class _PerStepScheduler:
    """A learning rate scheduler that moves when a step ends, not with each update."""

    def __init__(self, scheduler: Any, time: StepCounter):
        self._scheduler, self._time = scheduler, time

    def step(self) -> None:
        if self._time.is_last_update:
            self._scheduler.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take none of the state: rate and shape are the config's, and where a run is, its time says. Both may differ from the
        run that this one continues."""
        scheduler = self._scheduler
        scheduler.last_epoch = self._time.step - self._time.first_step
        scheduler._step_count = scheduler.last_epoch + 1
        scheduler._last_lr = [
            base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)


class _UpdateLoader:
    """What transformers iterates over in place of a data loader."""

    def __init__(self, updates: Callable[[], Iterator[list[Batch]]]):
        self._updates = updates

    def __iter__(self) -> Iterator[list[Batch]]:
        return self._updates()


def _token_advantages(credit: Credit, micro: Sequence[int], mask_NT: Tensor, unit: str) -> Tensor:
    """Advantages (N, T): those of the responses, spread over their tokens, times the coefficients of their units."""
    unit_NT = aem.responses(mask_NT)
    advantage_NT = _broadcast_to_tokens(credit.advantage_R[credit.response_ids(micro)], unit_NT)
    if credit.alpha_U is None:
        return advantage_NT
    ids = credit.unit_ids(micro)
    if unit == "token":
        unit_NT = (mask_NT.flatten().cumsum(0).view_as(mask_NT) - 1).masked_fill(mask_NT == 0, -1)
    advantage_NT = aem.modulate(advantage_NT, credit.alpha_U[ids], unit_NT)
    return (
        advantage_NT
        if credit.addition_U is None
        else advantage_NT + _broadcast_to_tokens(credit.addition_U[ids], unit_NT)
    )


def _broadcast_to_tokens(value_U: Tensor, unit_NT: Tensor) -> Tensor:
    """The value of its unit at each token; 0 where there is none."""
    return torch.cat([value_U, value_U.new_zeros(1)])[unit_NT]


def _rewards_come_from_environments(prompts: list[Any], **_: Any) -> list[float]:
    raise AssertionError("TRL asks no reward function here")


def build_trainer(
    experiment: Experiment,
    folder: Path,
    model: Any,
    tokenizer: Any,
    callback: AEMCallback,
    draw: Callable[[int, int], list[Episode]],
    rollout: Rollout,
    make_sampler: Callable[[Any], Sampler],
    **recorders: Any,
) -> AEMTrainer:
    """The trainer of an experiment; `recorders` are AEMTrainer's `keep`, `before_save` and `publish`."""
    settings, launch = experiment.trainer, experiment.launch
    return AEMTrainer(
        model,
        build_grpo_config(experiment, folder),
        tokenizer,
        callback=callback,
        draw=draw,
        rollout=rollout,
        make_sampler=make_sampler,
        estimator=instantiate(experiment.baseline.advantage, partial=True),
        mini_batch=0 if settings.mini_batch == "all" else settings.mini_batch,
        epochs=settings.num_iterations,
        device_rows=launch.device_rows,
        device_tokens=launch.device_tokens,
        arm=ModulationVariant(**{f.name: getattr(experiment.modulation, f.name) for f in fields(ModulationVariant)}),
        groups=settings.tasks_per_step,
        drop_equal=settings.drop_equal,
        rounds=settings.rounds,
        mask_cut=settings.mask_truncated_completions,
        count_masked=settings.count_masked,
        trust_sampler=launch.sampler == "local" and experiment.model.dtype == "float32" and not settings.bf16,
        penalty=experiment.env.invalid_penalty,
        **recorders,
    )
