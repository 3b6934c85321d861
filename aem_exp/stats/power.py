"""Power analysis: which difference a comparison of two arms can find, computed before it is run.

The score of a run is the mean over a panel of T tasks, each played k times. Over the training seeds of an arm its variance is

    s^2 = seed_sd^2 + w / (T k)

where w is the mean over tasks of p (1 - p), and p is the probability that a policy solves the task. w is 0.25 if every task
is a coin toss, and 0 if each task is always or never solved. The tasks are fixed and add no variance. Two arms have n runs
each, with normal scores of equal variance. They are compared by a two-sided t-test over runs, not paired by seed. A difference
d is found with probability

    P(|t| > c) = E[Phi(d / (s sqrt(2 / n)) - c q)],    q^2 the arms' mean sample variance over s^2,

where c is the quantile of t at Welch's degrees of freedom, (n - 1) (v1 + v2)^2 / (v1^2 + v2^2) for sample variances v1, v2.
The expectation is over v1 and v2 (chi-squared). Differences found with the wrong sign are neglected; at this power they are
rarer than 1 in 10,000. `pooled` uses 2 n - 2 degrees of freedom instead, as tables of power do. This is too optimistic for
Welch's test: by 14 % at 3 seeds (where the computed difference is found with 70 % power), 3 % at 5, below 1 % at 10.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from scipy.special import chdtri, nctdtr, ndtr, stdtrit

POWER: Final = 0.8
LEVEL: Final = 0.05  # two-sided
SEED_SDS: Final = (2.0, 4.0)  # points: the spread of seeds in published results, without evaluation noise
# Fitted to published tables of power for ALFWorld; those for SWE-bench-Verified correspond to about 0.19.
WITHIN_TASK_VARIANCE: Final = 0.109
_QUANTILES: Final = 240  # quantiles of each sample variance


def planned_detectable_points(
    seeds: int,
    tasks: int,
    repeats: int = 1,
    seed_sd: float = 2.0,
    within: float = WITHIN_TASK_VARIANCE,
    comparisons: int = 1,
    pooled: bool = False,
) -> float:
    """The smallest difference, in points of 100, that is found with 80 % power; infinite for fewer than 2 seeds.

    Args:
        seeds: runs per arm.
        within: w of the module docstring.
        comparisons: number of arms that are compared with the reference; the level is divided by it.
        pooled: see the module docstring.
    """
    if seeds < 2:
        return math.inf
    return run_sd(tasks, repeats, seed_sd, within) * detectable_effect(seeds, comparisons, pooled)


def paired_detectable_effect(blocks: int) -> float:
    """The mean over blocks that Student's t finds with 80 % power, in units of its standard deviation over blocks."""
    if blocks < 2:
        return math.inf
    low, high = 0.0, 100.0
    threshold = stdtrit(blocks - 1, 1 - LEVEL / 2)
    while high - low > 1e-9 * high:
        shift = (low + high) / 2
        low, high = (shift, high) if 1 - nctdtr(blocks - 1, shift, threshold) < POWER else (low, shift)
    return high / math.sqrt(blocks)


def planned_contrast_points(
    seeds: int, tasks: int, repeats: int, weights: Sequence[float], seed_sd: float = 2.0
) -> float:
    """The smallest contrast, in points of 100, that is found with 80 % power, if the cells of a seed are independent.

    Cells of a seed that share their warm start are usually correlated. A difference is then found more easily.

    Args:
        weights: weights of the cells.
    """
    spread = run_sd(tasks, repeats, seed_sd) * math.sqrt(sum(weight**2 for weight in weights))
    return spread * paired_detectable_effect(seeds)


def run_sd(tasks: int, repeats: int, seed_sd: float, within: float = WITHIN_TASK_VARIANCE) -> float:
    """s of the module docstring in points: the standard deviation of the scores of an arm's runs."""
    return math.hypot(seed_sd, 100 * math.sqrt(within / (tasks * repeats)))


@cache
def detectable_effect(seeds: int, comparisons: int = 1, pooled: bool = False) -> float:
    """The difference that arms with this number of runs find with 80 % power, in units of s."""
    share = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    v1 = chdtri(seeds - 1, 1 - share)[:, None] / (seeds - 1)
    v2 = v1.T
    freedom = 2 * seeds - 2 if pooled else (seeds - 1) * (v1 + v2) ** 2 / (v1**2 + v2**2)
    threshold = stdtrit(freedom, 1 - LEVEL / comparisons / 2) * np.sqrt((v1 + v2) / 2)
    low, high = 0.0, float(threshold.max()) + 5.0
    while high - low > 1e-9 * high:  # bisection: scipy's own root finders take half a second to import
        shift = (low + high) / 2
        low, high = (shift, high) if ndtr(shift - threshold).mean() < POWER else (low, shift)
    return high * math.sqrt(2 / seeds)
