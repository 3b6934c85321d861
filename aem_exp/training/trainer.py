"""The trainer: plays episodes, assigns and modulates their credit, and trains with TRL's own loss.

Read this file from top to bottom to follow one training step:

1. `play`: sample the trajectories of the step.
2. `assign_credit`: one advantage A per response, from a comparison with its group.
3. `build_updates`: old log-probs and token entropies in one scoring pass, then the coefficients alpha and the final advantages
   alpha * A (`aem.coefficients`), spread over the tokens as (N, T) tensors. The results stay fixed for all updates of the step.
4. `training_step` and `compute_loss`: TRL's loss for each micro-batch, and one optimizer step per update.

TRL provides the optimizer, the losses, the sharding and the checkpoints; only the batch is ours. A *step* is one rollout batch;
an *update* is one optimizer step. One item of the data loader is one update: a list of micro-batches. The number of updates per
step may vary, so schedules, logs, evaluations and checkpoints count steps.

Shapes: N rows of a micro-batch, T tokens of a completion; R responses and U units of the step.
"""

import contextlib
import math
import time as clock_time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from aem_exp.core.errors import RunError
from aem_exp.rollout.clock import Clock
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import Sampler, keyed_generator
from aem_exp.rollout.types import Ending, Episode, Trajectory
from aem_exp.rundir import checkpoints
from aem_exp.training import fsdp, updates
from aem_exp.training.callback import AEMCallback
from aem_exp.training.credit import AssignedCredit, CreditRules, MeasuredCredit, assign_credit
from aem_exp.training.dynamic_sampling import DynamicSampling, PlayedStep, loss_scale, play_rounds
from aem_exp.training.lr_schedule import PerStepScheduler
from aem_exp.training.modulation import ModulationVariant, modulate_credit
from aem_exp.training.packing import pack_masks
from aem_exp.training.scoring import StepScorer
from aem_exp.training.size_match import REFERENCE, SizeMatch
from aem_exp.training.step_metrics import annotate_responses, compute_step_metrics
from aem_exp.training.step_size import StepSizeMeter
from aem_exp.training.token_selection import (
    TokenRules,
    penalty_loss,
    select_tokens,
    start_measurements,
    without_first_penalty,
)
from aem_exp.training.updates import MicroBatch, UpdateSettings


@dataclass(frozen=True)
class RolloutSource:
    """Where the trajectories of a step come from."""

    draw: Callable[[int, int], list[Episode]]
    """(step, round) -> the episodes of one round of a step; equal on all ranks"""
    rollout: Rollout
    """plays the episodes"""
    make_sampler: Callable[[Any], Sampler]
    """trainer -> the sampler that generates the responses"""
    publish: Callable[[Any], dict[str, float]] | None = None
    """sends the trainer's weights to the engines that generate, before each rollout that follows an update, and returns metrics;
    None: the sampler uses the weights of the trainer"""


@dataclass(frozen=True)
class TrainerHooks:
    """Functions of a run that the trainer calls."""

    record_step: Callable[[int, MeasuredCredit], None] | None = None
    """receives the number of finished steps, and the credit of the step before its updates"""
    before_save: Callable[[int], None] | None = None
    """receives the number of finished steps before a checkpoint is written; it must write all files of the run to disk that the
    checkpoint depends on"""


NO_HOOKS = TrainerHooks()


class AEMTrainer(GRPOTrainer):
    """A `GRPOTrainer` that trains on multi-turn episodes, with one advantage per response.

    Args:
        model: a causal LM, or a PEFT model.
        args: see `arguments.build_grpo_config`.
        processing_class: the tokenizer.
        callback: computes lambda and has the step counter.
        source: where trajectories come from.
        dynamic_sampling: which groups a step trains on.
        credit_rules: how advantages are computed.
        update_settings: how rows are divided into updates and micro-batches.
        variant: the differences between the modulation and the paper.
        token_rules: which tokens the policy loss treats differently.
        trust_sampler: use the sampler's log-probs and entropies instead of a scoring pass. They must be exact: a local session
            in float32.
        hooks: called with the credit of a step, and before checkpoints.
    """

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        processing_class: Any,
        *,
        callback: AEMCallback,
        source: RolloutSource,
        dynamic_sampling: DynamicSampling,
        credit_rules: CreditRules,
        update_settings: UpdateSettings,
        variant: ModulationVariant,
        token_rules: TokenRules,
        trust_sampler: bool,
        hooks: TrainerHooks = NO_HOOKS,
        **kwargs: Any,
    ):
        from datasets import Dataset

        # TRL requires a data set, but nothing reads it.
        placeholder = Dataset.from_dict({"prompt": [""] * args.generation_batch_size})
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            reward_funcs=_rewards_come_from_environments,
            train_dataset=placeholder,
            callbacks=[callback],
            **kwargs,
        )
        # With several processes on CPUs, the device is "cpu:0", to which torch cannot restore a checkpoint.
        if args.device.type == "cpu":
            args.__dict__["_setup_devices"] = torch.device("cpu")
        self.remove_callback(PrinterCallback)  # our commands print the progress
        self.aem_callback, self.time, self.clock = callback, callback.time, Clock()
        self.source, self.rollout, self.sampler = source, source.rollout, source.make_sampler(self)
        self.dynamic_sampling, self.credit_rules, self.update_settings = dynamic_sampling, credit_rules, update_settings
        self.variant, self.token_rules, self.hooks = variant, token_rules, hooks
        self.scorer = StepScorer(self, trust_sampler)
        self.size_match = SizeMatch(self, variant.match) if variant.match else None
        if self.size_match:
            self.add_callback(self.size_match)  # before the meter, which measures the scaled change of the weights
        self.step_size = StepSizeMeter(self)
        self.add_callback(self.step_size)
        self._entropy_coef = args.entropy_coef
        self._published_update = -1
        self.batch_sizes: list[
            list[tuple[int, int]]
        ] = []  # of the last step, per update: rows and tokens per micro-batch
        # With `use_vllm`, TRL's loss applies the importance ratio for tokens that another engine has sampled.
        self.use_vllm: bool = args.use_vllm or source.publish is not None

    # One step: episodes -> credit -> updates.

    def iterate_updates(self) -> Iterator[list[MicroBatch]]:
        """Yield the updates of all remaining steps, each as a list of micro-batches.

        A step is played when its first update is requested. A step without updates yields one empty update: there are no
        gradients, so the optimizer changes no weight, but the work at the end of a step is still done.
        """
        while not self.time.is_finished:
            step = self.time.step
            played = self.play(step)
            assigned = self.assign_credit(played.kept, played.dropped)
            credit, step_updates = self.build_updates(assigned, step)
            self._record_metrics(credit, len(step_updates))
            self.step_size.begin_step(credit.played, is_trained=bool(step_updates))
            self.time.updates += len(step_updates)
            self.batch_sizes = [[_batch_size(batch) for batch in update] for update in step_updates]
            for i, micro_batches in enumerate(step_updates or [[]]):
                self.time.is_last_update = i >= len(step_updates) - 1
                yield micro_batches

    def play(self, step: int) -> PlayedStep:
        """Play the episodes of a step, in as many rounds as dynamic sampling needs (`dynamic_sampling.play_rounds`).

        Raises:
            RunError: all environments of a round crashed.
        """
        played = play_rounds(
            lambda number: self._play_round(step, number), self.dynamic_sampling, self.credit_rules.mask_truncated
        )
        self.aem_callback.metrics["train/rounds"] = played.rounds
        return played

    def _play_round(self, step: int, number: int) -> list[Trajectory]:
        played = self.play_distributed(self.source.draw(step, number), self.sampler)
        if all(t.ended == Ending.CRASHED for t in played):
            raise RunError(f"every environment crashed in step {step + 1}; the first error: {played[0].error}", "env")
        return played

    def play_distributed(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        """Play a share of the episodes on each rank; return the trajectories of all ranks, in order, on each rank."""
        size = -(-len(episodes) // self.accelerator.num_processes)
        start = self.accelerator.process_index * size
        if self.source.publish and self._published_update != self.state.global_step:
            with self.clock("weights"):
                self.aem_callback.metrics |= self.source.publish(self)
            self._published_update = self.state.global_step
        # vLLM engines have their own copy of the weights.
        with contextlib.nullcontext() if self.use_vllm else self._full_weights():
            played = self.rollout.play(episodes[start : start + size], sampler)
        return gather_object(played)

    def _full_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which each process has the full weights, if the weights are sharded."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return fsdp.full_weights(self.model, reshard=plugin is None or plugin.reshard_after_forward)

    def assign_credit(self, played: Sequence[Trajectory], dropped: Sequence[Trajectory] = ()) -> AssignedCredit:
        """Compute one advantage per response from a comparison with its group.

        Args:
            played: trajectories of the groups that the step trains on.
            dropped: trajectories of groups that dynamic sampling removed.
        """
        return assign_credit(played, self.rollout.env.history, self.credit_rules, dropped, self.variant.unit)

    def build_updates(self, assigned: AssignedCredit, step: int) -> tuple[MeasuredCredit, list[list[MicroBatch]]]:
        """Measure and modulate the credit of a step, and build its updates.

        Old log-probs, entropies and coefficients are computed once and stay fixed for all updates of the step.

        Returns:
            The credit that is trained (a `ModulatedCredit` if there is a modulation without `match`), and the micro-batches of
            this rank for each update. There are no updates if the loss of the step is zero.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        plan_key = (self.args.seed, "updates", step)
        plan = updates.plan_step(assigned.rows, self.update_settings, plan_key, rank, ranks)
        measurements = start_measurements(self.token_rules, assigned, self.variant)
        with self.clock("scoring"):
            batches = self.scorer.score(assigned, plan, measurements)
            measured = self.scorer.combine(assigned, measurements)
            rng = keyed_generator((self.args.seed, "tokens", step))
            selection = select_tokens(self.token_rules, measurements, self.scorer.sum_over_ranks, rng)
        with self.clock("aem"):
            modulated = self._modulate(measured, step)
            credit = measured if self.size_match else modulated
            if self._loss_is_zero(credit):
                return credit, []
            rows = updates.mask_rows(credit)
            if self.variant.keep_by == "mask":  # masked tokens leave the denominator of the loss, too
                plan = updates.plan_step(rows, self.update_settings, plan_key, rank, ranks)
            spread = partial(updates.spread_advantages, unit=self.variant.unit)
            for update, update_batches in zip(plan, batches, strict=True):
                for micro, batch in zip(update.micro_batches, update_batches, strict=True):
                    mask_NT = batch["tool_mask"]
                    batch["advantages"] = spread(credit, micro, mask_NT)
                    if self.size_match:
                        batch[REFERENCE] = spread(modulated, micro, mask_NT)
                    if selection:
                        batch |= selection.edit(micro, batch)
                    if rows is not credit.rows:
                        batch["tool_mask"] = pack_masks(rows, micro, mask_NT.shape[1])
        count_masked = self.update_settings.count_masked
        items = updates.count_loss_items(credit, self.loss_type, self.rollout.env.history, count_masked)
        items_per_row, scale = items / len(credit.rows), loss_scale(self.dynamic_sampling, credit)
        for update, update_batches in zip(plan, batches, strict=True):
            for batch in update_batches:
                batch |= updates.compute_loss_weights(
                    batch["tool_mask"], update, ranks, self.loss_type, items_per_row, scale
                )
        if selection:
            self.aem_callback.metrics |= selection.metrics
        return credit, without_first_penalty(batches * self.update_settings.epochs)

    def _modulate(self, credit: MeasuredCredit, step: int) -> MeasuredCredit:
        """Modulate the credit, if there is a modulation. All ranks compute the same result."""
        if self.aem_callback.lam is None:
            return credit
        rng = keyed_generator((self.args.seed, "shuffle", step))
        weight_R = updates.response_weights(credit, self.loss_type)
        return modulate_credit(credit, self.variant, self.aem_callback.lam, self.aem_callback.gate, rng, weight_R)

    def _loss_is_zero(self, credit: MeasuredCredit) -> bool:
        """Whether no term of the loss has a gradient. Adam's momentum would change the weights even with a gradient of 0."""
        other_terms = self.beta or self._entropy_coef or self.aux_loss_enabled
        return not credit.rows or not (other_terms or credit.final_advantage_U.any())

    def _record_metrics(self, credit: MeasuredCredit, count: int) -> None:
        """Pass the metrics of the step to the callback, which logs them, and the credit to the hook `record_step`."""
        seconds = self.clock.read() | self.rollout.clock.read()
        self.aem_callback.metrics |= {f"time/{name}": value for name, value in seconds.items()}
        self.aem_callback.metrics |= compute_step_metrics(credit, trained=count > 0)
        self.aem_callback.metrics |= {"train/updates": count, "time/update": 0.0}
        if self.aem_callback.lam is not None:
            self.aem_callback.metrics["aem/lam"] = self.aem_callback.lam
        if self.hooks.record_step:
            annotate_responses(credit)
            self.hooks.record_step(self.time.step, credit)

    # Overridden methods of TRL and transformers.

    def get_train_dataloader(self) -> Any:
        """The updates in place of a data loader; one item is one update."""
        return _UpdateLoader(self.iterate_updates)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward passes for all micro-batches of one update; return the sum of their losses.

        Gradients are synchronised at the last micro-batch. With sharded weights they are synchronised at each one, because full
        gradients might not fit into memory.
        """
        start = clock_time.perf_counter()
        accumulate = partial(self._accumulate_gradients, model, num_items_in_batch=num_items_in_batch)
        if self.size_match and inputs:
            self.size_match.begin_update(inputs, accumulate)
        total = accumulate(inputs)
        if self.size_match:
            self.size_match.end_backward()
        self.aem_callback.metrics["time/update"] += clock_time.perf_counter() - start
        return total

    def _accumulate_gradients(self, model: Any, inputs: Sequence[MicroBatch], num_items_in_batch: Any) -> Tensor:
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(inputs):
            sync = sharded or i == len(inputs) - 1
            with contextlib.nullcontext() if sync else self.accelerator.no_sync(model=model):
                total += super().training_step(model, batch, num_items_in_batch)
        return total

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Raise RunError if the gradient is not finite. transformers calls this between backward pass and optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(norm):
            problem = f"the norm of the gradient is {norm} in step {self.time.step + 1} (loss_type={self.loss_type})"
            remedy = "a lower trainer.learning_rate or trainer.max_grad_norm may help"
            raise RunError(f"{problem}; the weights were not updated with it; {remedy}", "nan")
        self.step_size.add_gradient_norm(float(norm))
        return norm

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return {name: value.to(self.accelerator.device) for name, value in inputs.items()}

    def compute_loss(
        self, model: Any, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of one micro-batch times its `loss_weight`: its share of the loss of the update. KL-Cov adds a term."""
        self.entropy_coef = self._entropy_coef * inputs["bonus_weight"].item()
        loss = super().compute_loss(model, inputs, return_outputs) * inputs["loss_weight"]
        return loss + penalty_loss(self._logps_NT, inputs) if "penalties" in inputs else loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the log-probs that TRL computes for its loss, because KL-Cov needs them too."""
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps_NT = scores[0] if self.token_rules.kl_cov_ratio else None
        return scores

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create a scheduler that follows steps: the updates of a step share one learning rate."""
        scheduler = super().create_scheduler(self.time.steps - self.time.first_step, optimizer)
        self.lr_scheduler = (
            scheduler if isinstance(scheduler, PerStepScheduler) else PerStepScheduler(scheduler, self.time)
        )
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: TRL would write a model card with each checkpoint, but a run writes one at its end."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.hooks.before_save:
            self.hooks.before_save(self.time.step)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            checkpoints.mark_complete(folder, self.time.step, self.time.updates, self.accelerator.num_processes)


class _UpdateLoader:
    """Replaces the data loader that transformers iterates over."""

    def __init__(self, updates: Callable[[], Iterator[list[MicroBatch]]]):
        self._updates = updates

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self._updates()


def _batch_size(batch: MicroBatch) -> tuple[int, int]:
    """Rows of a micro-batch, and tokens of each row with padding."""
    return len(batch["prompt_ids"]), batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]


def _rewards_come_from_environments(prompts: list[Any], **_: Any) -> list[float]:
    raise AssertionError("TRL must not call a reward function: rewards come from the environments")
