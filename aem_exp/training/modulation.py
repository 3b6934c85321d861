"""Modulates the credit of a step: AEM of the paper and its variants, all built on `aem.coefficients`.

`ModulationVariant()` is the paper (arXiv 2605.00425). The other variants are ablations, controls and a rival method (EMPG).
A credit contains the measurements of all ranks, so the functions here are independent of ranks.

Shapes: R responses; U units, each a response or a token, ordered by trajectory, then by position.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aem_exp import aem
from aem_exp.core.errors import RunError
from aem_exp.training import controls
from aem_exp.training.controls import Keep
from aem_exp.training.credit import AssignedCredit, MeasuredCredit, ModulatedCredit, Unit, add_modulation
from aem_exp.training.entropy_estimators import Estimator, estimate_entropy

Scope = Literal["group", "trajectory", "batch", "state", "turn", "task_type"]
Signal = Literal["entropy", "surprisal", "length", "turn", "noise", "score_norm"]
Within = Literal["scope", "sign", "length", "turn", "state", "all"]


@dataclass(frozen=True)
class ModulationVariant:
    """The differences between a modulation and the paper; the defaults are the paper."""

    scope: Scope = "group"
    """the units over which signals are scaled to [0, 1] and coefficients have mean 1: the rollout group, the trajectory, the
    whole batch of the step, the responses of a group at the same observation (`state`) or at the same turn index (`turn`), or the
    responses to tasks of the same type"""
    signal: Signal = "entropy"
    """the quantity that is scaled; see `compute_signal`"""
    entropy: Estimator = "mean"
    """estimator of the entropy of a response from its token entropies; see `entropy_estimators`"""
    unit: Unit = "response"
    """what gets a coefficient: each response, or each token by its own signal"""
    normaliser: Literal["minmax", "rank"] = "minmax"
    """how the signal is scaled to [0, 1] in its scope: linearly, or by its rank, which one outlier cannot change"""
    gate_complement: bool = False
    """modulate only the scopes that the gate would leave unmodulated"""
    shuffle: bool = False
    """placebo: permute the coefficients, with a seeded generator"""
    within: Within = "scope"
    """units that exchange coefficients in the placebo: those of a scope, or only those of a scope that agree in the sign of A, in
    length (quarter of the scope), in turn index, in state, or (`all`) in sign, length and turn index"""
    average: Literal["none", "sign", "state"] = "none"
    """replace each coefficient by its mean over the scope and the sign of A, or over the state"""
    keep: Keep = "all"
    """train all units, or only those that are predicted to raise or lower the entropy; see `controls.select_units`"""
    keep_by: Literal["zero", "mask", "mask_scaled", "select"] = "zero"
    """how the other units are left out. `zero`: their coefficient is 0, but their tokens count in the mean of the loss. `mask`:
    their tokens are in no term and no mean of the loss. `mask_scaled`: in no term, but they count in the mean. `select`: as
    `zero`, and the coefficient of the trained units is 1"""
    keep_random: bool = False
    """control of the size: train equally many units of each scope and sign of A, but random ones"""
    bonus: float = 0.0
    """zeta of EMPG (arXiv 2509.09265): weight of the bonus for a next response of low entropy"""
    bonus_lam: float = 1.0
    """k' of EMPG: strength of the entropy in this bonus"""
    centred: bool = False
    """subtract the batch mean from the modulated advantages, as EMPG does"""
    match: Literal["gradient_norm", "update_norm", "kl"] | None = None
    """matched control: train without the modulation, in updates of the size that it would give; see `training.size_match`"""

    @property
    def needs_tokens(self) -> bool:
        """Whether the signal of each token is needed, not only the mean of each response."""
        return self.unit == "token" or self.entropy != "mean"


def modulate_credit(
    credit: MeasuredCredit,
    variant: ModulationVariant,
    lam: float,
    gate: float,
    rng: np.random.Generator,
    weight_R: Tensor | None = None,
) -> ModulatedCredit:
    """Compute the coefficient and the final advantage of each unit.

    For the paper, alpha = `aem.coefficients` of the mean token entropies in each group, and the final advantage is alpha * A.

    Args:
        credit: with the measurements of all ranks.
        lam: strength lambda of the modulation; see `aem.coefficients`.
        gate: in units of the signal (nats); see `aem.coefficients`.
        rng: draws all random numbers of a variant; it must be seeded equally on all ranks.
        weight_R: weight of each response in the loss; see `updates.response_weights`. None: its number of tokens.

    Returns:
        The credit, with these metrics. `aem/gated_share`: share of the scopes without modulation. `aem/alone_share`: share of the
        units that are alone in their scope. `aem/moved_share`: share of the units whose coefficient a placebo changed.
        `aem/kept_share`: share of the trained units, if the variant selects units.
    """
    advantage_U = credit.advantage_U
    scope_U = scope_ids(variant, credit)
    signal_U = compute_signal(variant, credit, scope_U, rng)
    open_U = modulated_units(variant, signal_U, scope_U, gate)
    metrics = {
        "aem/gated_share": 1 - _share_of_scopes(open_U, scope_U),
        "aem/alone_share": _mean(torch.unique(scope_U, return_inverse=True, return_counts=True)[2] == 1, scope_U),
    }
    alpha_U = variant_coefficients(variant, signal_U, scope_U, open_U, lam)
    weight_U = (credit.tokens_R if weight_R is None else weight_R)[credit.response_U].float()
    if variant.shuffle:
        paper_U, alpha_U = alpha_U, shuffled_coefficients(variant, credit, alpha_U, scope_U, weight_U, rng)
        metrics["aem/moved_share"] = (alpha_U != paper_U).float().mean().item()
    alpha_U = averaged_coefficients(variant, credit, alpha_U, scope_U, weight_U)
    chosen_U = controls.select_units(variant.keep, variant.keep_random, advantage_U, alpha_U, scope_U, rng)
    if variant.keep != "all":
        metrics["aem/kept_share"] = chosen_U.float().mean().item()
        alpha_U = (torch.ones_like(alpha_U) if variant.keep_by == "select" else alpha_U).where(chosen_U, 0.0)
    masks = variant.keep_by in ("mask", "mask_scaled")
    one_per_row_U = torch.arange(len(alpha_U))[:, None]  # (U, 1): as if each row of a batch had one unit
    modulated_U = aem.modulate(advantage_U, alpha_U, one_per_row_U)[:, 0]
    bonus_U = advantage_bonus(variant, advantage_U, alpha_U, signal_U, credit.trajectory_U)
    return add_modulation(
        credit,
        alpha_U=alpha_U,
        modulated_advantage_U=modulated_U if bonus_U is None else modulated_U + bonus_U,
        trained_U=chosen_U if masks else torch.ones_like(chosen_U),
        metrics=metrics,
    )


def compute_signal(
    variant: ModulationVariant, credit: MeasuredCredit, scope_U: Tensor, rng: np.random.Generator
) -> Tensor:
    """(U,) float32: the quantity from which coefficients are computed.

    `entropy`: entropy in nats, by the estimator of the variant. `surprisal`: mean -log p of the sampled tokens, in nats. The
    others are controls, and exist per response only. `length`: number of tokens. `turn`: index of the turn. `noise`: uniform
    random numbers. `score_norm`: mean norm of the gradient of log p with respect to the logits.
    """
    if variant.unit == "token":
        return credit.token_signal
    match variant.signal:
        case "entropy" if variant.needs_tokens:
            return estimate_entropy(variant.entropy, credit.token_signal, credit.response_K, scope_U)
        case "entropy":
            return credit.entropy_R
        case "surprisal":
            return credit.surprisal_R
        case "length":
            return credit.tokens_R.float()
        case "turn":
            return credit.turn_R.float()
        case "noise":
            return torch.from_numpy(rng.random(len(credit.entropy_R))).float()
        case "score_norm":
            assert credit.score_norm_R is not None
            return credit.score_norm_R


def scope_ids(variant: ModulationVariant, credit: AssignedCredit) -> Tensor:
    """(U,) ids of the scopes: signals are scaled over the units of one scope.

    Raises:
        RunError: scope `task_type`, in an environment whose tasks have no type.
    """
    group_R = credit.group_R
    match variant.scope:
        case "group":
            scope_R = group_R
        case "trajectory":
            scope_R = credit.trajectory_R
        case "batch":
            scope_R = torch.zeros_like(group_R)
        case "state":
            scope_R = credit.state_R
        case "turn":
            scope_R = controls.combine_ids([group_R, credit.turn_R])
        case "task_type":
            if credit.kept and not any(t.task.kind for t in credit.kept):
                raise RunError("modulation.scope=task_type: the tasks of this environment have no type (`Task.kind`)")
            scope_R = credit.task_type_R
    return scope_R[credit.response_U]


def modulated_units(variant: ModulationVariant, signal_U: Tensor, scope_U: Tensor, gate: float) -> Tensor:
    """(U,) bool: whether the scope of a unit is modulated. A scope without spread is not."""
    closed_S = aem.gated(signal_U, scope_U, gate)
    open_S = closed_S & ~aem.gated(signal_U, scope_U, 0.0) if variant.gate_complement else ~closed_S
    return open_S[torch.unique(scope_U, return_inverse=True)[1]]


def variant_coefficients(
    variant: ModulationVariant, signal_U: Tensor, scope_U: Tensor, open_U: Tensor, lam: float
) -> Tensor:
    """(U,) coefficient of each unit before controls; its mean over each scope is 1."""
    assert signal_U.ndim == 1 and signal_U.shape == scope_U.shape == open_U.shape, (signal_U.shape, scope_U.shape)
    value_U = controls.rank_within(signal_U, scope_U) if variant.normaliser == "rank" else signal_U
    return aem.coefficients(value_U, scope_U, lam, gate=0.0).where(open_U, 1.0)


def shuffled_coefficients(
    variant: ModulationVariant,
    credit: AssignedCredit,
    alpha_U: Tensor,
    scope_U: Tensor,
    weight_U: Tensor,
    rng: np.random.Generator,
) -> Tensor:
    """(U,) coefficients of the placebo: permuted within each stratum.

    A permutation within the whole scope (`within="scope"`) changes the sum of alpha A over successes and over failures. All
    others keep both sums, weighted as in the loss, by `controls.match_sums`.
    """
    keys = {
        "sign": lambda: credit.advantage_U.sign().long(),
        "length": lambda: controls.length_bins(credit.tokens_R[credit.response_U], scope_U),
        "turn": lambda: credit.turn_R[credit.response_U],
        "state": lambda: credit.state_R[credit.response_U],
    }
    chosen = ("sign", "length", "turn") if variant.within == "all" else (variant.within,)
    stratum_U = controls.combine_ids([scope_U, *(keys[key]() for key in chosen if key != "scope")])
    shuffled_U = controls.shuffle_coefficients(alpha_U, stratum_U, rng)
    if variant.within == "scope":
        return shuffled_U
    cell_U = controls.combine_ids([scope_U, keys["sign"]()])
    return controls.match_sums(shuffled_U, alpha_U, weight_U * credit.advantage_U.abs(), cell_U)


def averaged_coefficients(
    variant: ModulationVariant, credit: AssignedCredit, alpha_U: Tensor, scope_U: Tensor, weight_U: Tensor
) -> Tensor:
    """(U,) coefficients, averaged as the variant says.

    `sign`: over the scope and the sign of A, with weights |A| times the weight in the loss. Only the balance of successes and
    failures remains. `state`: over the scope and the state, with the weights in the loss. Only the choice of states remains.
    """
    if variant.average == "none":
        return alpha_U
    if variant.average == "sign":
        cell_U = controls.combine_ids([scope_U, credit.advantage_U.sign().long()])
        return controls.average_coefficients(alpha_U, weight_U * credit.advantage_U.abs(), cell_U)
    cell_U = controls.combine_ids([scope_U, credit.state_R[credit.response_U]])
    return controls.average_coefficients(alpha_U, weight_U, cell_U)


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


def _share_of_scopes(open_U: Tensor, scope_U: Tensor) -> float:
    """Share of the scopes whose units are modulated."""
    return len(scope_U[open_U].unique()) / max(1, len(scope_U.unique()))


def _mean(scopes: Tensor, scope_U: Tensor) -> float:
    """Share of the units in the scopes for which a bool per scope is true."""
    return float(scopes[torch.unique(scope_U, return_inverse=True)[1]].float().mean())
