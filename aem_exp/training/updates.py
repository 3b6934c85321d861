"""Plans the updates of a step: the rows of each update, the advantage of each token, the loss weight of each micro-batch.

TRL averages a loss over a micro-batch. With the weights computed here, the sum over micro-batches and the mean over ranks is an
average over the whole update. The gradient of an update therefore depends on neither padding nor the split into micro-batches
and ranks. Each rank has all rows and computes the same plan. Which rows share an update depends on the seed only.

Shapes: N rows of a micro-batch, T tokens of a completion; R responses and U units of the step; u units of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """number of passes over the rows of a step (mu in the GRPO paper)"""
    device_rows: int = 0
    """rows per micro-batch and device; 0: no limit"""
    device_tokens: int = 0
    """tokens per micro-batch and device, padding included; 0: no limit"""
    count_masked: bool = False
    """count masked trajectories in the denominator of a loss that is a mean over rows"""

    @property
    def is_single_update(self) -> bool:
        """Whether all rows are trained once, in one update. The ratio of new to old probabilities is then exactly 1."""
        return not self.mini_batch and self.epochs <= 1


@dataclass(frozen=True)
class Update:
    """One optimizer step: the micro-batches of this rank, and the sizes of the update over all ranks."""

    micro_batches: list[list[int]]
    """row indices of each micro-batch; `PADDING_ROW` for padding"""
    real_rows: int
    """number of rows over all ranks, without padding rows"""
    tokens: int
    """number of generated tokens over all ranks"""


def plan_step(
    rows: Sequence[Row], settings: UpdateSettings, key: tuple[Any, ...], rank: int, ranks: int
) -> list[Update]:
    """Plan the updates of a step for one rank.

    All ranks get the same number of micro-batches in an update, because ranks with sharded weights must run equal numbers of
    forward passes.

    Args:
        key: seeds the assignment of rows to updates.
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
    """Select the rows that one rank trains in each update of a step.

    Args:
        lengths: number of tokens of each row of the step.
        mini_batch: rows per update over all ranks; 0: all rows in one update. The number of updates is the number of rows
            divided by `mini_batch`, rounded; their sizes differ by at most one row.
        rng: assigns rows to updates; it must be seeded equally on all ranks.

    Returns:
        Row indices per update, longest row first. `PADDING_ROW` fills up shares if the rows do not divide by the ranks.
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
    """Split a share into micro-batches with a maximum number of rows and of tokens.

    A share is sorted, longest row first. A lack of memory therefore shows in the first micro-batch, and the rows of a
    micro-batch have similar lengths.

    Args:
        share: row indices, longest row first.
        device_rows: rows per micro-batch; 0: no limit.
        device_tokens: tokens per micro-batch, padding included; 0: no limit. A single row is always allowed.
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
    """Assign the final advantage of each unit to its tokens.

    Args:
        micro: row indices of the micro-batch.
        mask_NT: 1 on generated tokens.

    Returns:
        (N, T) advantages; 0 on tokens that were not generated.
    """
    assert mask_NT.ndim == 2 and len(mask_NT) == len(micro), (mask_NT.shape, len(micro))
    unit_NT = aem.responses(mask_NT) if unit == "response" else _number_tokens(mask_NT)
    advantage_u = credit.final_advantage_U[credit.unit_ids(micro)]
    return torch.cat([advantage_u, advantage_u.new_zeros(1)])[unit_NT]


def _number_tokens(mask_NT: Tensor) -> Tensor:
    """(N, T) ids of the generated tokens in row-major order; -1 on all other tokens."""
    return (mask_NT.flatten().cumsum(0).view_as(mask_NT) - 1).masked_fill(mask_NT == 0, -1)


def response_weights(credit: AssignedCredit, loss_type: str) -> Tensor:
    """(R,) float32: weight of each response in the loss, up to a common factor: the sum of the weights of its tokens.

    A mean over tokens weights a response by its number of tokens. A mean over rows divides this number by that of its row, so a
    response that is a row of its own has weight 1.
    """
    tokens_R = credit.tokens_R.float()
    if loss_type not in ("grpo", "sapo"):
        return tokens_R
    row_R = torch.tensor([n for n, ids in enumerate(credit.response_ids_N) for _ in ids], dtype=torch.long)
    return tokens_R / torch.zeros(len(credit.rows)).index_add_(0, row_R, tokens_R)[row_R]


def mask_rows(credit: AssignedCredit) -> list[Row]:
    """The rows, with 0 in the masks of the tokens that are not in the loss."""
    in_loss_K = credit.in_loss_K
    if in_loss_K.all():
        return credit.rows
    kept = iter(in_loss_K.int().tolist())
    return [replace(row, mask=[next(kept) if own else 0 for own in row.mask]) for row in credit.rows]


def count_loss_items(credit: AssignedCredit, loss_type: str, history: str, count_masked: bool) -> int:
    """Number of items in the denominator of a loss that is a mean over rows (`grpo`) or trajectories (`dr_grpo`)."""
    counted = [*credit.kept, *(credit.filtered if count_masked else ())]
    if loss_type == "dr_grpo" or history == "full":
        return len(counted)
    return sum(len(t.responses) for t in counted)


def compute_loss_weights(
    mask_NT: Tensor, update: Update, ranks: int, loss_type: str, items_per_row: float, scale: float = 1.0
) -> MicroBatch:
    """Compute the sizes and weights of a micro-batch for TRL's loss.

    Args:
        mask_NT: 1 on generated tokens.
        ranks: number of ranks.
        items_per_row: items of the denominator (`count_loss_items`) per row of the step. It differs from 1 if the loss counts
            trajectories instead of rows, or if masked trajectories, which have no rows, are counted.
        scale: factor of the whole loss.

    Returns:
        Scalar tensors. `num_items_in_batch`: generated tokens of the update. `loss_weight`: multiplies the loss that TRL
        returns for the micro-batch. `bonus_weight`: multiplies the coefficient of the entropy bonus. TRL averages the bonus
        over the tokens of a micro-batch for every loss type, so `bonus_weight` replaces `loss_weight` by the token share.
        `penalty_weight`: multiplies a sum over tokens to give the mean over the tokens of the update.
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
        "loss_weight": torch.tensor(weight * scale),
        "penalty_weight": torch.tensor(scale * ranks / max(1, update.tokens)),
        "bonus_weight": torch.tensor(token_share / weight if weight else 0.0),
    }


def compute_importance_ratio(
    logps_NT: Tensor, sampler_logps_NT: Tensor, mask_NT: Tensor, low: float, high: float
) -> Tensor:
    """Importance ratio of each token: its probability under the policy divided by that under the engine, clamped.

    Args:
        logps_NT: log-probs under the policy, from the scoring pass.
        sampler_logps_NT: log-probs under the engine that sampled.
        mask_NT: 1 on generated tokens.
        low: lower bound of the ratio.
        high: upper bound of the ratio.

    Returns:
        (N, T) ratios; 1 on tokens that were not generated (before clamping).
    """
    assert logps_NT.ndim == 2 and logps_NT.shape == sampler_logps_NT.shape == mask_NT.shape, (
        logps_NT.shape,
        mask_NT.shape,
    )
    return ((logps_NT - sampler_logps_NT) * mask_NT).exp().clamp(min=low, max=high)
