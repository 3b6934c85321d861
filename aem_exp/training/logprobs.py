"""Log-probs and entropies of the rows of a step before its updates, and their difference from the sampler's.

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
from aem_exp.training.credit import AssignedCredit
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.updates import MicroBatch

SAMPLER_GAP: Final = 1e-3  # nats that a float32 session may differ from a scoring pass
ENGINE_GAP: Final = 0.1  # nats that another engine may differ on average, by its own arithmetic
COMPARE_EVERY: Final = 50  # steps

TokenScores = tuple[Tensor, Tensor]  # log-probs and entropies (nats) of the completion tokens, each (N, T), on the CPU


@torch.no_grad()
def compute_logps_and_entropies(trainer: GRPOTrainer, model: Any, batch: MicroBatch) -> TokenScores:
    """Score a micro-batch by one forward pass. Only the trained model's entropies are measured."""
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
    """Log-probs under the policy that training started from: a frozen copy, or this model without its adapter."""
    if trainer.ref_model is not None:
        return compute_logps_and_entropies(trainer, trainer.ref_model, batch)[0]
    with use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=None):
        return compute_logps_and_entropies(trainer, trainer.model, batch)[0]


class ResponseMeasurements:
    """Entropy and surprisal of the responses of a step, as far as this rank has their rows; 0 for the others."""

    def __init__(self, credit: AssignedCredit, variant: ModulationVariant):
        self.credit, self.variant = credit, variant
        self.entropy_R, self.surprisal_R = (torch.zeros_like(credit.advantage_R) for _ in range(2))
        self.token_signal_U = torch.zeros(len(credit.response_U))

    def add(self, micro: Sequence[int], mask_NT: Tensor, scores: TokenScores) -> None:
        """Average the scores of a micro-batch over its responses."""
        logps_NT, entropy_NT = scores
        response_NT = aem.responses(mask_NT)
        responses = self.credit.response_ids(micro)
        self.entropy_R[responses] = aem.response_entropy(entropy_NT, response_NT)
        self.surprisal_R[responses] = aem.response_entropy(-logps_NT, response_NT)
        if self.variant.unit == "token":
            signal_NT = entropy_NT if self.variant.signal == "entropy" else -logps_NT
            self.token_signal_U[self.credit.unit_ids(micro)] = signal_NT[response_NT >= 0]


def check_sampler_gap(sampler: TokenScores, scored: TokenScores, mask_NT: Tensor) -> dict[str, float]:
    """Check that the sampler sampled from the trained distribution; return the largest difference at a token, for the log."""
    gaps = {}
    for what, metric, ours_NT, scored_NT in (
        ("log-probs", "train/sampler_gap", sampler[0], scored[0]),
        ("entropies", "train/sampler_entropy_gap", sampler[1], scored[1]),
    ):
        gaps[metric] = gap = ((scored_NT - ours_NT).abs() * mask_NT).max().item()
        if gap > SAMPLER_GAP:
            raise RuntimeError(
                f"the sampler's {what} are {gap:.2g} nats away from the trainer's (at most {SAMPLER_GAP} in float32): "
                "the two do not share weights, temperature or positions"
            )
    return gaps


def check_engine_gap(
    engine: TokenScores, scored: TokenScores, mask_NT: Tensor, with_entropies: bool
) -> dict[str, float]:
    """Check that another engine samples from about the same distribution; return the mean difference at a token, for the log.

    Args:
        with_entropies: the engine measures entropies; many do not.
    """
    pairs = {"sampler_gap": ("log-probs", scored[0] - engine[0])}
    if with_entropies:
        pairs["sampler_entropy_gap"] = ("entropies", scored[1] - engine[1])
    gaps = {}
    for name, (what, difference_NT) in pairs.items():
        gap = ((difference_NT * mask_NT).abs().sum() / mask_NT.sum().clamp(min=1)).item()
        gaps[f"train/{name}"] = gap
        if gap > ENGINE_GAP:
            raise RunError(
                f"the engine's {what} are {gap:.2g} nats away from the policy's on average (at most {ENGINE_GAP}): "
                "it does not sample from these weights, or at another temperature"
            )
    return gaps
