"""Compares the arms of a sweep from archives of runs.

Decides which scores are compared, which pairs of arms form one family of simultaneous intervals, and which comparisons are
refused. The primary measure is success on the final panel.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from statistics import fmean
from typing import Any, Final

from aem_exp.rundir.archive import Archive
from aem_exp.stats import compare
from aem_exp.stats.compare import Interval

SUCCESS: Final = "success"
AREA: Final = "area under the training curve"
SCORE: Final = "score"
BUDGET_KEYS: Final = (
    "steps",
    "tasks_per_step",
    "group_size",
    "oversample",
)  # of `trainer`: the planned episodes of a run
Pair = tuple[str, str]  # an arm, and its reference arm


@dataclass(frozen=True)
class SeedRun:
    """One seed of a cell. `archive` is None if the run is missing; `command` runs it."""

    seed: int
    archive: Archive | None
    command: str = ""

    @property
    def done(self) -> bool:
        return self.archive is not None and self.archive.done


@dataclass(frozen=True)
class ArmCell:
    """An arm at a point of the sweep: runs that differ only in their seed. `point` is empty if the sweep has one point."""

    arm: str
    point: str
    runs: tuple[SeedRun, ...]

    @property
    def done(self) -> list[Archive]:
        return [run.archive for run in self.runs if run.archive is not None and run.done]

    def scores(self, measure: str) -> list[float]:
        """The value of a measure for each finished run that has it."""
        return [value for archive in self.done if (value := measure_value(archive, measure)) is not None]


@dataclass(frozen=True)
class Difference:
    """The difference between an arm and its reference in one measure.

    Attributes:
        one, other: scores of the runs of the arm and of the reference.
        comparisons: number of comparisons in the family; the intervals of a family hold simultaneously.
        interval: interval of the difference on this panel; None if the comparison is refused, with the reason in `refusal`.
        new_tasks: interval of the difference on new tasks; only for success.
        p: permutation p-value; None if the level cannot be reached with this number of runs.
        detectable: smallest difference that a comparison with this spread detects with a power of 80 %.
        enough: runs per arm that detect the observed difference with a power of 80 %; None above 200.
        partial: whether runs are missing.
        diverged: number of diverged runs.
    """

    arm: str
    reference: str
    point: str
    measure: str
    one: tuple[float, ...]
    other: tuple[float, ...]
    comparisons: int
    interval: Interval | None = None
    refusal: str = ""
    new_tasks: Interval | None = None
    p: compare.PermutationResult | None = None
    detectable: float = math.nan
    enough: int | None = None
    partial: bool = False
    diverged: int = 0

    @property
    def open(self) -> bool:
        """Whether the arms were compared and no difference was shown."""
        return self.interval is not None and compare.verdict(self.interval) not in ("better", "worse")

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return f"not compared: {self.refusal}"
        return f"{'so far: ' if self.partial else ''}{compare.verdict(self.interval)}"


def measure_value(archive: Archive, measure: str) -> float | None:
    """The value of a measure for a run; None if the run does not have it."""
    if measure == AREA:
        return _area_under_curve(archive)
    if measure == SCORE:
        per_task = archive.tasks.get("score")
        return mean([mean(repeats) for repeats in per_task]) if per_task else None
    return mean(archive.success)


def _area_under_curve(archive: Archive) -> float | None:
    """Mean training success over all planned steps. After divergence, the last value is repeated."""
    planned, values = archive.experiment.get("trainer", {}).get("steps"), archive.curve("train/success")
    if not planned or not values:
        return None
    return (sum(value for _, value in values) + (planned - len(values)) * values[-1][1]) / planned


def available_measures(cells: Sequence[ArmCell]) -> list[str]:
    """The measures that any run has, with the primary measure first."""
    done = [archive for cell in cells for archive in cell.done]
    return [m for m in (SUCCESS, SCORE, AREA) if m == SUCCESS or any(measure_value(a, m) is not None for a in done)]


def differences(
    cells: Sequence[ArmCell], families: Sequence[Sequence[Pair]], measure: str = SUCCESS
) -> list[Difference]:
    """Compare pairs of (arm, reference) at each point. The intervals of a family hold simultaneously."""
    by_place = {(cell.arm, cell.point): cell for cell in cells}
    points, out = dict.fromkeys(cell.point for cell in cells), list[Difference]()
    for pairs in families:
        places = [((one, point), (other, point)) for point in points for one, other in pairs]
        both = [(by_place[one], by_place[other]) for one, other in places if one in by_place and other in by_place]
        out += [_difference(cell, reference, measure, len(both)) for cell, reference in both]
    return out


def _difference(cell: ArmCell, reference: ArmCell, measure: str, comparisons: int) -> Difference:
    one, other = cell.scores(measure), reference.scores(measure)
    runs = (*cell.runs, *reference.runs)
    fields: dict[str, Any] = {
        "arm": cell.arm,
        "reference": reference.arm,
        "point": cell.point,
        "measure": measure,
        "one": tuple(one),
        "other": tuple(other),
        "comparisons": comparisons,
        "partial": any(not run.done for run in runs),
        "diverged": sum("diverged" in archive.result for archive in (*cell.done, *reference.done)),
    }
    if (cell.done and not one) or (reference.done and not other):
        return Difference(**fields, refusal="not measured")
    if refusal := refusal_reason([cell, reference]) or compare.no_interval_reason(one, other):
        return Difference(**fields, refusal=refusal)
    interval = compare.welch_interval(one, other, comparisons)
    return Difference(
        **fields,
        interval=interval,
        new_tasks=_interval_on_new_tasks(cell, reference, comparisons) if measure == SUCCESS else None,
        p=compare.permutation_test(one, other, comparisons),
        detectable=compare.observed_detectable_difference(one, other, comparisons),
        enough=compare.runs_needed(interval.difference, compare.pooled_sd(one, other), comparisons),
    )


def _interval_on_new_tasks(cell: ArmCell, reference: ArmCell, comparisons: int) -> Interval | None:
    one, other = ([archive.success for archive in each.done] for each in (cell, reference))
    return compare.new_tasks_interval(one, other, comparisons) if len(one[0]) > 1 else None


def refusal_reason(cells: Sequence[ArmCell]) -> str | None:
    """The reason that cells cannot be compared, or None."""
    for name, read in MUST_MATCH.items():
        if len(values := {read(archive) for cell in cells for archive in cell.done} - {None}) > 1:
            return f"{name} differ: {', '.join(sorted(map(str, values)))}"
    return None


def _hash_tasks(ids: Sequence[str]) -> str:
    return sha256("\n".join(sorted(ids)).encode()).hexdigest()[:8]


def planned_budget(archive: Archive) -> str | None:
    """The planned budget of a run: steps x tasks x group x oversampling; None if unknown."""
    trainer = archive.experiment.get("trainer", {})
    return " x ".join(str(trainer.get(key, 1)) for key in BUDGET_KEYS) if trainer else None


MUST_MATCH: Final[Mapping[str, Callable[[Archive], str | None]]] = {
    "panels": lambda archive: (archive.result.get("final") or {}).get("panel_hash"),
    "tasks of the panels": lambda archive: _hash_tasks(archive.tasks["id"]) if archive.tasks else None,
    "worlds (fingerprints)": lambda archive: archive.result.get("fingerprint"),
    "planned budgets (steps x tasks x group x oversampling)": planned_budget,
    "checkpoint rules": lambda archive: archive.result.get("checkpoint_rule"),
}


def runs_by_revision(done: Iterable[Archive]) -> dict[int, list[str]]:
    """The names of runs for each method revision. Runs of other frameworks have no revision and are left out."""
    out: dict[int, list[str]] = {}
    for run, method in {archive.run: archive.method for archive in done}.items():
        if method is not None:
            out.setdefault(method, []).append(run)
    return dict(sorted(out.items()))


def list_problems(cells: Sequence[ArmCell]) -> list[tuple[str, str, int, str]]:
    """(arm, point, seed, problem) of each run that is missing, failed or diverged."""
    out = []
    for cell in cells:
        for run in cell.runs:
            archive = run.archive
            if archive is None:
                out.append((cell.arm, cell.point, run.seed, "missing"))
            elif diverged := archive.result.get("diverged"):
                out.append(
                    (cell.arm, cell.point, run.seed, f"diverged, scored after its last finite update: {diverged}")
                )
            elif not archive.done:
                why = ": ".join(filter(None, archive.why))
                out.append((cell.arm, cell.point, run.seed, f"{archive.what}{f' ({why})' if why else ''}"))
    return out


def curve_rows(cells: Sequence[ArmCell]) -> list[tuple[object, ...]]:
    """All curves as rows of (arm, point, seed, run, step, measured, value), after a header row."""
    rows: list[tuple[object, ...]] = [("arm", "point", "seed", "run", "step", "measured", "value")]
    for cell in cells:
        for archive in cell.done:
            for name in archive.curves:
                if name != "step":
                    run = (cell.arm, cell.point, archive.seed, archive.run)
                    rows += [(*run, step, name, value) for step, value in archive.curve(name)]
    return rows


@dataclass(frozen=True)
class OverallComparison:
    """The comparison of an arm with another one over all points of a sweep."""

    arm: str
    against: str
    points: int
    improvement: compare.Estimate
    """Probability that a run of the arm scores above a run of the other arm."""
    interquartile_mean: compare.Estimate
    """Interquartile mean of the scores of the arm."""
    reference: compare.Estimate
    """Interquartile mean of the scores of the other arm."""


def compare_overall(cells: Sequence[ArmCell], pairs: Sequence[Pair]) -> list[OverallComparison]:
    """Compare pairs of arms over all points.

    A pair is left out if it has too few points or runs (see `compare.has_enough_cells`), if a comparison is refused, or if a run
    belongs to two points.
    """
    by_place = {(cell.arm, cell.point): cell for cell in cells}
    out = []
    for arm, against in pairs:
        both = [
            (cell, by_place[against, p]) for (a, p), cell in by_place.items() if a == arm and (against, p) in by_place
        ]
        runs = [archive.run for pair in both for cell in pair for archive in cell.done]
        scores = [
            (one.scores(SUCCESS), other.scores(SUCCESS)) for one, other in both if not refusal_reason([one, other])
        ]
        if compare.has_enough_cells(scores) and len(scores) == len(both) and len(set(runs)) == len(runs):
            one, other = ([pair[i] for pair in scores] for i in (0, 1))
            summary = compare.probability_of_improvement(scores)
            out.append(
                OverallComparison(
                    arm,
                    against,
                    len(scores),
                    summary,
                    compare.interquartile_mean(one),
                    compare.interquartile_mean(other),
                )
            )
    return out


def mean(values: Sequence[float]) -> float:
    """The mean, or NaN for an empty sequence."""
    return fmean(values) if values else math.nan
