"""Scores the rows of a step before its updates: old log-probs, log-probs of the reference policy, and measurements of responses.

A trusted sampler has measured the log-probs and entropies already. Otherwise, each micro-batch gets one forward pass.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from aem_exp.training import logprobs, updates
from aem_exp.training.credit import AssignedCredit, MeasuredCredit, add_measurements
from aem_exp.training.logprobs import ResponseMeasurements, TokenScores
from aem_exp.training.packing import PADDING_ROW, pack_rows, sampler_logps_and_entropies
from aem_exp.training.updates import MicroBatch, Update

if TYPE_CHECKING:
    from aem_exp.training.trainer import AEMTrainer


class StepScorer:
    """Scores the micro-batches of the rank of a trainer.

    Args:
        trust_sampler: use the sampler's log-probs and entropies instead of a scoring pass. They must be exact.
    """

    def __init__(self, trainer: "AEMTrainer", trust_sampler: bool):
        self._trainer, self._trust_sampler = trainer, trust_sampler

    def score(
        self, credit: AssignedCredit, plan: Sequence[Update], measurements: ResponseMeasurements
    ) -> list[list[MicroBatch]]:
        """Pack the micro-batches of each update, score them, and add the measurements of their responses."""
        return [[self._score(credit, micro, measurements) for micro in update.micro_batches] for update in plan]

    def combine(self, assigned: AssignedCredit, measurements: ResponseMeasurements) -> MeasuredCredit:
        """Combine the measurements of all ranks; each rank measured only its own rows."""
        token_signal_K, score_norm_R = measurements.token_signal_K, measurements.score_norm_R
        return add_measurements(
            assigned,
            entropy_R=self.sum_over_ranks(measurements.entropy_R),
            surprisal_R=self.sum_over_ranks(measurements.surprisal_R),
            token_signal_K=None if token_signal_K is None else self.sum_over_ranks(token_signal_K),
            score_norm_R=None if score_norm_R is None else self.sum_over_ranks(score_norm_R),
        )

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on the CPU."""
        accelerator = self._trainer.accelerator
        return accelerator.reduce(value.to(accelerator.device), "sum").cpu()

    def _score(self, credit: AssignedCredit, micro: list[int], measurements: ResponseMeasurements) -> MicroBatch:
        """Pack a micro-batch, add its old log-probs, and measure the entropy and surprisal of its responses.

        Old log-probs are left out if all rows are trained once, in one update: the ratio of new to old probabilities is then
        exactly 1.
        """
        trainer = self._trainer
        batch = pack_rows(credit.rows, micro, trainer._tokenizer.pad_token_id)
        sampler = sampler_logps_and_entropies(credit.rows, micro, batch["completion_ids"].shape[1])
        if self._trust_sampler:
            scores = sampler
            self._check_sampler(batch, scores)
        else:
            scores = logprobs.compute_logps_and_entropies(trainer, trainer.model, batch)
            if all(row.logps for row in credit.rows):
                with_entropies = all(credit.rows[i].entropies for i in micro if i != PADDING_ROW)
                self._correct_engine(batch, sampler, scores, with_entropies)
        if not trainer.update_settings.is_single_update:
            batch["old_per_token_logps"] = scores[0]
        if trainer.beta:
            batch["ref_per_token_logps"] = logprobs.score_reference(trainer, batch)
        norm_NT = logprobs.compute_score_norms(trainer, batch) if trainer.variant.signal == "score_norm" else None
        measurements.add(micro, batch["tool_mask"], scores, norm_NT)
        return batch

    def _check_sampler(self, batch: MicroBatch, scores: TokenScores) -> None:
        """Compare a trusted sampler with a scoring pass, on one micro-batch in every `COMPARE_EVERY`-th step."""
        trainer, metrics = self._trainer, self._trainer.aem_callback.metrics
        if trainer.time.step % logprobs.COMPARE_EVERY == 0 and "train/sampler_gap" not in metrics:
            scored = logprobs.compute_logps_and_entropies(trainer, trainer.model, batch)
            metrics.update(logprobs.check_sampler_gap(scores, scored, batch["tool_mask"]))

    def _correct_engine(
        self, batch: MicroBatch, engine: TokenScores, scores: TokenScores, with_entropies: bool
    ) -> None:
        """Compare another engine with the scoring pass, and add the importance ratio of its tokens to the batch."""
        trainer, args = self._trainer, self._trainer.args
        gaps = logprobs.check_engine_gap(engine, scores, batch["tool_mask"], with_entropies)
        trainer.aem_callback.metrics.update(gaps)
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            low, high = args.vllm_importance_sampling_clip_min or 0.0, args.vllm_importance_sampling_clip_max
            ratio = updates.compute_importance_ratio(scores[0], engine[0], batch["tool_mask"], low, high)
            batch["importance_sampling_ratio"] = ratio
