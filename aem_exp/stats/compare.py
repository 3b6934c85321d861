"""Statistics of arms: what the scores of training runs allow to be said of a difference. Pure numbers.

The unit is one run's score on a panel. A difference between two arms is that of their means over runs,

    d = mean(one) - mean(other),    var(d) = s1^2 / n1 + s2^2 / n2,

with the interval of Welch's t over runs, not paired by seed: two arms drift apart after a few updates, and pairing would halve
the degrees of freedom for nothing (the panel, which all runs share, already pairs the tasks). It speaks of new training runs
on *this* panel. `new_tasks_interval` speaks of new runs on new tasks. Where a sweep declares several comparisons, each interval
is held to its share of the level (Bonferroni), so that all of them hold at once.

Shapes: N runs, T tasks; any dimensions before them are worked off side by side. Scores are shares of 1.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from aem_exp.stats import power

LEVEL: Final = 0.05  # two-sided, shared among the comparisons of a sweep
MAX_EXACT_PERMUTATIONS: Final = 200_000  # permutations that are all tried: 10 runs against 10 are 184,756
SAMPLED_PERMUTATIONS: Final = 20_000  # at random, where there are more
MIN_SEEDS, MIN_CELLS = 5, 4  # from which on cells are summed up
MAX_RUNS: Final = 200  # per arm, that are ever recommended
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A difference and its confidence interval; each a number, or an array of them.

    Attributes:
        error: standard error of the difference.
        freedom: degrees of freedom.
    """

    difference: Any
    low: Any
    high: Any
    error: Any
    freedom: Any


def no_interval_reason(one_N: Sequence[float], other_N: Sequence[float]) -> str | None:
    """Why two arms have no interval, in words; None where they have one."""
    fewest = min(len(one_N), len(other_N))
    if fewest < 2:
        return "no run" if fewest == 0 else "one run: its spread is unknown"
    if np.ptp(one_N) == np.ptp(other_N) == 0:
        return "no spread in either arm: the scores say nothing of how far they would spread"
    return None


def welch_interval(one_N: Any, other_N: Any, comparisons: int = 1) -> Interval:
    """The difference of two arms on this panel (Welch 1947). NaN where `no_interval_reason` has something to say.

    Args:
        comparisons: how many intervals are to hold at once.
    """
    one, other = np.asarray(one_N, float), np.asarray(other_N, float)
    parts = [(x.var(axis=-1, ddof=1) / x.shape[-1], x.shape[-1] - 1) for x in (one, other)]
    return _satterthwaite_interval(one.mean(axis=-1) - other.mean(axis=-1), parts, [], comparisons)


def new_tasks_interval(one_NT: Any, other_NT: Any, comparisons: int = 1) -> Interval:
    """The difference of two arms on tasks like those of the panel: runs and tasks are both drawn, and crossed.

    A score is arm + run + task + arm x task + rest. The variance of the difference adds what runs give (that of `welch_interval`,
    which holds the rest too) and what tasks give (the variance over tasks of the arms' difference, which holds the rest
    once more, so that it is taken off), with Satterthwaite's degrees of freedom.
    """
    one, other = np.asarray(one_NT, float), np.asarray(other_NT, float)
    arms, tasks = (one, other), one.shape[-1]
    runs = [(x.mean(axis=-1).var(axis=-1, ddof=1) / x.shape[-2], x.shape[-2] - 1) for x in arms]
    apart_T = one.mean(axis=-2) - other.mean(axis=-2)
    drawn = [(apart_T.var(axis=-1, ddof=1) / tasks, tasks - 1)]
    rest = [(_residual_mean_square(x) / (x.shape[-2] * tasks), (x.shape[-2] - 1) * (tasks - 1)) for x in arms]
    found = _satterthwaite_interval(apart_T.mean(axis=-1), [*runs, *drawn], rest, comparisons)
    here = welch_interval(one.mean(axis=-1), other.mean(axis=-1), comparisons)
    # Tasks add degrees of freedom, but nothing to what is known of runs.
    reach = np.fmax(found.high - found.difference, here.high - here.difference)
    return replace(found, low=found.difference - reach, high=found.difference + reach)


def _residual_mean_square(x_NT: FloatArray) -> FloatArray:
    """Mean square of what neither run nor task explains."""
    runs, tasks = x_NT.shape[-2:]
    left = x_NT - x_NT.mean(axis=-1, keepdims=True) - x_NT.mean(axis=-2, keepdims=True)
    left = left + x_NT.mean(axis=(-1, -2), keepdims=True)
    return np.asarray((left**2).sum(axis=(-1, -2)) / ((runs - 1) * (tasks - 1)))


def _satterthwaite_interval(
    difference: Any, added: Sequence[Any], removed: Sequence[Any], comparisons: int
) -> Interval:
    """An interval from independent mean squares and their degrees of freedom (Satterthwaite 1946)."""
    variance = sum(square for square, _ in added) - sum(square for square, _ in removed)
    variance = np.maximum(variance, np.maximum(sum(s for s, _ in added[:2]), sum(s for s, _ in added[2:])))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = variance**2 / sum(square**2 / free for square, free in (*added, *removed))
        reach = stats.t.ppf(1 - LEVEL / comparisons / 2, freedom) * np.sqrt(variance)
    return Interval(difference, difference - reach, difference + reach, np.sqrt(variance), freedom)


def half_width(scores_N: Sequence[float] | FloatArray) -> float:
    """Half of the 95 % interval of one arm's mean over runs (Student's t); NaN for a single run."""
    count = len(scores_N)
    if count < 2:
        return math.nan
    return float(stats.t.ppf(1 - LEVEL / 2, count - 1) * np.std(scores_N, ddof=1) / math.sqrt(count))


def verdict(interval: Interval) -> str:
    """What an interval says, in words; `x points` are hundredths."""
    if not math.isfinite(interval.low):
        return "nothing can be said"
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    most = 100 * max(abs(interval.low), abs(interval.high))
    if most >= 100:
        return "nothing can be said: the interval is wider than the scale"
    return f"no difference shown; effects above {most:.1f} points are ruled out"


def smallest_p_value(one: int, other: int) -> float:
    """The smallest two-sided p that a permutation test of so many runs can give."""
    return min(1.0, 2 / math.comb(one + other, one))


@dataclass(frozen=True)
class PermutationResult:
    """Two-sided p; `error`: what drawing permutations at random leaves open, 0 where all were tried."""

    p: float
    error: float


def permutation_test(
    one_N: Sequence[float], other_N: Sequence[float], comparisons: int = 1
) -> PermutationResult | None:
    """The difference of means over the ways to deal the runs to the arms; None where even the smallest p that so few runs can
    give is above the level.

    It asks whether the arms are exchangeable, spread included, and so may say something else than an interval. All ways are
    tried here, in some 20 ms for 10 runs against 10; scipy's test would take seconds for each of them.
    """
    one, other = np.asarray(one_N, float), np.asarray(other_N, float)
    ways = math.comb(len(one) + len(other), len(one))
    if smallest_p_value(len(one), len(other)) > LEVEL / comparisons:
        return None
    if ways > MAX_EXACT_PERMUTATIONS:
        rng = np.random.default_rng(0)
        tried = stats.permutation_test(
            (one, other), _mean_difference, n_resamples=SAMPLED_PERMUTATIONS, vectorized=True, rng=rng
        )
        p = float(tried.pvalue)
        return PermutationResult(p, math.sqrt(p * (1 - p) / SAMPLED_PERMUTATIONS))
    sums = np.concatenate([one, other])[_enumerate_splits(len(one), len(other))].sum(axis=1)
    near = 1e-9 * max(1.0, np.abs(sums).max())
    tails = [(sums >= one.sum() - near).mean(), (sums <= one.sum() + near).mean()]
    return PermutationResult(float(min(1.0, 2 * min(tails))), 0.0)


def _mean_difference(one: FloatArray, other: FloatArray, axis: int) -> FloatArray:
    return np.asarray(one.mean(axis=axis) - other.mean(axis=axis))


@cache
def _enumerate_splits(one: int, other: int) -> NDArray[np.int64]:
    """Every way to choose the runs of the one arm from those of both."""
    ways = combinations(range(one + other), one)
    return np.fromiter(ways, dtype=np.dtype((np.int64, one)), count=math.comb(one + other, one))


def pooled_sd(one_N: Sequence[float], other_N: Sequence[float]) -> float:
    """How far the runs of an arm lie apart: the root of the arms' mean variance."""
    return math.sqrt((np.var(one_N, ddof=1) + np.var(other_N, ddof=1)) / 2)


def observed_detectable_difference(one_N: Sequence[float], other_N: Sequence[float], comparisons: int = 1) -> float:
    """The smallest difference that arms like these, of so many runs, would show 4 times in 5."""
    return pooled_sd(one_N, other_N) * power.detectable_effect(min(len(one_N), len(other_N)), comparisons)


def runs_needed(difference: float, spread: float, comparisons: int = 1) -> int | None:
    """How many runs an arm takes to show such a difference 4 times in 5; None above 200."""
    if spread == 0:
        return None  # a spread of nothing was not measured, only met
    counts = range(2, MAX_RUNS + 1)
    found = bisect_left(counts, -abs(difference), key=lambda runs: -spread * power.detectable_effect(runs, comparisons))
    return counts[found] if found < len(counts) else None


# Over cells: the same two arms in several worlds, models or baselines.


def has_enough_cells(cells: Sequence[tuple[Sequence[float], Sequence[float]]]) -> bool:
    """Whether cells may be summed up; fewer, or with fewer runs, their bootstrap intervals are too short."""
    return len(cells) >= MIN_CELLS and all(min(len(one), len(other)) >= MIN_SEEDS for one, other in cells)


@dataclass(frozen=True)
class Estimate:
    """A number over cells, and its 95 % interval."""

    value: float
    low: float
    high: float


def probability_of_improvement(
    cells: Sequence[tuple[Sequence[float], Sequence[float]]], resamples: int = 2000
) -> Estimate:
    """Probability that a run of the one arm scores above a run of the other, mean over cells, and its 95 % interval: a
    bootstrap of runs within each cell (Agarwal et al. 2021)."""
    rng = np.random.default_rng(0)
    drawn = np.mean([_share_above(*(_resample(x, resamples, rng) for x in cell)) for cell in cells], axis=0)
    value = float(np.mean([_share_above(np.asarray(one, float), np.asarray(other, float)) for one, other in cells]))
    return Estimate(value, *np.quantile(drawn, [0.025, 0.975]).tolist())


def _share_above(one_N: FloatArray, other_N: FloatArray) -> FloatArray:
    """Share of pairs in which the one is above; half where they are equal."""
    apart = one_N[..., :, None] - other_N[..., None, :]
    return np.asarray(((apart > 0) + 0.5 * (apart == 0)).mean(axis=(-1, -2)))


def interquartile_mean(cells: Sequence[Sequence[float]], resamples: int = 2000) -> Estimate:
    """Interquartile mean over all runs of all cells, and its 95 % interval (Agarwal et al. 2021)."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([_resample(cell, resamples, rng) for cell in cells], axis=1)
    value = float(stats.trim_mean(np.concatenate([np.asarray(cell, float) for cell in cells]), 0.25))
    return Estimate(value, *np.quantile(stats.trim_mean(drawn, 0.25, axis=1), [0.025, 0.975]).tolist())


def _resample(scores: Sequence[float], resamples: int, rng: np.random.Generator) -> FloatArray:
    """Runs drawn anew, with replacement: (resamples, runs)."""
    return rng.choice(np.asarray(scores, float), (resamples, len(scores)))
