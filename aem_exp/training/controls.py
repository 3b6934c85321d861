"""Controls of a modulation: placebos, averages and selections of units, each of which removes one explanation of an effect.

A placebo permutes the coefficients within *strata*: sets of units that agree in their scope and in one more property. The units
of a stratum keep what they have in common, and lose the tie between coefficient and entropy.

Shapes: U units, each a response or a token. All functions are pure. Ids are integers in any order, unless stated otherwise.
"""

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

LENGTH_BINS: Final = 4  # per scope
Keep = Literal["all", "raising", "lowering"]


def combine_ids(ids: Sequence[Tensor]) -> Tensor:
    """(U,) ids 0, 1, ... of the combinations of several ids, each (U,)."""
    assert ids and len({value_U.shape for value_U in ids}) == 1, [value_U.shape for value_U in ids]
    return torch.unique(torch.stack(list(ids)), dim=1, return_inverse=True)[1]


def rank_within(value_U: Tensor, scope_U: Tensor) -> Tensor:
    """(U,) float32: rank of each value in its scope, from 0; equal values share the mean of their ranks."""
    assert value_U.ndim == 1 and value_U.shape == scope_U.shape, (value_U.shape, scope_U.shape)
    tie_U = combine_ids([scope_U.double(), value_U.double()])  # ids are sorted by scope, then by value
    scope_U = torch.unique(scope_U, return_inverse=True)[1]
    count_T = torch.bincount(tie_U)
    first_T = count_T.cumsum(0) - count_T
    start_U = (torch.bincount(scope_U).cumsum(0) - torch.bincount(scope_U))[scope_U]
    return (first_T + (count_T - 1) / 2)[tie_U].float() - start_U


def length_bins(tokens_U: Tensor, scope_U: Tensor) -> Tensor:
    """(U,) int64: quantile bin 0..3 of the length of each unit in its scope. Equal lengths share a bin."""
    scope_U = torch.unique(scope_U, return_inverse=True)[1]
    count_U = torch.bincount(scope_U)[scope_U]
    return (rank_within(tokens_U, scope_U) * LENGTH_BINS / count_U).long()


def shuffle_coefficients(alpha_U: Tensor, stratum_U: Tensor, rng: np.random.Generator) -> Tensor:
    """Permute the coefficients at random within each stratum. A stratum of one unit keeps its coefficient."""
    assert alpha_U.ndim == 1 and alpha_U.shape == stratum_U.shape, (alpha_U.shape, stratum_U.shape)
    order = torch.from_numpy(rng.permutation(len(stratum_U)))
    source = order[torch.argsort(stratum_U[order], stable=True)]  # sorted by stratum, in random order within each
    target = torch.argsort(stratum_U, stable=True)
    return torch.empty_like(alpha_U).index_copy_(0, target, alpha_U[source])


def match_sums(alpha_U: Tensor, target_U: Tensor, mass_U: Tensor, cell_U: Tensor) -> Tensor:
    """Scale coefficients so that the sum of mass * alpha of each cell is that of mass * target.

    With `mass` = weight in the loss * |A| and cells of equal scope and sign of A, the sums of alpha A over successes and over
    failures stay the same. A placebo then changes neither the size of a step nor the balance of successes and failures.

    Args:
        alpha_U: coefficients to scale.
        target_U: coefficients with the sums to keep.
        mass_U: non-negative.
        cell_U: id of the cell of each unit. A cell without mass is not scaled.
    """
    assert alpha_U.ndim == 1 and alpha_U.shape == target_U.shape == mass_U.shape == cell_U.shape
    cell_U = torch.unique(cell_U, return_inverse=True)[1]
    sums, wanted = (_sum_by_id((mass_U * value_U).double(), cell_U) for value_U in (alpha_U, target_U))
    factor = torch.where(sums > 0, wanted / sums.where(sums > 0, 1.0), 1.0)
    return alpha_U * factor[cell_U].float()


def average_coefficients(alpha_U: Tensor, weight_U: Tensor, cell_U: Tensor) -> Tensor:
    """Replace each coefficient by the weighted mean of its cell. The sum of weight * alpha of each cell stays the same.

    Args:
        weight_U: weight of each unit; a cell without weight keeps its coefficients.
        cell_U: id of the cell of each unit.
    """
    assert alpha_U.ndim == 1 and alpha_U.shape == weight_U.shape == cell_U.shape, (alpha_U.shape, cell_U.shape)
    cell_U = torch.unique(cell_U, return_inverse=True)[1]
    total, mass = (_sum_by_id(value_U.double(), cell_U)[cell_U] for value_U in (alpha_U * weight_U, weight_U))
    return torch.where(mass > 0, total / mass.where(mass > 0, 1.0), alpha_U).float()


def select_units(
    keep: Keep, at_random: bool, advantage_U: Tensor, alpha_U: Tensor, scope_U: Tensor, rng: np.random.Generator
) -> Tensor:
    """(U,) bool: the units that are trained, by their predicted effect on the entropy of the policy: the causal check.

    A trained response changes the entropy by A alpha (S - H) (see `diagnostics.entropy_drift`). For lambda > 0, AEM takes
    alpha < 1 as a sign of S > H. Hence:

    - A (alpha - 1) < 0 raises the entropy: successes of high entropy and failures of low entropy (`keep="raising"`).
    - A (alpha - 1) > 0 lowers the entropy: successes of low entropy and failures of high entropy (`keep="lowering"`).
    - A (alpha - 1) = 0 belongs to neither: A = 0, or alpha = 1 as in a gated group.

    Args:
        at_random: control of the size: from each scope and sign of A, select as many units as `keep` does, but at random.
        rng: seeded equally on all ranks; used only with `at_random`.
    """
    assert advantage_U.ndim == 1 and advantage_U.shape == alpha_U.shape == scope_U.shape
    if keep == "all":
        return torch.ones_like(alpha_U, dtype=torch.bool)
    side_U = advantage_U * (alpha_U - 1)
    chosen_U = side_U < 0 if keep == "raising" else side_U > 0
    if not at_random:
        return chosen_U
    cell_U = combine_ids([scope_U, advantage_U.sign().long()])
    return shuffle_coefficients(chosen_U, cell_U, rng)


def _sum_by_id(value_U: Tensor, id_U: Tensor) -> Tensor:
    """Sum of the values of each id 0, 1, ..."""
    count = int(id_U.max()) + 1 if len(id_U) else 0
    return value_U.new_zeros(count).index_add_(0, id_U, value_U)
