"""Computes old log-probs and token entropies of a step before its updates, and compares them with the sampler's.

The old policy is the policy at the start of the step. All values are in nats, over the full vocabulary, with logits divided by
the sampling temperature.

Shapes: N rows of a micro-batch, T tokens of a completion; R responses and U units of the step.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from aem_exp import aem
from aem_exp.core.errors import RunError
from aem_exp.training.credit import AssignedCredit, select_ids
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.updates import MicroBatch

SAMPLER_GAP: Final = 1e-3  # nats: maximum difference between a float32 session and a scoring pass, at any token
ENGINE_GAP: Final = 0.1  # nats: maximum mean difference between another engine and a scoring pass
COMPARE_EVERY: Final = 50  # steps between two comparisons of a trusted sampler

TokenScores = tuple[Tensor, Tensor]  # log-probs and entropies (nats) of the completion tokens, each (N, T), on the CPU


@torch.no_grad()
def compute_logps_and_entropies(trainer: GRPOTrainer, model: Any, batch: MicroBatch) -> TokenScores:
    """Score a micro-batch in one forward pass.

    Returns:
        Log-probs (N, T) and token entropies (N, T) in float32 on the CPU. Entropies are computed for the trained model only;
        for a reference model, the second tensor repeats the log-probs.
    """
    device = trainer.accelerator.device
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).to(device)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).to(device)
    is_policy = model is trainer.model
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=is_policy
        )
    return logps.float().cpu(), entropies.float().cpu() if is_policy else logps


def score_reference(trainer: GRPOTrainer, batch: MicroBatch) -> Tensor:
    """Log-probs (N, T) under the reference policy of the KL term: a frozen copy, or the model without its LoRA adapter."""
    if trainer.ref_model is not None:
        return compute_logps_and_entropies(trainer, trainer.ref_model, batch)[0]
    with use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=None):
        return compute_logps_and_entropies(trainer, trainer.model, batch)[0]


@torch.no_grad()
def compute_score_norms(trainer: GRPOTrainer, batch: MicroBatch) -> Tensor:
    """(N, T) float32 on the CPU: norm of the gradient of log p with respect to the logits, at each completion token.

    The gradient is e - p, where e is the one-hot vector of the token and p are the probabilities, with logits divided by the
    sampling temperature. Its squared norm is 1 - 2 p[token] + sum p^2. Needs a forward pass of its own.
    """
    device, width = trainer.accelerator.device, batch["completion_ids"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).to(device)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).to(device)
    with (
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        trainer.accelerator.autocast(),
    ):
        logits_NTV = trainer.model(input_ids=ids, attention_mask=mask, logits_to_keep=width + 1).logits[:, :-1]
    prob_NTV = (logits_NTV.float() / trainer.temperature).softmax(-1)
    own_NT = prob_NTV.gather(-1, batch["completion_ids"].to(device)[..., None])[..., 0]
    return (1 - 2 * own_NT + prob_NTV.square().sum(-1)).clamp(min=0).sqrt().cpu()


class ResponseMeasurements:
    """Entropy and surprisal of the responses in the rows of this rank; 0 for all others, so that a sum over ranks is complete.

    Attributes:
        entropy_R: mean token entropy of each response, in nats.
        surprisal_R: mean token surprisal of each response, in nats.
        score_norm_R: see `compute_score_norms`; None if the variant does not need it.
        token_signal_K: entropy or surprisal of each token in nats; None if the variant does not need it.
    """

    def __init__(self, credit: AssignedCredit, variant: ModulationVariant):
        self.credit, self.variant = credit, variant
        self.entropy_R, self.surprisal_R = (torch.zeros_like(credit.advantage_R) for _ in range(2))
        self.score_norm_R = torch.zeros_like(credit.advantage_R) if variant.signal == "score_norm" else None
        self._token_ids_N = credit.token_ids_N if variant.needs_tokens else []
        self.token_signal_K = torch.zeros(len(credit.response_K)) if variant.needs_tokens else None

    def add(
        self, micro: Sequence[int], mask_NT: Tensor, scores: TokenScores, score_norm_NT: Tensor | None = None
    ) -> None:
        """Add a micro-batch: average its scores over each response.

        Args:
            micro: row indices of the micro-batch.
            mask_NT: 1 on generated tokens.
            scores: log-probs and entropies, each (N, T).
            score_norm_NT: see `compute_score_norms`.
        """
        logps_NT, entropy_NT = scores
        response_NT = aem.responses(mask_NT)
        responses = self.credit.response_ids(micro)
        self.entropy_R[responses] = aem.response_entropy(entropy_NT, response_NT)
        self.surprisal_R[responses] = aem.response_entropy(-logps_NT, response_NT)
        if self.score_norm_R is not None and score_norm_NT is not None:
            self.score_norm_R[responses] = aem.response_entropy(score_norm_NT, response_NT)
        if self.token_signal_K is not None:
            signal_NT = -logps_NT if self.variant.signal == "surprisal" else entropy_NT
            self.token_signal_K[select_ids(self._token_ids_N, micro)] = signal_NT[response_NT >= 0]


def check_sampler_gap(sampler: TokenScores, scored: TokenScores, mask_NT: Tensor) -> dict[str, float]:
    """Check that a trusted sampler reports the log-probs and entropies of the trainer.

    Returns:
        The largest differences at a token, in nats, as metrics.

    Raises:
        RuntimeError: a difference is above `SAMPLER_GAP`.
    """
    gaps = {}
    for quantity, metric, sampled_NT, scored_NT in (
        ("log-probs", "train/sampler_gap", sampler[0], scored[0]),
        ("entropies", "train/sampler_entropy_gap", sampler[1], scored[1]),
    ):
        gaps[metric] = gap = ((scored_NT - sampled_NT).abs() * mask_NT).max().item()
        if gap > SAMPLER_GAP:
            raise RuntimeError(
                f"the sampler's {quantity} differ from the trainer's by {gap:.2g} nats (limit in float32: {SAMPLER_GAP}); "
                "the two do not use the same weights, temperature or positions"
            )
    return gaps


def check_engine_gap(
    engine: TokenScores, scored: TokenScores, mask_NT: Tensor, with_entropies: bool
) -> dict[str, float]:
    """Check that another engine samples from about the same distribution as the policy.

    Args:
        with_entropies: whether the engine reports entropies; many engines do not.

    Returns:
        The mean absolute differences per token, in nats, as metrics.

    Raises:
        RunError: a difference is above `ENGINE_GAP`.
    """
    pairs = {"sampler_gap": ("log-probs", scored[0] - engine[0])}
    if with_entropies:
        pairs["sampler_entropy_gap"] = ("entropies", scored[1] - engine[1])
    gaps = {}
    for name, (quantity, difference_NT) in pairs.items():
        gap = ((difference_NT * mask_NT).abs().sum() / mask_NT.sum().clamp(min=1)).item()
        gaps[f"train/{name}"] = gap
        if gap > ENGINE_GAP:
            raise RunError(
                f"the engine's {quantity} differ from the policy's by {gap:.2g} nats on average (limit: {ENGINE_GAP}); "
                "the engine samples from other weights or at another temperature"
            )
    return gaps
