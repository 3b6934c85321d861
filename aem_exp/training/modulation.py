"""Variants of the modulation: another scope, signal, unit or order of the same coefficients.

The paper is `ModulationVariant()`. Everything else here is an ablation, a placebo or a rival method, and is built around
`aem.coefficients`. Shapes: U units, each a response or a token, trajectory by trajectory and in order. Nothing here knows
ranks: a credit holds the measurements of all of them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aem_exp import aem
from aem_exp.training.credit import MeasuredCredit, ModulatedCredit, Unit, add_modulation


@dataclass(frozen=True)
class ModulationVariant:
    """Where a modulation departs from the paper."""

    scope: Literal["group", "trajectory", "batch"] = "group"
    """which units share one range of entropies, and a mean coefficient of 1: those of the rollout group, of the trajectory, or
    of the whole batch"""
    signal: Literal["entropy", "surprisal"] = "entropy"
    """mean token entropy, or mean surprisal (-log p of the sampled tokens) in its place"""
    unit: Unit = "response"
    """what gets a coefficient: a response, or each token by its own signal"""
    shuffle: bool = False
    """permute the coefficients within their scope, by a seeded generator: the placebo"""
    keep: Literal["all", "raising", "lowering"] = "all"
    """train all units, or only those whose training raises, or lowers, the entropy of the policy; see
    `filter_by_entropy_effect`"""
    bonus: float = 0.0
    """zeta of EMPG (arXiv 2509.09265): weight of the clarity of the trajectory's next response"""
    bonus_lam: float = 1.0
    """k' of EMPG"""
    centred: bool = False
    """subtract the mean over the batch from the modulated advantages, as EMPG does"""


def modulate_credit(
    credit: MeasuredCredit, variant: ModulationVariant, lam: float, gate: float, rng: np.random.Generator
) -> ModulatedCredit:
    """Give each unit its coefficient, and with it its final advantage.

    Args:
        credit: with the measurements of all ranks.
        lam: strength of the modulation; see `aem.coefficients`.
        gate: nats; see `aem.coefficients`.
        rng: permutes the coefficients of the placebo; the same on every rank.
    """
    signal_U, trajectory_U, advantage_U = credit.signal_U, credit.trajectory_U, credit.advantage_U
    scope_U = scope_ids(variant, credit.group_M[trajectory_U], trajectory_U)
    metrics = {"aem/gated_share": aem.gated(signal_U, scope_U, gate).float().mean().item()}
    alpha_U = variant_coefficients(variant, signal_U, scope_U, lam, gate, rng)
    alpha_U = filter_by_entropy_effect(variant, advantage_U, alpha_U)
    if variant.keep != "all":
        metrics["aem/kept_share"] = (alpha_U > 0).float().mean().item()
    one_per_row_U = torch.arange(len(alpha_U))[:, None]  # ids of a batch whose rows have one unit each
    modulated_U = aem.modulate(advantage_U, alpha_U, one_per_row_U)[:, 0]
    bonus_U = advantage_bonus(variant, advantage_U, alpha_U, signal_U, trajectory_U)
    return add_modulation(credit, alpha_U, modulated_U if bonus_U is None else modulated_U + bonus_U, metrics)


def scope_ids(variant: ModulationVariant, group_U: Tensor, trajectory_U: Tensor) -> Tensor:
    """Ids of the scopes: the units of one share a range of entropies."""
    assert group_U.ndim == 1 and group_U.shape == trajectory_U.shape, (group_U.shape, trajectory_U.shape)
    return {"group": group_U, "trajectory": trajectory_U, "batch": torch.zeros_like(group_U)}[variant.scope]


def variant_coefficients(
    variant: ModulationVariant, signal_U: Tensor, scope_U: Tensor, lam: float, gate: float, rng: np.random.Generator
) -> Tensor:
    """The coefficient of each unit; its mean over every scope is 1."""
    assert signal_U.ndim == 1 and signal_U.shape == scope_U.shape, (signal_U.shape, scope_U.shape)
    alpha_U = aem.coefficients(signal_U, scope_U, lam, gate)
    return shuffle_coefficients(alpha_U, scope_U, rng) if variant.shuffle else alpha_U


def shuffle_coefficients(alpha_U: Tensor, scope_U: Tensor, rng: np.random.Generator) -> Tensor:
    """The same coefficients within each scope, in a random order."""
    assert alpha_U.ndim == 1 and alpha_U.shape == scope_U.shape, (alpha_U.shape, scope_U.shape)
    order = torch.from_numpy(rng.permutation(len(scope_U)))
    taken = order[torch.argsort(scope_U[order], stable=True)]  # scope by scope, each in random order
    given = torch.argsort(scope_U, stable=True)
    return torch.empty_like(alpha_U).index_copy_(0, given, alpha_U[taken])


def filter_by_entropy_effect(variant: ModulationVariant, advantage_U: Tensor, alpha_U: Tensor) -> Tensor:
    """The coefficients of the units that are trained, and 0 for all others: the causal check.

    A trained response moves entropy by A alpha (S - H) (see `diagnostics.entropy_drift`), and where lambda is above 0,
    alpha < 1 stands for S > H. So A (alpha - 1) < 0 raises entropy, by uncertain successes and certain failures; > 0 lowers
    it, by certain successes and uncertain failures. A unit with 0 (alpha = 1, as in a gated group, or A = 0) is neither.
    """
    assert advantage_U.ndim == 1 and advantage_U.shape == alpha_U.shape, (advantage_U.shape, alpha_U.shape)
    if variant.keep == "all":
        return alpha_U
    side_U = advantage_U * (alpha_U - 1)
    return alpha_U.where(side_U < 0 if variant.keep == "raising" else side_U > 0, 0.0)


def advantage_bonus(
    variant: ModulationVariant, advantage_U: Tensor, alpha_U: Tensor, signal_U: Tensor, trajectory_U: Tensor
) -> Tensor | None:
    """The term that is added to the modulated advantage of each unit; None for a variant that has none.

    EMPG: zeta * exp(-k' Htilde of the next response of the trajectory), 0 after the last, Htilde over the batch; then the mean
    over the batch is subtracted, so that signs may change and the mean is 0.
    """
    shapes = {advantage_U.shape, alpha_U.shape, signal_U.shape, trajectory_U.shape}
    assert advantage_U.ndim == 1 and len(shapes) == 1, shapes
    if not (variant.bonus or variant.centred):
        return None
    added_U = torch.zeros_like(alpha_U)
    if variant.bonus and len(signal_U):
        span = signal_U.max() - signal_U.min()
        clear_U = torch.exp(-variant.bonus_lam * (signal_U - signal_U.min()) / torch.where(span > 0, span, 1.0))
        added_U[:-1] = variant.bonus * clear_U[1:] * (trajectory_U[1:] == trajectory_U[:-1])
    return added_U - (advantage_U * alpha_U + added_U).mean() if variant.centred else added_U
