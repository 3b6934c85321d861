"""Coverage of our intervals over simulated runs with a known truth.

    python tests/bench/interval_coverage.py 20000

A run solves task t with probability logit^-1(a + b_t + c_t + u), where a is its arm's, b_t the task's, c_t what the arm is to
that task, and u the run's own; it plays each task k times. What is to be covered follows from the same model by integration:
on this panel (b, c fixed), or over new tasks (b, c drawn anew).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import expit

from aem_exp.stats import compare

SEEDS, EFFECTS = (3, 5, 10), (0.0, 0.4)  # runs per arm; what the one arm has more, in logits: some 6 points
TASKS, REPEATS, SIMULATIONS, AT_ONCE = 140, 4, 4000, 500
TASK_SD, ARM_TASK_SD, RUN_SD = 1.5, 0.5, 0.2  # logits; 0.2 is about 3 points
BASE = 1.0
PANEL, NEW_TASKS, BOOTSTRAP = "this panel", "new tasks", "this panel, bootstrap"


@dataclass(frozen=True)
class Row:
    method: str
    seeds: int
    effect: float  # points
    coverage: float
    error: float  # of the simulation itself
    simulations: int


def rows(seeds: int, effect: float, simulations: int = SIMULATIONS) -> Iterator[Row]:
    """Coverage of each interval, for so many runs per arm and such an effect."""
    rng = np.random.default_rng([seeds, round(100 * effect)])
    held: dict[str, list[np.ndarray]] = {PANEL: [], NEW_TASKS: [], BOOTSTRAP: []}
    truth = _over_tasks(effect)
    for _ in range(simulations // AT_ONCE):
        levels = _levels(effect, rng)
        one, other = (_played(level, seeds, rng) for level in levels)
        here = _mean(levels[0]) - _mean(levels[1])
        runs = one.mean(-1), other.mean(-1)
        held[PANEL].append(_holds(compare.welch_interval(*runs), here))
        held[NEW_TASKS].append(_holds(compare.new_tasks_interval(one, other), truth))
        held[BOOTSTRAP].append(_bootstrap(*runs, here, rng))
    for method, hits in held.items():
        share = float(np.mean(hits))
        yield Row(method, seeds, 100 * truth, share, (share * (1 - share) / simulations) ** 0.5, simulations)


def _levels(effect: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The two arms' logits for each task of a panel, panel by panel."""
    task = BASE + rng.normal(0, TASK_SD, (AT_ONCE, TASKS))
    own = rng.normal(0, ARM_TASK_SD, (2, AT_ONCE, TASKS))
    return task + own[0] + effect, task + own[1]


def _played(level: np.ndarray, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Scores: (panels, runs, tasks)."""
    chance = expit(level[:, None] + rng.normal(0, RUN_SD, (AT_ONCE, seeds, 1)))
    return rng.binomial(REPEATS, chance) / REPEATS


def _mean(level: np.ndarray) -> np.ndarray:
    """What runs score on each panel on average: over their own part, by Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    return (expit(level[..., None] + RUN_SD * nodes) @ weights).mean(-1) / weights.sum()


@cache
def _over_tasks(effect: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    sd = (TASK_SD**2 + ARM_TASK_SD**2 + RUN_SD**2) ** 0.5
    arms = [(expit(BASE + shift + sd * nodes) @ weights) / weights.sum() for shift in (effect, 0.0)]
    return float(arms[0] - arms[1])


def _holds(found: compare.Interval, truth: float | np.ndarray) -> np.ndarray:
    return (found.low <= truth) & (truth <= found.high)


def _bootstrap(one: np.ndarray, other: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The plain bootstrap over seeds, for comparison."""
    panels, seeds = one.shape
    chosen = rng.integers(seeds, size=(2, panels, 500, seeds))
    drawn = [np.take_along_axis(x[:, None], i, -1).mean(-1) for x, i in zip((one, other), chosen, strict=True)]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975], axis=-1)
    return (low <= truth) & (truth <= high)


if __name__ == "__main__":
    print(f"{'interval':<24} {'runs':>4} {'effect':>7} {'holds the truth':>16}")
    for seeds in SEEDS:
        for effect in EFFECTS:
            for row in rows(seeds, effect, int(sys.argv[1]) if len(sys.argv) > 1 else SIMULATIONS):
                held = f"{100 * row.coverage:.1f} +- {100 * row.error:.1f} %"
                print(f"{row.method:<24} {row.seeds:>4} {row.effect:>7.1f} {held:>16}")
