"""From the credit of a step to its updates: the rows of each, the advantage of each token, the weight of each micro-batch.

TRL averages a loss over a micro-batch. The weights here make the sum over micro-batches, and the mean over ranks, an average
over the whole update: its gradient depends on neither padding nor the split into micro-batches and ranks. Every rank holds
all rows and computes the same plan; which rows share an update follows from the seed alone.

Shapes: N rows of a micro-batch, T tokens of a completion; R responses and U units of the step; u units of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aem_exp import aem
from aem_exp.config.trainer_keys import ROW_MEAN_LOSSES
from aem_exp.rollout.rows import Row
from aem_exp.rollout.sampling.base import keyed_generator
from aem_exp.training.credit import AssignedCredit, Unit
from aem_exp.training.packing import PADDING_ROW

MicroBatch = dict[str, Tensor]


@dataclass(frozen=True)
class UpdateSettings:
    """How the rows of a step are divided into updates and micro-batches."""

    mini_batch: int = 0
    """rows per update; 0: all rows of a step in one update"""
    epochs: int = 1
    """how often the rows of a step are trained (mu in the GRPO paper)"""
    device_rows: int = 0
    """rows per micro-batch and device; 0: no limit"""
    device_tokens: int = 0
    """tokens per micro-batch and device, padding included; 0: no limit"""
    count_masked: bool = False
    """masked trajectories count among the rows that a loss is the mean of"""

    @property
    def is_single_update(self) -> bool:
        """Whether each row is trained once and in one update: the ratio of new to old probabilities is then 1 exactly."""
        return not self.mini_batch and self.epochs <= 1


@dataclass(frozen=True)
class Update:
    """One optimizer step: the micro-batches of this rank, and the sizes of the whole update over all ranks."""

    micro_batches: list[list[int]]
    """row indices"""
    real_rows: int
    tokens: int
    """generated tokens"""


def plan_step(
    rows: Sequence[Row], settings: UpdateSettings, key: tuple[Any, ...], rank: int, ranks: int
) -> list[Update]:
    """Plan the updates of a step for one rank.

    All ranks have the same number of micro-batches in an update: those that share the weights must do as many passes as each
    other.

    Args:
        key: seeds which rows share an update.
    """
    lengths = [len(row.prompt) + len(row.completion) for row in rows]
    shares = [plan_updates(lengths, settings.mini_batch, keyed_generator(key), r, ranks) for r in range(ranks)]
    out = []
    for update in zip(*shares, strict=True):
        live = [i for share in update for i in share if i != PADDING_ROW]
        tokens = sum(sum(rows[i].mask) for i in live)
        micros = [split_micro_batches(share, lengths, settings.device_rows, settings.device_tokens) for share in update]
        missing = max(map(len, micros)) - len(micros[rank])
        out.append(Update(micros[rank] + [[PADDING_ROW]] * missing, len(live), tokens))
    return out


def plan_updates(
    lengths: Sequence[int], mini_batch: int, rng: np.random.Generator, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """The rows that this rank trains in each update of a step.

    Args:
        lengths: tokens of each row of the step.
        mini_batch: rows per update, over all ranks; 0 means all rows in one. The number of updates floats with the number
            of rows, and their sizes differ by at most one.
        rng: decides who shares an update; the same on every rank.

    Returns:
        Row indices per update, longest first, `PADDING_ROW` where the rows do not divide by the ranks.
    """
    updates = max(1, round(len(lengths) / mini_batch)) if mini_batch else 1
    shares = []
    for chosen in np.array_split(rng.permutation(len(lengths)), updates):
        ordered = sorted(chosen.tolist(), key=lambda i: (-lengths[i], i))
        share = ordered[rank::ranks]
        shares.append(share + [PADDING_ROW] * (-(-len(ordered) // ranks) - len(share)))
    return shares


def split_micro_batches(
    share: list[int], lengths: Sequence[int], device_rows: int, device_tokens: int = 0
) -> list[list[int]]:
    """Micro-batches of at most so many rows, and so many tokens with padding (0: no limit; one row always fits).

    A share comes longest first, so memory fails early or never, and rows that share a micro-batch are of similar length.
    """
    micros: list[list[int]] = []
    widest = 0
    for i in share:
        length = lengths[i] if i != PADDING_ROW else 0
        full = micros and device_rows and len(micros[-1]) >= device_rows
        wide = micros and device_tokens and (len(micros[-1]) + 1) * max(widest, length) > device_tokens
        if not micros or full or wide:
            micros.append([])
            widest = length
        micros[-1].append(i)
    return micros


def spread_advantages(credit: AssignedCredit, micro: Sequence[int], mask_NT: Tensor, unit: Unit) -> Tensor:
    """Put the final advantage of each unit at its tokens: (N, T) for a micro-batch, 0 elsewhere."""
    assert mask_NT.ndim == 2 and len(mask_NT) == len(micro), (mask_NT.shape, len(micro))
    unit_NT = aem.responses(mask_NT) if unit == "response" else _number_tokens(mask_NT)
    advantage_u = credit.final_advantage_U[credit.unit_ids(micro)]
    return torch.cat([advantage_u, advantage_u.new_zeros(1)])[unit_NT]


def _number_tokens(mask_NT: Tensor) -> Tensor:
    """Ids of the generated tokens in row-major order; -1 elsewhere."""
    return (mask_NT.flatten().cumsum(0).view_as(mask_NT) - 1).masked_fill(mask_NT == 0, -1)


def count_loss_items(credit: AssignedCredit, loss_type: str, history: str, count_masked: bool) -> int:
    """Number of rows, or of trajectories, in the denominator of a loss that is a mean over them."""
    counted = [*credit.kept, *(credit.filtered if count_masked else ())]
    if loss_type == "dr_grpo" or history == "full":
        return len(counted)
    return sum(len(t.responses) for t in counted)


def compute_loss_weights(
    mask_NT: Tensor, update: Update, ranks: int, loss_type: str, items_per_row: float
) -> MicroBatch:
    """Compute the sizes and weights of a micro-batch for TRL's loss.

    `loss_weight` multiplies what TRL returns. `bonus_weight` cancels it for the entropy bonus, which TRL averages over the
    tokens of a micro-batch whatever the loss.

    Args:
        mask_NT: 1 on the tokens that the policy sampled.
        items_per_row: items in that mean per row: Dr. GRPO divides by a constant per trajectory, not per row,
            and masked trajectories, which have no rows, may count.
    """
    assert mask_NT.ndim == 2, mask_NT.shape
    token_share = mask_NT.sum().item() * ranks / max(1, update.tokens)
    weight = 1.0
    if loss_type == "bnpo":
        weight = token_share
    elif loss_type in ROW_MEAN_LOSSES:
        weight = len(mask_NT) * ranks / (update.real_rows * items_per_row)
    return {
        "num_items_in_batch": torch.tensor(float(update.tokens)),
        "loss_weight": torch.tensor(weight),
        "bonus_weight": torch.tensor(token_share / weight if weight else 0.0),
    }


def compute_importance_ratio(
    logps_NT: Tensor, sampler_logps_NT: Tensor, mask_NT: Tensor, low: float, high: float
) -> Tensor:
    """Divide the probability of each token under the policy by that under the engine, within bounds; 1 where masked."""
    assert logps_NT.ndim == 2 and logps_NT.shape == sampler_logps_NT.shape == mask_NT.shape, (
        logps_NT.shape,
        mask_NT.shape,
    )
    return ((logps_NT - sampler_logps_NT) * mask_NT).exp().clamp(min=low, max=high)
