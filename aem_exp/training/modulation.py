"""Modulates the credit of a step: AEM of the paper and its variants, all built on `aem.coefficients`.

`ModulationVariant()` is the paper (arXiv 2605.00425). The other variants are ablations, a placebo and a rival method (EMPG).
A credit contains the measurements of all ranks, so the functions here are independent of ranks.

Shapes: U units, each a response or a token, ordered by trajectory, then by position.
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
    """The differences between a modulation and the paper; the defaults are the paper."""

    scope: Literal["group", "trajectory", "batch"] = "group"
    """the units over which entropies are scaled to [0, 1] and coefficients have mean 1: the rollout group, the trajectory, or
    the whole batch of the step"""
    signal: Literal["entropy", "surprisal"] = "entropy"
    """the quantity that is scaled: mean token entropy, or mean surprisal (-log p of the sampled tokens), in nats"""
    unit: Unit = "response"
    """what gets a coefficient: each response, or each token by its own signal"""
    shuffle: bool = False
    """placebo: permute the coefficients within their scope, with a seeded generator"""
    keep: Literal["all", "raising", "lowering"] = "all"
    """train all units, or only those that are predicted to raise or lower the entropy of the policy; see
    `filter_by_entropy_effect`"""
    bonus: float = 0.0
    """zeta of EMPG (arXiv 2509.09265): weight of the bonus for a next response of low entropy"""
    bonus_lam: float = 1.0
    """k' of EMPG: strength of the entropy in this bonus"""
    centred: bool = False
    """subtract the batch mean from the modulated advantages, as EMPG does"""


def modulate_credit(
    credit: MeasuredCredit, variant: ModulationVariant, lam: float, gate: float, rng: np.random.Generator
) -> ModulatedCredit:
    """Compute the coefficient and the final advantage of each unit.

    For the paper, alpha = `aem.coefficients` of the mean token entropies in each group, and the final advantage is alpha * A.

    Args:
        credit: with the measurements of all ranks.
        lam: strength lambda of the modulation; see `aem.coefficients`.
        gate: in nats; see `aem.coefficients`.
        rng: permutes the coefficients of the placebo; it must be seeded equally on all ranks.
    """
    signal_U, trajectory_U, advantage_U = credit.signal_U, credit.trajectory_U, credit.advantage_U
    scope_U = scope_ids(variant, credit.group_M[trajectory_U], trajectory_U)
    metrics = {"aem/gated_share": aem.gated(signal_U, scope_U, gate).float().mean().item()}
    alpha_U = variant_coefficients(variant, signal_U, scope_U, lam, gate, rng)
    alpha_U = filter_by_entropy_effect(variant, advantage_U, alpha_U)
    if variant.keep != "all":
        metrics["aem/kept_share"] = (alpha_U > 0).float().mean().item()
    one_per_row_U = torch.arange(len(alpha_U))[:, None]  # (U, 1): as if each row of a batch had one unit
    modulated_U = aem.modulate(advantage_U, alpha_U, one_per_row_U)[:, 0]
    bonus_U = advantage_bonus(variant, advantage_U, alpha_U, signal_U, trajectory_U)
    return add_modulation(credit, alpha_U, modulated_U if bonus_U is None else modulated_U + bonus_U, metrics)


def scope_ids(variant: ModulationVariant, group_U: Tensor, trajectory_U: Tensor) -> Tensor:
    """(U,) ids of the scopes: entropies are scaled over the units of one scope."""
    assert group_U.ndim == 1 and group_U.shape == trajectory_U.shape, (group_U.shape, trajectory_U.shape)
    return {"group": group_U, "trajectory": trajectory_U, "batch": torch.zeros_like(group_U)}[variant.scope]


def variant_coefficients(
    variant: ModulationVariant, signal_U: Tensor, scope_U: Tensor, lam: float, gate: float, rng: np.random.Generator
) -> Tensor:
    """(U,) coefficient of each unit; its mean over each scope is 1."""
    assert signal_U.ndim == 1 and signal_U.shape == scope_U.shape, (signal_U.shape, scope_U.shape)
    alpha_U = aem.coefficients(signal_U, scope_U, lam, gate)
    return shuffle_coefficients(alpha_U, scope_U, rng) if variant.shuffle else alpha_U


def shuffle_coefficients(alpha_U: Tensor, scope_U: Tensor, rng: np.random.Generator) -> Tensor:
    """Permute the coefficients at random within each scope."""
    assert alpha_U.ndim == 1 and alpha_U.shape == scope_U.shape, (alpha_U.shape, scope_U.shape)
    order = torch.from_numpy(rng.permutation(len(scope_U)))
    source = order[torch.argsort(scope_U[order], stable=True)]  # sorted by scope, in random order within each
    target = torch.argsort(scope_U, stable=True)
    return torch.empty_like(alpha_U).index_copy_(0, target, alpha_U[source])


def filter_by_entropy_effect(variant: ModulationVariant, advantage_U: Tensor, alpha_U: Tensor) -> Tensor:
    """Set the coefficients of units that are not trained to 0: the causal check of the theory.

    A trained response changes the entropy by A alpha (S - H) (see `diagnostics.entropy_drift`). For lambda > 0, AEM takes
    alpha < 1 as a sign of S > H. Hence:

    - A (alpha - 1) < 0 raises the entropy: successes of high entropy and failures of low entropy (`keep="raising"`).
    - A (alpha - 1) > 0 lowers the entropy: successes of low entropy and failures of high entropy (`keep="lowering"`).
    - A (alpha - 1) = 0 belongs to neither: A = 0, or alpha = 1 as in a gated group.
    """
    assert advantage_U.ndim == 1 and advantage_U.shape == alpha_U.shape, (advantage_U.shape, alpha_U.shape)
    if variant.keep == "all":
        return alpha_U
    side_U = advantage_U * (alpha_U - 1)
    return alpha_U.where(side_U < 0 if variant.keep == "raising" else side_U > 0, 0.0)


def advantage_bonus(
    variant: ModulationVariant, advantage_U: Tensor, alpha_U: Tensor, signal_U: Tensor, trajectory_U: Tensor
) -> Tensor | None:
    """(U,) term that is added to the modulated advantage of each unit; None if the variant has no such term.

    EMPG (arXiv 2509.09265): zeta * exp(-k' * Htilde_next), where Htilde_next is the entropy of the next response of the
    trajectory, scaled to [0, 1] over the batch; 0 for the last response. Then the batch mean of A' = alpha * A + bonus is
    subtracted, so the mean of A' is 0 and signs may change.
    """
    shapes = {advantage_U.shape, alpha_U.shape, signal_U.shape, trajectory_U.shape}
    assert advantage_U.ndim == 1 and len(shapes) == 1, shapes
    if not (variant.bonus or variant.centred):
        return None
    added_U = torch.zeros_like(alpha_U)
    if variant.bonus and len(signal_U):
        span = signal_U.max() - signal_U.min()
        clarity_U = torch.exp(-variant.bonus_lam * (signal_U - signal_U.min()) / torch.where(span > 0, span, 1.0))
        added_U[:-1] = variant.bonus * clarity_U[1:] * (trajectory_U[1:] == trajectory_U[:-1])
    return added_U - (advantage_U * alpha_U + added_U).mean() if variant.centred else added_U
