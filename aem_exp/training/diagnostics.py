"""Statistics of modulation and entropy that are logged at every step; pure functions of tensors.

Shapes: R responses, S states; D bootstrap draws and K columns of sums.
"""

import torch
from torch import Tensor


def modulation_statistics(
    alpha_R: Tensor,
    entropy_R: Tensor,
    advantage_R: Tensor,
    tokens_R: Tensor,
    turn_R: Tensor,
) -> dict[str, float]:
    """Statistics of the coefficients of one step (R responses).

    Returns:
        alpha_*: quantiles; means over tokens, over |A|, and over the responses with A > 0 and with A < 0 (left out where there
            are none); correlations with the number of tokens and with the turn.
        advantage_balance, advantage_balance_token: sum of alpha A / sum of |A|; the second counts each response as often as it
            has tokens, as a mean over tokens does.
        entropy_std: of the responses' entropies, in nats.
    """
    shapes = {value_R.shape for value_R in (alpha_R, entropy_R, advantage_R, tokens_R, turn_R)}
    assert alpha_R.ndim == 1 and len(shapes) == 1, shapes
    if not len(alpha_R):
        return {}
    low, median, high = torch.quantile(alpha_R, torch.tensor([0.05, 0.5, 0.95])).tolist()
    one_R = torch.ones_like(alpha_R)
    out = {
        "alpha_q05": low,
        "alpha_q50": median,
        "alpha_q95": high,
        "entropy_std": entropy_R.std(correction=0).item(),
        "alpha_token_mean": _ratio(alpha_R, tokens_R, tokens_R),
        "alpha_advantage_mean": _ratio(alpha_R, advantage_R.abs(), advantage_R.abs(), nothing=1.0),
        "advantage_balance": _ratio(alpha_R, advantage_R, advantage_R.abs()),
        "advantage_balance_token": _ratio(alpha_R, tokens_R * advantage_R, tokens_R * advantage_R.abs()),
        "alpha_length_corr": correlation(alpha_R, tokens_R),
        "alpha_turn_corr": correlation(alpha_R, turn_R),
    }
    signs = {"alpha_positive_mean": advantage_R > 0, "alpha_negative_mean": advantage_R < 0}
    return out | {name: _ratio(alpha_R, one_R * of_R, one_R * of_R) for name, of_R in signs.items() if of_R.any()}


def _ratio(alpha_R: Tensor, weight_R: Tensor, mass_R: Tensor, nothing: float = 0.0) -> float:
    """The weighted sum of alpha over the sum of the masses; `nothing` where that is 0."""
    mass = mass_R.sum().item()
    return (alpha_R * weight_R).sum().item() / mass if mass > 0 else nothing


def relative_surprisal(surprisal_R: Tensor, state_R: Tensor) -> Tensor:
    """S - H(s) of each response, in nats, with H(s) the mean surprisal of the *others* at its state; NaN where there are none.

    Never from the response's own token entropies: S minus those leaves noise alone, and drops what they predict.
    """
    assert surprisal_R.ndim == 1 and state_R.shape == surprisal_R.shape, (surprisal_R.shape, state_R.shape)
    state_R = torch.unique(state_R, return_inverse=True)[1]
    surprisal_R, count_S = surprisal_R.double(), torch.bincount(state_R)
    total_S = surprisal_R.new_zeros(len(count_S)).index_add_(0, state_R, surprisal_R)
    others_R = count_S[state_R] - 1
    return surprisal_R - (total_S[state_R] - surprisal_R) / others_R.where(others_R > 0, torch.nan)


def entropy_drift(
    advantage_R: Tensor, modulated_R: Tensor | None, surprisal_R: Tensor, state_R: Tensor
) -> dict[str, float]:
    """How the advantages move the entropy of the states, per response: mean of A (S - H).

    Args:
        advantage_R: before modulation.
        modulated_R: after it; the change is `aem`, for the paper mean of A (alpha - 1) (S - H). None: no modulation.
        surprisal_R: nats.
        state_R: integer id of the state of each response; one that is alone in its state is left out.
    """
    assert advantage_R.shape == surprisal_R.shape == state_R.shape, (
        advantage_R.shape,
        surprisal_R.shape,
        state_R.shape,
    )
    assert modulated_R is None or modulated_R.shape == advantage_R.shape, (modulated_R.shape, advantage_R.shape)
    relative_R = relative_surprisal(surprisal_R, state_R)
    compared_R = ~relative_R.isnan()
    if not compared_R.any():
        return {}
    weights = {"advantage": advantage_R} | ({} if modulated_R is None else {"aem": modulated_R - advantage_R})
    return {name: (weight_R * relative_R)[compared_R].mean().item() for name, weight_R in weights.items()}


def proxy_validity(
    alpha_R: Tensor, relative_R: Tensor, state_R: Tensor, draws: int = 2000, seed: int = 0
) -> dict[str, float | int | list[float]]:
    """How well 1 - alpha stands for S - H(s), where coefficients compare the responses of a state.

    Args:
        alpha_R: their mean is 1 in every state.
        relative_R: see `relative_surprisal`; its mean is 0 in every state.
        state_R: ids 0..S-1.
        draws: of as many states, with replacement, for the 95 % intervals.

    Returns:
        r: Pearson's, over all responses. states_agree: of the `states_open`, in which alpha differs (the gate leaves it 1 in the
        others) and surprisal too, those where the two vary together. responses_agree: the share of responses of open states whose
        two signs are one. Each with its interval; NaN where nothing is open.
    """
    assert alpha_R.ndim == 1 and alpha_R.shape == relative_R.shape == state_R.shape, (alpha_R.shape, relative_R.shape)
    x_R, y_R = 1 - alpha_R.double(), relative_R.double()
    states = int(state_R.max()) + 1
    parts_RK = torch.stack([x_R * x_R, y_R * y_R, x_R * y_R, (x_R * y_R > 0).double(), torch.ones_like(x_R)], dim=1)
    sums_SK = x_R.new_zeros(states, 5).index_add_(0, state_R, parts_RK)
    open_S = (sums_SK[:, 0] > 0) & (sums_SK[:, 1] > 0)
    xx_S, yy_S, xy_S, same_S, count_S = sums_SK.unbind(1)
    agree_S = (xy_S > 0) & open_S
    columns_SK = torch.stack([xx_S, yy_S, xy_S, agree_S, open_S, same_S * open_S, count_S * open_S], dim=1)
    drawn_DS = torch.randint(states, (draws, states), generator=torch.Generator().manual_seed(seed))
    out: dict[str, float | int | list[float]] = {"states": states, "responses": len(x_R)}
    out |= {"states_open": int(open_S.sum()), "states_agree": int(agree_S.sum())}
    shares, drawn_shares = _agreement_shares(columns_SK.sum(0)), _agreement_shares(columns_SK[drawn_DS].sum(1))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for name in shares:
        out[f"{name}_interval"] = torch.nanquantile(drawn_shares[name], ends).tolist()
    return out | {name: shares[name].item() for name in ("r", "responses_agree")}


def _agreement_shares(total_K: Tensor) -> dict[str, Tensor]:
    """Pearson's r and the shares that agree, from sums over states; the columns are in the last dimension."""
    xx, yy, xy, agree, opened, same, counted = total_K.unbind(-1)
    return {"r": xy / (xx * yy).sqrt(), "states_agree": agree / opened, "responses_agree": same / counted}


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; 0 where one of the two is constant."""
    assert x.ndim == 1 and x.shape == y.shape, (x.shape, y.shape)
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 1e-12 else 0.0
