"""What a step shows of the method: pure numbers for the log.

Only the mean of alpha over *responses* is 1 by construction. Its token-weighted and advantage-weighted means are a hidden
change of the step size, and its correlation with length and turn a hidden preference: all are logged.
"""

import torch
from torch import Tensor


def modulation(
    alpha_R: Tensor,
    entropy_R: Tensor,
    advantage_R: Tensor,
    tokens_R: Tensor,
    turn_R: Tensor,
) -> dict[str, float]:
    """Statistics of the coefficients of one step (R responses)."""
    if not len(alpha_R):
        return {}
    low, median, high = torch.quantile(alpha_R, torch.tensor([0.05, 0.5, 0.95])).tolist()
    weight_R = advantage_R.abs()
    mass = weight_R.sum()
    return {
        "alpha_q05": low,
        "alpha_q50": median,
        "alpha_q95": high,
        "entropy_std": entropy_R.std(correction=0).item(),
        "alpha_token_mean": ((alpha_R * tokens_R).sum() / tokens_R.sum()).item(),
        "alpha_advantage_mean": ((alpha_R * weight_R).sum() / mass).item() if mass > 0 else 1.0,
        "alpha_length_corr": correlation(alpha_R, tokens_R),
        "alpha_turn_corr": correlation(alpha_R, turn_R),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; 0 where one of the two is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 1e-12 else 0.0
