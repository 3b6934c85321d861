"""Arms around the paper: what another scope, signal, unit, or order of the same coefficients would do.

The paper is `Arm()`. Everything else here is an ablation, a placebo or a rival, and composes around `aem.coefficients`.
Shapes: U units, each a response or a token, trajectory by trajectory and in order. Nothing here knows ranks.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aem_exp import aem


@dataclass(frozen=True)
class ModulationVariant:
    """Where an arm departs from the paper.

    Attributes:
        scope: which units share one range of entropies, and a mean coefficient of 1: those of the rollout group, of the
            trajectory, or of the whole batch.
        signal: mean token entropy, or mean surprisal (-log p of the sampled tokens) in its place.
        unit: what gets a coefficient: a response, or each token by its own signal.
        shuffle: permute the coefficients within their scope, by a seeded generator: the placebo.
        keep: train all units, or those alone whose training raises, or lowers, the entropy of the policy; see
            `filter_by_entropy_effect`.
        bonus: zeta of EMPG (arXiv 2509.09265): what the clarity of the trajectory's next response adds.
        bonus_lam: k' of EMPG.
        centred: subtract the mean over the batch from the modulated advantages, as EMPG does.
    """

    scope: Literal["group", "trajectory", "batch"] = "group"
    signal: Literal["entropy", "surprisal"] = "entropy"
    unit: Literal["response", "token"] = "response"
    shuffle: bool = False
    keep: Literal["all", "raising", "lowering"] = "all"
    bonus: float = 0.0
    bonus_lam: float = 1.0
    centred: bool = False


def scope_ids(arm: ModulationVariant, group_U: Tensor, trajectory_U: Tensor) -> Tensor:
    """Which units share a range of entropies."""
    return {"group": group_U, "trajectory": trajectory_U, "batch": torch.zeros_like(group_U)}[arm.scope]


def coefficients(
    arm: ModulationVariant, signal_U: Tensor, scope_U: Tensor, lam: float, gate: float, rng: np.random.Generator
) -> Tensor:
    """The coefficient of each unit; its mean over every scope is 1."""
    alpha_U = aem.coefficients(signal_U, scope_U, lam, gate)
    return shuffle_coefficients(alpha_U, scope_U, rng) if arm.shuffle else alpha_U


def shuffle_coefficients(alpha_U: Tensor, scope_U: Tensor, rng: np.random.Generator) -> Tensor:
    """The same coefficients within each scope, in a random order."""
    order = torch.from_numpy(rng.permutation(len(scope_U)))
    taken = order[torch.argsort(scope_U[order], stable=True)]  # scope by scope, each in random order
    given = torch.argsort(scope_U, stable=True)
    return torch.empty_like(alpha_U).index_copy_(0, given, alpha_U[taken])


def filter_by_entropy_effect(arm: ModulationVariant, advantage_U: Tensor, alpha_U: Tensor) -> Tensor:
    """The coefficients of the units that are trained, and 0 for all others: the causal check.

    A trained response moves entropy by A alpha (S - H) (see `diagnostics.drift`), and where lambda is above 0, alpha < 1 stands
    for S > H. So A (alpha - 1) < 0 raises entropy, by uncertain successes and certain failures; > 0 lowers it, by certain
    successes and uncertain failures. What is 0 (alpha = 1, as in a gated group, or A = 0) is of neither kind.
    """
    if arm.keep == "all":
        return alpha_U
    side_U = advantage_U * (alpha_U - 1)
    return alpha_U.where(side_U < 0 if arm.keep == "raising" else side_U > 0, 0.0)


def advantage_bonus(
    arm: ModulationVariant, advantage_U: Tensor, alpha_U: Tensor, signal_U: Tensor, trajectory_U: Tensor
) -> Tensor | None:
    """What is added to the modulated advantage of each unit; None where nothing is.

    EMPG: zeta * exp(-k' Htilde of the next response of the trajectory), nothing after the last, Htilde over the batch; then
    the mean over the batch is subtracted, so that signs may change and the mean is 0.
    """
    if not (arm.bonus or arm.centred):
        return None
    added_U = torch.zeros_like(alpha_U)
    if arm.bonus and len(signal_U):
        span = signal_U.max() - signal_U.min()
        clear_U = torch.exp(-arm.bonus_lam * (signal_U - signal_U.min()) / torch.where(span > 0, span, 1.0))
        added_U[:-1] = arm.bonus * clear_U[1:] * (trajectory_U[1:] == trajectory_U[:-1])
    return added_U - (advantage_U * alpha_U + added_U).mean() if arm.centred else added_U
