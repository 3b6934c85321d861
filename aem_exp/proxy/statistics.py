"""What AEM's coefficient measures in real rollout groups: within and between states, at equal length, with length and turn.

Coefficients differ between the responses of one state, and between states. The mean of S - H(s) is 0 at each state. So the
differences of 1 - alpha between states cannot measure it, and only dilute the correlation:

    r = (covariance within states + covariance between states) / (sd of 1 - alpha x sd of S - H(s)),

where the second covariance is 0 except for noise. If it is 0, r is about the correlation within states times the square root of
`within_share`, the share of the variance of 1 - alpha within states.

Shapes: R sampled responses, S states, D bootstrap draws.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
LEVELS = (0.025, 0.975)


def group_validity(
    alpha_R: FloatArray,
    relative_R: FloatArray,
    entropy_R: FloatArray,
    tokens_R: FloatArray,
    turn_R: FloatArray,
    position_R: FloatArray,
    state_R: IntArray,
    group_S: IntArray,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, float | list[float]]:
    """Measure how 1 - alpha depends on S - H(s), and on other quantities.

    Args:
        alpha_R: coefficient of each response in its group.
        relative_R: S - H(s), in nats.
        entropy_R: H(s) of the state of each response, in nats.
        tokens_R: number of tokens.
        turn_R: index of the turn.
        position_R: turn divided by the number of turns of the episode.
        state_R: state ids 0..S-1, each with equally many responses.
        group_S: group of each state. States of a group are not independent, so the bootstrap draws groups.

    Returns:
        `r`: correlation of 1 - alpha and S - H(s). `r_within`, `r_between`: the two parts of it. `within`: the correlation of the
        deviations from the means of the state. `within_share`: share of the variance of 1 - alpha within states.
        `equal_length`, `within_equal_length`: `r` and `within` as partial correlations, given the number of tokens.
        `length`, `turn`, `position`, `state_entropy`: correlation of alpha with these.
        Each with a 95 % interval over groups, `*_interval`. NaN where a quantity does not vary.
    """
    columns = np.stack([1 - alpha_R, relative_R, tokens_R, turn_R, position_R, entropy_R])
    states, drawn = _bootstrap_states(group_S, draws, np.random.default_rng(seed))
    by_state = [columns[:, state_R == state] for state in range(len(group_S))]
    sizes = {part.shape[1] for part in by_state}
    assert len(sizes) == 1, "states must have equally many responses"
    cube = np.stack(by_state, axis=1)  # (quantity, S, K)
    out: dict[str, float | list[float]] = dict(_statistics(cube[:, states]))
    samples = [_statistics(cube[:, chosen]) for chosen in drawn]
    for name in list(out):
        values = np.array([sample[name] for sample in samples])
        finite = values[np.isfinite(values)]
        out[f"{name}_interval"] = np.quantile(finite, LEVELS).tolist() if len(finite) else [np.nan, np.nan]
    return out


def _bootstrap_states(group_S: IntArray, draws: int, rng: np.random.Generator) -> tuple[IntArray, list[IntArray]]:
    """All states, and for each draw the states of randomly drawn groups."""
    members = [np.flatnonzero(group_S == group) for group in np.unique(group_S)]
    chosen = rng.integers(len(members), size=(draws, len(members)))
    return np.arange(len(group_S)), [np.concatenate([members[g] for g in row]) for row in chosen]


def _statistics(cube: FloatArray) -> dict[str, float]:
    """The statistics of `group_validity`, from the quantities of each response: (quantity, S, K)."""
    inside = cube - cube.mean(-1, keepdims=True)
    flat, deviations = cube.reshape(len(cube), -1), inside.reshape(len(cube), -1)
    x, y, tokens = flat[:3]
    scale, variance, freedom = x.std() * y.std(), x.var(), cube.shape[-1] / (cube.shape[-1] - 1)
    total = float(np.cov(x, y, ddof=0)[0, 1])
    within = freedom * float((deviations[0] * deviations[1]).mean())  # without bias: means over samples vary with them
    return {
        "r": _divide(total, scale),
        "r_within": _divide(within, scale),
        "r_between": _divide(total - within, scale),
        "within": _correlate(deviations[0], deviations[1]),
        "within_share": _divide(freedom * float((deviations[0] ** 2).mean()), variance),
        "equal_length": _partial(x, y, tokens),
        "within_equal_length": _partial(*deviations[:3]),
        "length": -_correlate(x, tokens),
        "turn": -_correlate(x, flat[3]),
        "position": -_correlate(x, flat[4]),
        "state_entropy": -_correlate(x, flat[5]),
    }


def _divide(value: float, by: float) -> float:
    return value / float(by) if by > 1e-12 else np.nan


def _correlate(x: FloatArray, y: FloatArray) -> float:
    return _divide(float(((x - x.mean()) * (y - y.mean())).mean()), float(x.std() * y.std()))


def _partial(x: FloatArray, y: FloatArray, z: FloatArray) -> float:
    """Correlation of what a linear function of z leaves of x and y; the plain correlation if z does not vary."""
    if z.std() < 1e-12:
        return _correlate(x, y)
    return _correlate(*(v - v.mean() - (z - z.mean()) * np.cov(v, z, ddof=0)[0, 1] / z.var() for v in (x, y)))
