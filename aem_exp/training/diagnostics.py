"""Statistics of modulation and entropy for the log of each step. All functions are pure.

Notation: A advantage, alpha coefficient, S(a|s) = -log pi(a|s) the surprisal of a response a at a state s, H(s) = E S its mean.
The theory behind `entropy_drift`: under a natural-gradient step on a tabular policy, a response with advantage A changes the
entropy of its state by A (S - H).

Shapes: R responses, S states, D bootstrap draws, K columns of sums.
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
    """Statistics of the coefficients of one step.

    Args:
        alpha_R: coefficient of each response.
        entropy_R: mean token entropy of each response, in nats.
        advantage_R: advantage of each response before modulation.
        tokens_R: number of tokens of each response, as float.
        turn_R: index of the turn of each response, as float.

    Returns:
        `alpha_q05`, `alpha_q50`, `alpha_q95`: quantiles of alpha.
        `alpha_token_mean`, `alpha_advantage_mean`: means of alpha, weighted by tokens or by |A|.
        `alpha_positive_mean`, `alpha_negative_mean`: means of alpha over the responses with A > 0 or A < 0; left out if there
            are none.
        `alpha_length_corr`, `alpha_turn_corr`: correlations of alpha with the number of tokens and with the turn.
        `advantage_balance`: sum of alpha A / sum of |A|, over responses.
        `advantage_balance_token`: the same, with each response weighted by its number of tokens.
        `entropy_std`: population standard deviation of `entropy_R`, in nats.
        Empty if there are no responses.
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
        "alpha_advantage_mean": _ratio(alpha_R, advantage_R.abs(), advantage_R.abs(), default=1.0),
        "advantage_balance": _ratio(alpha_R, advantage_R, advantage_R.abs()),
        "advantage_balance_token": _ratio(alpha_R, tokens_R * advantage_R, tokens_R * advantage_R.abs()),
        "alpha_length_corr": correlation(alpha_R, tokens_R),
        "alpha_turn_corr": correlation(alpha_R, turn_R),
    }
    signs = {"alpha_positive_mean": advantage_R > 0, "alpha_negative_mean": advantage_R < 0}
    return out | {name: _ratio(alpha_R, one_R * has_R, one_R * has_R) for name, has_R in signs.items() if has_R.any()}


def _ratio(alpha_R: Tensor, weight_R: Tensor, mass_R: Tensor, default: float = 0.0) -> float:
    """sum(alpha * weight) / sum(mass); `default` if the denominator is 0."""
    mass = mass_R.sum().item()
    return (alpha_R * weight_R).sum().item() / mass if mass > 0 else default


def relative_surprisal(surprisal_R: Tensor, entropy_R: Tensor, state_R: Tensor) -> Tensor:
    """Estimate S - H(s) of each response, where H(s) is the mean summed token entropy of the *other* responses at its state.

    The surprisal of a response is the sum of its token entropies and of a rest with mean 0 (Doob decomposition). Both means are
    therefore H(s), for responses that are sampled from the policy without a filter such as top-p. The mean of summed token
    entropies has the smaller error if lengths vary little (Rao-Blackwell for each token). It has the larger error if the rest
    is negatively correlated with the entropies; `tests/bench/theory.py` has such a language.

    H(s) is not estimated from the token entropies of the response itself. They are the predictable part of its surprisal:
    subtracting them would leave only the unpredictable rest.

    Args:
        surprisal_R: surprisal of each response, summed over its tokens, in nats.
        entropy_R: token entropies of each response, summed over its tokens, in nats.
        state_R: integer id of the state of each response.

    Returns:
        (R,) float64, in nats; NaN for a response that is alone at its state.
    """
    shapes = {surprisal_R.shape, entropy_R.shape, state_R.shape}
    assert surprisal_R.ndim == 1 and len(shapes) == 1, shapes
    state_R = torch.unique(state_R, return_inverse=True)[1]
    surprisal_R, entropy_R, count_S = surprisal_R.double(), entropy_R.double(), torch.bincount(state_R)
    total_S = entropy_R.new_zeros(len(count_S)).index_add_(0, state_R, entropy_R)
    others_R = count_S[state_R] - 1
    return surprisal_R - (total_S[state_R] - entropy_R) / others_R.where(others_R > 0, torch.nan)


def entropy_drift(
    advantage_R: Tensor, modulated_R: Tensor | None, surprisal_R: Tensor, entropy_R: Tensor, state_R: Tensor
) -> dict[str, float]:
    """Estimate how the advantages change the entropy of the states: mean of A (S - H) over responses.

    Args:
        advantage_R: advantages A before modulation.
        modulated_R: advantages after modulation; None: no modulation.
        surprisal_R: surprisal S of each response, summed over its tokens, in nats.
        entropy_R: token entropies of each response, summed over its tokens, in nats; see `relative_surprisal`.
        state_R: integer id of the state of each response. Responses that are alone at their state are left out.

    Returns:
        `advantage`: mean of A (S - H), in nats.
        `aem`: the change by the modulation; for the paper, the mean of A (alpha - 1) (S - H). Left out without modulation.
        Empty if each response is alone at its state.
    """
    assert advantage_R.shape == surprisal_R.shape, (advantage_R.shape, surprisal_R.shape)
    assert modulated_R is None or modulated_R.shape == advantage_R.shape, (modulated_R.shape, advantage_R.shape)
    relative_R = relative_surprisal(surprisal_R, entropy_R, state_R)
    compared_R = ~relative_R.isnan()
    if not compared_R.any():
        return {}
    weights = {"advantage": advantage_R} | ({} if modulated_R is None else {"aem": modulated_R - advantage_R})
    return {name: (weight_R * relative_R)[compared_R].mean().item() for name, weight_R in weights.items()}


def proxy_validity(
    alpha_R: Tensor, relative_R: Tensor, state_R: Tensor, draws: int = 2000, seed: int = 0
) -> dict[str, float | int | list[float]]:
    """Measure how well 1 - alpha approximates S - H(s), with coefficients that compare the responses of one state.

    A state is *open* if both alpha and the surprisal differ among its responses. The gate closes a state: alpha is 1 there.

    Args:
        alpha_R: coefficient of each response; its mean is 1 in every state.
        relative_R: `relative_surprisal` of each response, in nats; its mean is 0 in every state.
        state_R: state ids 0..S-1.
        draws: number of bootstrap samples of S states, for the 95 % intervals.

    Returns:
        `states`, `responses`: their numbers.
        `r`: Pearson's correlation of 1 - alpha and S - H over all responses.
        `states_open`: number of open states.
        `states_agree`: number of open states in which the two covary positively.
        `responses_agree`: share of the responses of open states for which the two have the same sign.
        `*_interval`: 95 % bootstrap intervals over states (as a share for `states_agree`).
        Values are NaN if no state is open.
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
    """Pearson's r and the shares of agreement, from sums over states; the K columns are in the last dimension."""
    xx, yy, xy, agree, opened, same, counted = total_K.unbind(-1)
    return {"r": xy / (xx * yy).sqrt(), "states_agree": agree / opened, "responses_agree": same / counted}


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; 0 if one of the two is constant."""
    assert x.ndim == 1 and x.shape == y.shape, (x.shape, y.shape)
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 1e-12 else 0.0
