"""Statistics of evaluation episodes: success and its standard error, pass@k and pass^k, means per kind of task, endings.

Pure functions. An unknown value is None, never 0.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The outcome of one episode."""

    task: int
    """position of its task in the panel"""
    kind: str
    """kind of its task"""
    won: float
    """1 for a success, 0 for a failure; a fraction if the environment reports one"""
    ret: float
    """sum of its rewards"""
    ended: str
    """why it ended; see `rollout.types.Ending`"""
    crashed: bool
    valid: Sequence[bool]
    """whether the environment could parse the response, per response"""
    entropies: Sequence[float]
    """mean token entropy in nats, per response; empty if unknown"""
    tokens: int | None
    """generated tokens; None if no model played"""
    score: float | None = None
    """the score of the environment, if it has one"""
    habits: Mapping[str, float] = field(default_factory=dict)
    """other metrics of the environment, as means over the turns"""

    @property
    def success(self) -> float:
        return 0.0 if self.crashed else self.won


@dataclass(frozen=True)
class Score:
    """The score of a policy on a panel. Crashed episodes count as failures; `crashed` is their number."""

    panel: str
    panel_hash: str
    episodes: int
    success: float
    returns: float | None
    turns: float
    tokens: float | None
    invalid_share: float | None
    response_entropy: float | None
    crashed: int
    by_kind: dict[str, float]
    score: float | None = None
    habits: dict[str, float] = field(default_factory=dict)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat numbers for the log, such as `eval/...`."""
        numbers = {k: float(v) for k, v in asdict(self).items() if isinstance(v, int | float)}
        kinds = {f"success_{kind}": value for kind, value in self.by_kind.items() if kind}
        return {f"{prefix}{name}": value for name, value in (self.habits | numbers | kinds).items()}


def summarize_outcomes(panel: str, panel_hash: str, outcomes: Sequence[Outcome]) -> Score:
    """Means over the episodes of complete passes over a panel; invalid share and entropy are means over responses."""
    assert outcomes, "the panel was not played"
    return Score(
        panel=panel,
        panel_hash=panel_hash,
        episodes=len(outcomes),
        success=_require_value(_finite_mean([o.success for o in outcomes])),
        returns=_finite_mean([o.ret for o in outcomes]),
        turns=_require_value(_finite_mean([len(o.valid) for o in outcomes])),
        tokens=_finite_mean([o.tokens for o in outcomes if o.tokens is not None]),
        invalid_share=_finite_mean([not valid for o in outcomes for valid in o.valid]),
        response_entropy=_finite_mean([entropy for o in outcomes for entropy in o.entropies]),
        crashed=sum(o.crashed for o in outcomes),
        by_kind={
            kind: _require_value(_finite_mean([o.success for o in outcomes if o.kind == kind]))
            for kind in sorted({o.kind for o in outcomes})
        },
        score=_finite_mean([0.0 if o.crashed else o.score or 0.0 for o in outcomes])
        if any(o.score is not None for o in outcomes)
        else None,
        habits={name: _mean_habit(name, outcomes) for name in sorted({name for o in outcomes for name in o.habits})},
    )


def average_scores(scores: Sequence[Score]) -> Score:
    """The mean of the scores of several evaluations on the same panel; episodes and crashes are summed."""
    if len(scores) == 1:
        return scores[0]
    assert len({(s.panel_hash, s.episodes) for s in scores}) == 1, "the evaluations must be on the same panel"
    names = ("success", "returns", "turns", "tokens", "invalid_share", "response_entropy", "score")
    means: dict[str, Any] = {"episodes": sum(s.episodes for s in scores), "crashed": sum(s.crashed for s in scores)}
    means |= {name: _mean_if_known([getattr(s, name) for s in scores]) for name in names}
    for name in ("by_kind", "habits"):
        keys = {key for s in scores for key in getattr(s, name)}
        tables = [getattr(s, name) for s in scores]
        means[name] = {key: _mean_if_known([table[key] for table in tables if key in table]) for key in sorted(keys)}
    return replace(scores[0], **means)


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _finite_mean(known) if known else None


def _mean_habit(name: str, outcomes: Sequence[Outcome]) -> float:
    """The mean of a metric over all turns; for metrics of endings (`end_...`), over all episodes."""
    turns = [(o.habits[name], 1 if name.startswith("end_") else len(o.valid)) for o in outcomes if name in o.habits]
    return sum(value * count for value, count in turns) / sum(count for _, count in turns)


def statistics(outcomes: Sequence[Outcome], repeats: int) -> dict[str, Any]:
    """Statistics beyond the mean, from `repeats` episodes per task.

    `standard_error` is cluster-robust: the tasks are the sample, since repeats of a task are not independent.
    `pass_at[j]`: at least one of j episodes of a task is won. `pass_hat[j]`: all j are won. Both are unbiased.
    """
    by_task: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    assert all(len(played) == repeats for played in by_task.values()), "every task is scored exactly `repeats` times"
    means = [sum(o.success for o in played) / repeats for played in by_task.values()]
    wins = [sum(o.success >= 1 for o in played) for played in by_task.values()]
    sizes = range(1, repeats + 1)
    kinds = Counter(played[0].kind for played in by_task.values())
    return {
        "tasks": len(by_task),
        "repeats": repeats,
        "standard_error": standard_error(means),
        "effective_episodes": effective_episodes(means, repeats),
        "pass_at": {str(j): _finite_mean([pass_at(repeats, c, j) for c in wins]) for j in sizes},
        "pass_hat": {str(j): _finite_mean([pass_hat(repeats, c, j) for c in wins]) for j in sizes},
        "tasks_by_kind": dict(sorted(kinds.items())),
        "endings": dict(sorted(Counter(o.ended for o in outcomes).items())),
    }


def wilson_interval(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n tasks."""
    if n == 0 or math.isnan(share):
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(n: int, c: int, j: int) -> float:
    """Probability that at least one of j episodes is won, from c wins in n: 1 - C(n-c, j) / C(n, j) (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, j) / math.comb(n, j)


def pass_hat(n: int, c: int, j: int) -> float:
    """Probability that all of j episodes are won, from c wins in n: C(c, j) / C(n, j) (arXiv 2406.12045)."""
    return math.comb(c, j) / math.comb(n, j)


def standard_error(task_means: Sequence[float]) -> float | None:
    """Standard error of the mean over tasks; None for a single task."""
    n = len(task_means)
    if n < 2:
        return None
    mean = sum(task_means) / n
    return math.sqrt(sum((x - mean) ** 2 for x in task_means) / (n - 1) / n)


def effective_episodes(task_means: Sequence[float], repeats: int) -> int:
    """The number of independent episodes with the same precision: p (1 - p) / SE^2, at least the tasks, at most the episodes.

    Wilson's interval with this number is valid for repeated tasks, stays within [0, 1], and never has zero width.
    """
    n, error = len(task_means), standard_error(task_means)
    share = sum(task_means) / n
    if repeats == 1 or not error:
        return n
    return min(n * repeats, max(n, int(share * (1 - share) / error**2)))


def _finite_mean(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def _require_value(value: float | None) -> float:
    assert value is not None, "an episode without a finite outcome"
    return value
