"""Estimators of the entropy of a response with less noise, or without the effect of its length, than its mean token entropy.

The mean token entropy Hbar of a short response is noisy, and min-max scaling turns noise into coefficients. If token entropies
depend on the position, Hbar also depends on the length. The paper (arXiv 2605.00425) leaves both points open.

- `shrink`: empirical-Bayes shrinkage of Hbar to the mean of its scope. It lowers the noise.
- `subtract_positions`: the mean residual from the entropy that is usual at each token position. It removes the effect of length.

Neither replaces the other. AEM's coefficients do not change under an increasing affine map of the entropies of a scope, so
shrinkage of responses of equal length changes nothing but the gate.

Shapes: K generated tokens of the step, ordered by response, then by position; R responses; S scopes.
"""

from typing import Final, Literal

import torch
from torch import Tensor

KAPPA: Final = 4.0  # prior tokens of `subtract_positions`
SMALLEST_SCOPE: Final = 3  # responses; the spread between fewer cannot be estimated
Estimator = Literal["mean", "shrunk", "residual", "residual_shrunk"]


def estimate_entropy(estimator: Estimator, entropy_K: Tensor, response_K: Tensor, scope_R: Tensor) -> Tensor:
    """Estimate the entropy of each response.

    Args:
        estimator: `mean`: the mean token entropy, as in the paper. `shrunk`: its `shrink`. `residual`: `subtract_positions`.
            `residual_shrunk`: first `subtract_positions`, then `shrink`.
        entropy_K: token entropies in nats.
        response_K: response 0..R-1 of each token, in increasing order.
        scope_R: id of the scope of each response.

    Returns:
        (R,) float32, in nats.
    """
    assert entropy_K.ndim == 1 and entropy_K.shape == response_K.shape, (entropy_K.shape, response_K.shape)
    value_K = entropy_K.double()
    match estimator:
        case "mean":
            entropy_R = _means(value_K, response_K, len(scope_R))
        case "shrunk":
            entropy_R = shrink(value_K, response_K, scope_R)
        case "residual":
            entropy_R = subtract_positions(value_K, response_K, scope_R)
        case "residual_shrunk":
            entropy_R = shrink(residuals(value_K, response_K, scope_R), response_K, scope_R)
    return entropy_R.float()


def residuals(entropy_K: Tensor, response_K: Tensor, scope_R: Tensor, kappa: float = KAPPA) -> Tensor:
    """Subtract from each token entropy the mean of the *other* responses of its scope at the same position.

    b(p) = (sum of their entropies at position p + kappa * Hall) / (their number + kappa), where Hall is the mean token entropy of
    the scope. The residual is H - b(p) + Hall.

    Args:
        kappa: weight of Hall, in tokens. Positions that few responses reach are close to Hall.
    """
    scope_R = torch.unique(scope_R, return_inverse=True)[1]
    position_K = _positions(response_K, len(scope_R))
    scope_K = scope_R[response_K]
    overall_K = _means(entropy_K, scope_K, int(scope_R.max()) + 1 if len(scope_R) else 0)[scope_K]
    cell_K = torch.unique(torch.stack([scope_K, position_K]), dim=1, return_inverse=True)[1]
    cells = int(cell_K.max()) + 1 if len(cell_K) else 0
    sum_K = entropy_K.new_zeros(cells).index_add_(0, cell_K, entropy_K)[cell_K] - entropy_K
    count_K = torch.bincount(cell_K, minlength=cells)[cell_K] - 1
    return entropy_K - (sum_K + kappa * overall_K) / (count_K + kappa) + overall_K


def subtract_positions(entropy_K: Tensor, response_K: Tensor, scope_R: Tensor, kappa: float = KAPPA) -> Tensor:
    """(R,) float64: mean residual of each response in nats; see `residuals`."""
    return _means(residuals(entropy_K, response_K, scope_R, kappa), response_K, len(scope_R))


def shrink(entropy_K: Tensor, response_K: Tensor, scope_R: Tensor) -> Tensor:
    """Shrink the mean token entropy of each response to the mean of its scope, by empirical Bayes.

    For the m responses of a scope, with n_r tokens each: sigma2 is the pooled variance of the tokens within responses, and
    phi = max(1, (1 + a) / (1 - a)) corrects it for their pooled autocorrelation a. The variance of a mean is
    v_r = phi sigma2 / n_r. The variance tau2 between responses is estimated by the method of moments (DerSimonian and Laird,
    1986), and the estimate is mu + tau2 / (tau2 + v_r) * (Hbar_r - mu), where mu is the mean with weights 1 / (tau2 + v_r).

    Returns:
        (R,) float64, in nats. A scope with fewer than three responses keeps its means.
    """
    entropy_K = entropy_K.double()
    mean_R, tokens_R = _means(entropy_K, response_K, len(scope_R)), torch.bincount(response_K, minlength=len(scope_R))
    out_R = mean_R.clone()
    for scope in scope_R.unique():
        in_R = scope_R == scope
        if int(in_R.sum()) < SMALLEST_SCOPE:
            continue
        in_K = in_R[response_K]
        variance = _variance_of_tokens(entropy_K[in_K], mean_R[response_K[in_K]], response_K[in_K])
        out_R[in_R] = shrink_means(mean_R[in_R], variance / tokens_R[in_R])
    return out_R


def shrink_means(mean_R: Tensor, variance_R: Tensor) -> Tensor:
    """Shrink the means of one scope to their common mean; `variance_R` is the sampling variance of each mean."""
    if not (variance_R > 0).all():
        return mean_R
    weight_R = 1 / variance_R
    centre = (weight_R * mean_R).sum() / weight_R.sum()
    excess = (weight_R * (mean_R - centre) ** 2).sum() - (len(mean_R) - 1)
    between = (excess / (weight_R.sum() - (weight_R**2).sum() / weight_R.sum())).clamp(min=0)
    weight_R = 1 / (between + variance_R)
    centre = (weight_R * mean_R).sum() / weight_R.sum()
    return centre + between * weight_R * (mean_R - centre)


def _variance_of_tokens(entropy_K: Tensor, mean_K: Tensor, response_K: Tensor) -> Tensor:
    """phi sigma2 of one scope: the variance within its responses, corrected for autocorrelation."""
    excess_K = entropy_K - mean_K
    squares = (excess_K**2).sum()
    free = len(entropy_K) - len(response_K.unique())
    if free < 1 or squares == 0:
        return squares * 0
    follows_K = response_K[1:] == response_K[:-1]
    correlation = ((excess_K[1:] * excess_K[:-1])[follows_K].sum() / squares).clamp(max=0.99)
    return squares / free * ((1 + correlation) / (1 - correlation)).clamp(min=1)


def _positions(response_K: Tensor, responses: int) -> Tensor:
    """(K,) index of each token in its response."""
    count_R = torch.bincount(response_K, minlength=responses)
    return torch.arange(len(response_K)) - (count_R.cumsum(0) - count_R)[response_K]


def _means(value_K: Tensor, id_K: Tensor, ids: int) -> Tensor:
    count = torch.bincount(id_K, minlength=ids).clamp(min=1)
    return value_K.new_zeros(ids).index_add_(0, id_K, value_K) / count
