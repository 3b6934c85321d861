"""Simulates the estimators of response entropy: `python tests/bench/entropy_estimators.py [FIGURE]` prints a table.

A group has 64 responses with log-normal lengths. Each has a true entropy theta; its token entropies are theta plus
autocorrelated noise, plus an effect of the position in some cases. For each estimator, the table shows the mean squared error
(after the mean of the group is subtracted), the correlation of AEM's coefficient with the length of the response, and the
correlation of 1 - alpha with theta. A good estimator has a small error, no correlation with the length unless the length tells
about theta, and a large correlation with theta.
"""

import sys
from statistics import fmean

import numpy as np
import torch

from aem_exp import aem
from aem_exp.core.plots import BLUE, GREY, ORANGE
from aem_exp.training.diagnostics import correlation
from aem_exp.training.entropy_estimators import estimate_entropy

RESPONSES, MEAN_TOKENS, LENGTH_SPREAD = 64, 37, 0.5  # per group; mean and log-scale spread of the lengths
TRUE_SPREAD, TOKEN_SPREAD, AUTOCORRELATION = 0.15, 0.8, 0.3  # nats, nats
CASES = {
    "no effect of the position": {},
    "entropy decays with the position": {"position_effect": 0.5},
    "long responses are uncertain": {"length_effect": 0.1},
    "both": {"position_effect": 0.5, "length_effect": 0.1},
}
ESTIMATORS = ("mean", "shrunk", "residual", "residual_shrunk")
Row = dict[str, float]


def draw_group(rng: np.random.Generator, position_effect: float, length_effect: float):
    """Token entropies, the response of each token, the lengths, and the true entropy of each response."""
    tokens = np.exp(rng.normal(np.log(MEAN_TOKENS) - LENGTH_SPREAD**2 / 2, LENGTH_SPREAD, RESPONSES))
    tokens = np.maximum(4, tokens.round().astype(int))
    theta = 1 + rng.normal(0, TRUE_SPREAD, RESPONSES) + length_effect * np.log(tokens / MEAN_TOKENS)
    values = []
    for count, truth in zip(tokens, theta, strict=True):
        noise = np.empty(count)
        noise[0] = rng.normal(0, TOKEN_SPREAD)
        for k in range(1, count):
            fresh = rng.normal(0, TOKEN_SPREAD * np.sqrt(1 - AUTOCORRELATION**2))
            noise[k] = AUTOCORRELATION * noise[k - 1] + fresh
        values.append(truth + noise + position_effect * np.exp(-np.arange(count) / 8))
    return np.concatenate(values), np.arange(RESPONSES).repeat(tokens), tokens, theta


def simulate(
    groups: int = 150, position_effect: float = 0.0, length_effect: float = 0.0, seed: int = 0
) -> dict[str, Row]:
    """The measures of each estimator, averaged over groups."""
    rng, scope_R = np.random.default_rng(seed), torch.zeros(RESPONSES, dtype=torch.long)
    rows: dict[str, list[Row]] = {name: [] for name in ESTIMATORS}
    for _ in range(groups):
        value_K, response_K, tokens, theta = draw_group(rng, position_effect, length_effect)
        for name in ESTIMATORS:
            estimate_R = estimate_entropy(name, torch.from_numpy(value_K), torch.from_numpy(response_K), scope_R)
            alpha_R = aem.coefficients(estimate_R, scope_R)
            error = (estimate_R - estimate_R.mean()).numpy() - (theta - theta.mean())
            rows[name].append(
                {
                    "mse": float((error**2).mean()),
                    "alpha_length": correlation(alpha_R, torch.from_numpy(tokens)),
                    "alpha_truth": correlation(1 - alpha_R, torch.from_numpy(theta)),
                    "gated": float(aem.gated(estimate_R, scope_R).float().mean()),
                }
            )
    return {name: {key: fmean(row[key] for row in of_name) for key in of_name[0]} for name, of_name in rows.items()}


def draw_figure(results: dict[str, dict[str, Row]], file: str) -> None:
    """Draw the three measures of each estimator and case as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "mse": "mean squared error (nats²)",
        "alpha_length": "correlation of alpha with length",
        "alpha_truth": "correlation of 1 - alpha with theta",
    }
    colours = dict(zip(ESTIMATORS, (GREY, BLUE, ORANGE, "#009E73"), strict=True))
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True, sharey=True)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for i, (name, colour) in enumerate(colours.items()):
            places = np.arange(len(results)) + (i - 1.5) * 0.2
            axes.barh(places, [rows[name][key] for rows in results.values()], 0.18, color=colour, label=name)
        axes.set(xlabel=label, yticks=range(len(results)), yticklabels=list(results))
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.invert_yaxis() if axes is panels[0] else None
    panels[1].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(ESTIMATORS))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    results = {case: simulate(**effects) for case, effects in CASES.items()}
    print(f"{'case':34}{'estimator':18}{'MSE':>8}{'corr(alpha, length)':>22}{'corr(1 - alpha, theta)':>25}{'gated':>8}")
    for case, rows in results.items():
        for name, row in rows.items():
            numbers = f"{row['mse']:8.4f}{row['alpha_length']:22.3f}{row['alpha_truth']:25.3f}{row['gated']:8.0%}"
            print(f"{case if name == 'mean' else '':34}{name:18}{numbers}")
    if sys.argv[1:]:
        draw_figure(results, sys.argv[1])


if __name__ == "__main__":
    main()
