"""Comparisons of two arms by the scores of their training runs. Pure functions of numbers.

The sample unit is the score of one run on a panel. The difference of two arms is the difference of their means over runs,

    d = mean(one) - mean(other),    var(d) = s1^2 / n1 + s2^2 / n2,

with the interval of Welch's t-test over runs. Runs are not paired by seed: two arms diverge after a few updates, so pairing
would halve the degrees of freedom without benefit. (All runs share the panel, which already pairs the tasks.) This interval
is valid for new training runs on the *same* panel. `new_tasks_interval` is valid for new runs on new tasks. If a sweep
declares several comparisons, each interval gets an equal part of the level (Bonferroni), so that all hold together.

Shapes: N runs, T tasks; leading dimensions are batch dimensions. Scores are fractions of 1.
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
MAX_EXACT_PERMUTATIONS: Final = 200_000  # up to here all permutations are tried; 10 runs against 10 have 184,756
SAMPLED_PERMUTATIONS: Final = 20_000  # random permutations, if there are more
MIN_SEEDS, MIN_CELLS = 5, 4  # the smallest sample for a summary over cells
MAX_RUNS: Final = 200  # per arm: the largest recommendation
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A difference and its confidence interval; each field is a number or an array.

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
    """The reason why two arms have no interval; None if they have one."""
    fewest = min(len(one_N), len(other_N))
    if fewest < 2:
        return "no run" if fewest == 0 else "one run: its spread is unknown"
    if np.ptp(one_N) == np.ptp(other_N) == 0:
        return "no spread in either arm: these scores do not show how much runs vary"
    return None


def welch_interval(one_N: Any, other_N: Any, comparisons: int = 1) -> Interval:
    """The difference of two arms on this panel (Welch 1947). NaN if `no_interval_reason` returns a reason.

    Args:
        comparisons: number of intervals that must hold together.
    """
    one, other = np.asarray(one_N, float), np.asarray(other_N, float)
    parts = [(x.var(axis=-1, ddof=1) / x.shape[-1], x.shape[-1] - 1) for x in (one, other)]
    return _satterthwaite_interval(one.mean(axis=-1) - other.mean(axis=-1), parts, [], comparisons)


def new_tasks_interval(one_NT: Any, other_NT: Any, comparisons: int = 1) -> Interval:
    """The difference of two arms on new tasks like those of the panel: runs and tasks are crossed random factors.

    A score is arm + run + task + arm x task + residual. The variance of the difference is the sum of the variance from runs (as
    in `welch_interval`) and the variance from tasks (of the arms' difference over tasks). Both contain the residual, so it is
    subtracted once. The degrees of freedom are Satterthwaite's.
    """
    one, other = np.asarray(one_NT, float), np.asarray(other_NT, float)
    arms, tasks = (one, other), one.shape[-1]
    runs = [(x.mean(axis=-1).var(axis=-1, ddof=1) / x.shape[-2], x.shape[-2] - 1) for x in arms]
    difference_T = one.mean(axis=-2) - other.mean(axis=-2)
    between_tasks = [(difference_T.var(axis=-1, ddof=1) / tasks, tasks - 1)]
    residual = [(_residual_mean_square(x) / (x.shape[-2] * tasks), (x.shape[-2] - 1) * (tasks - 1)) for x in arms]
    wide = _satterthwaite_interval(difference_T.mean(axis=-1), [*runs, *between_tasks], residual, comparisons)
    same_panel = welch_interval(one.mean(axis=-1), other.mean(axis=-1), comparisons)
    # Tasks add degrees of freedom, but no information about runs: the interval must not become narrower than Welch's.
    half = np.fmax(wide.high - wide.difference, same_panel.high - same_panel.difference)
    return replace(wide, low=wide.difference - half, high=wide.difference + half)


def paired_interval(one_T: Any, other_T: Any) -> Interval:
    """The difference of two policies on the same tasks: one score per task and policy, paired by task (Student's t).

    It is valid for these two policies on new tasks like those of the panel. It says nothing about other training runs. Its ends
    are NaN if there is one task, or if the difference is the same on all tasks.
    """
    difference_T = np.asarray(one_T, float) - np.asarray(other_T, float)
    tasks = difference_T.shape[-1]
    if tasks < 2 or np.ptp(difference_T) == 0:
        return Interval(difference_T.mean(), math.nan, math.nan, math.nan, tasks - 1)
    return _satterthwaite_interval(difference_T.mean(), [(difference_T.var(ddof=1) / tasks, tasks - 1)], [], 1)


def one_sample_interval(value_N: Sequence[float]) -> Interval:
    """The mean of one value per block and its interval over blocks (Student's t). Its ends are NaN if all values are equal."""
    values = np.asarray(value_N, float)
    if np.ptp(values) == 0:
        return Interval(values.mean(), math.nan, math.nan, math.nan, len(values) - 1)
    return _satterthwaite_interval(values.mean(), [(values.var(ddof=1) / len(values), len(values) - 1)], [], 1)


def sample_sd(value_N: Sequence[float]) -> float:
    """Sample standard deviation; NaN for fewer than two values."""
    return float(np.std(value_N, ddof=1)) if len(value_N) > 1 else math.nan


def _residual_mean_square(x_NT: FloatArray) -> FloatArray:
    """Mean square of the residual, which neither run nor task explains."""
    runs, tasks = x_NT.shape[-2:]
    residual = x_NT - x_NT.mean(axis=-1, keepdims=True) - x_NT.mean(axis=-2, keepdims=True)
    residual = residual + x_NT.mean(axis=(-1, -2), keepdims=True)
    return np.asarray((residual**2).sum(axis=(-1, -2)) / ((runs - 1) * (tasks - 1)))


def _satterthwaite_interval(
    difference: Any, added: Sequence[Any], removed: Sequence[Any], comparisons: int
) -> Interval:
    """An interval from independent mean squares and their degrees of freedom (Satterthwaite 1946)."""
    variance = sum(square for square, _ in added) - sum(square for square, _ in removed)
    variance = np.maximum(variance, np.maximum(sum(s for s, _ in added[:2]), sum(s for s, _ in added[2:])))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = variance**2 / sum(square**2 / free for square, free in (*added, *removed))
        half = stats.t.ppf(1 - LEVEL / comparisons / 2, freedom) * np.sqrt(variance)
    return Interval(difference, difference - half, difference + half, np.sqrt(variance), freedom)


def half_width(scores_N: Sequence[float] | FloatArray) -> float:
    """Half the width of the 95 % interval of an arm's mean over runs (Student's t); NaN for a single run."""
    count = len(scores_N)
    if count < 2:
        return math.nan
    return float(stats.t.ppf(1 - LEVEL / 2, count - 1) * np.std(scores_N, ddof=1) / math.sqrt(count))


def verdict(interval: Interval) -> str:
    """The verdict of an interval in words; points are hundredths."""
    if not math.isfinite(interval.low):
        return "nothing can be said"
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    largest = 100 * max(abs(interval.low), abs(interval.high))
    if largest >= 100:
        return "nothing can be said: the interval is wider than the scale"
    return f"no difference shown; effects above {largest:.1f} points are ruled out"


def smallest_p_value(one: int, other: int) -> float:
    """The smallest two-sided p that a permutation test with these numbers of runs can give."""
    return min(1.0, 2 / math.comb(one + other, one))


@dataclass(frozen=True)
class PermutationResult:
    """Two-sided p; `error`: its standard error from random permutations, 0 if all were tried."""

    p: float
    error: float


def permutation_test(
    one_N: Sequence[float], other_N: Sequence[float], comparisons: int = 1
) -> PermutationResult | None:
    """A permutation test of the difference of means; None if the smallest possible p is above the level.

    The test asks whether the arms are exchangeable, including their spread, so it can disagree with an interval. All
    permutations are tried, in about 20 ms for 10 runs against 10; scipy's test would take seconds.
    """
    one, other = np.asarray(one_N, float), np.asarray(other_N, float)
    ways = math.comb(len(one) + len(other), len(one))
    if smallest_p_value(len(one), len(other)) > LEVEL / comparisons:
        return None
    if ways > MAX_EXACT_PERMUTATIONS:
        rng = np.random.default_rng(0)
        sampled = stats.permutation_test(
            (one, other), _mean_difference, n_resamples=SAMPLED_PERMUTATIONS, vectorized=True, rng=rng
        )
        p = float(sampled.pvalue)
        return PermutationResult(p, math.sqrt(p * (1 - p) / SAMPLED_PERMUTATIONS))
    sums = np.concatenate([one, other])[_enumerate_splits(len(one), len(other))].sum(axis=1)
    tolerance = 1e-9 * max(1.0, np.abs(sums).max())
    tails = [(sums >= one.sum() - tolerance).mean(), (sums <= one.sum() + tolerance).mean()]
    return PermutationResult(float(min(1.0, 2 * min(tails))), 0.0)


def _mean_difference(one: FloatArray, other: FloatArray, axis: int) -> FloatArray:
    return np.asarray(one.mean(axis=axis) - other.mean(axis=axis))


@cache
def _enumerate_splits(one: int, other: int) -> NDArray[np.int64]:
    """All ways to choose the runs of one arm from those of both, as indices: (ways, runs)."""
    ways = combinations(range(one + other), one)
    return np.fromiter(ways, dtype=np.dtype((np.int64, one)), count=math.comb(one + other, one))


def pooled_sd(one_N: Sequence[float], other_N: Sequence[float]) -> float:
    """Pooled standard deviation of runs: the root of the mean variance of the two arms."""
    return math.sqrt((np.var(one_N, ddof=1) + np.var(other_N, ddof=1)) / 2)


def observed_detectable_difference(one_N: Sequence[float], other_N: Sequence[float], comparisons: int = 1) -> float:
    """The smallest difference that arms with this spread and number of runs show with 80 % power."""
    return pooled_sd(one_N, other_N) * power.detectable_effect(min(len(one_N), len(other_N)), comparisons)


def runs_needed(difference: float, spread: float, comparisons: int = 1) -> int | None:
    """Runs per arm that show this difference with 80 % power; None if it takes more than 200."""
    if spread == 0:
        return None  # equal scores are chance, and no measurement of the spread
    counts = range(2, MAX_RUNS + 1)
    index = bisect_left(counts, -abs(difference), key=lambda runs: -spread * power.detectable_effect(runs, comparisons))
    return counts[index] if index < len(counts) else None


# Over cells: the same two arms in several environments, models or baselines.


def has_enough_cells(cells: Sequence[tuple[Sequence[float], Sequence[float]]]) -> bool:
    """Whether a summary over cells is valid; with fewer cells or runs, its bootstrap intervals are too short."""
    return len(cells) >= MIN_CELLS and all(min(len(one), len(other)) >= MIN_SEEDS for one, other in cells)


@dataclass(frozen=True)
class Estimate:
    """A number over cells and its 95 % interval."""

    value: float
    low: float
    high: float


def probability_of_improvement(
    cells: Sequence[tuple[Sequence[float], Sequence[float]]], resamples: int = 2000
) -> Estimate:
    """Probability that a run of one arm scores above a run of the other, as mean over cells, with its 95 % interval.

    The interval is a bootstrap of runs within each cell (Agarwal et al. 2021).
    """
    rng = np.random.default_rng(0)
    drawn = np.mean([_share_above(*(_resample(x, resamples, rng) for x in cell)) for cell in cells], axis=0)
    value = float(np.mean([_share_above(np.asarray(one, float), np.asarray(other, float)) for one, other in cells]))
    return Estimate(value, *np.quantile(drawn, [0.025, 0.975]).tolist())


def _share_above(one_N: FloatArray, other_N: FloatArray) -> FloatArray:
    """Share of pairs in which `one` is above `other`; equal pairs count as half."""
    difference = one_N[..., :, None] - other_N[..., None, :]
    return np.asarray(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-1, -2)))


def interquartile_mean(cells: Sequence[Sequence[float]], resamples: int = 2000) -> Estimate:
    """Interquartile mean over all runs of all cells, with its 95 % interval (Agarwal et al. 2021)."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([_resample(cell, resamples, rng) for cell in cells], axis=1)
    value = float(stats.trim_mean(np.concatenate([np.asarray(cell, float) for cell in cells]), 0.25))
    return Estimate(value, *np.quantile(stats.trim_mean(drawn, 0.25, axis=1), [0.025, 0.975]).tolist())


def _resample(scores: Sequence[float], resamples: int, rng: np.random.Generator) -> FloatArray:
    """Draw runs with replacement: (resamples, runs)."""
    return rng.choice(np.asarray(scores, float), (resamples, len(scores)))
