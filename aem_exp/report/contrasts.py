"""Computes the declared contrasts of a sweep from archives of runs.

A contrast is computed within each seed, and its interval is Student's t over seeds. The runs of a seed may share their warm start
and their first episodes, so a seed is a block. This is valid whether or not the runs of a block are correlated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aem_exp.report.analysis import SUCCESS, ArmCell, measure_value, refusal_reason
from aem_exp.stats import compare, power
from aem_exp.stats.compare import Interval
from aem_exp.sweep.contrasts import Contrast


@dataclass(frozen=True)
class ContrastResult:
    """The value of a contrast."""

    name: str
    weights: Mapping[str, float]
    primary: bool
    """Whether it is the primary hypothesis of the sweep."""
    seeds: tuple[int, ...]
    """Seeds of which all runs are finished."""
    missing: tuple[int, ...]
    """Seeds that are left out, because a run is not finished."""
    values: tuple[float, ...]
    """The contrast within each seed."""
    interval: Interval | None
    """None if there are fewer than two seeds, or if runs cannot be compared."""
    refusal: str = ""

    @property
    def verdict(self) -> str:
        """The verdict in words. The sign of a contrast has no direction of better or worse."""
        if self.interval is None:
            return f"not computed: {self.refusal or 'fewer than two complete seeds'}"
        words = {"better": "above 0", "worse": "below 0"}
        found = compare.verdict(self.interval)
        return f"{'so far: ' if self.missing else ''}{words.get(found, found)}"

    @property
    def detectable(self) -> float:
        """The smallest contrast that seeds with this spread detect with 80 % power."""
        return power.paired_detectable_effect(len(self.values)) * compare.sample_sd(self.values)


def compute_contrasts(
    cells: Sequence[ArmCell], contrasts: Sequence[Contrast], measure: str = SUCCESS
) -> list[ContrastResult]:
    """Compute contrasts; the first one is the primary hypothesis."""
    by_group = {"/".join(filter(None, (cell.arm, cell.point))): cell for cell in cells}
    return [_compute(contrast, by_group, measure, i == 0) for i, contrast in enumerate(contrasts)]


def _compute(contrast: Contrast, by_group: Mapping[str, ArmCell], measure: str, primary: bool) -> ContrastResult:
    cells = {group: by_group[group] for group in contrast.weights}
    scores = {group: _scores_by_seed(cell, measure) for group, cell in cells.items()}
    planned = sorted({run.seed for cell in cells.values() for run in cell.runs})
    complete = [seed for seed in planned if all(seed in scores[group] for group in scores)]
    values = tuple(sum(w * scores[group][seed] for group, w in contrast.weights.items()) for seed in complete)
    points = {cell.point for cell in cells.values()}
    reasons = [refusal_reason([c for c in cells.values() if c.point == point]) for point in sorted(points)]
    refusal = next(filter(None, reasons), "")
    return ContrastResult(
        name=contrast.name,
        weights=contrast.weights,
        primary=primary,
        seeds=tuple(complete),
        missing=tuple(seed for seed in planned if seed not in complete),
        values=values,
        interval=None if refusal or len(values) < 2 else compare.one_sample_interval(values),
        refusal=refusal,
    )


def _scores_by_seed(cell: ArmCell, measure: str) -> dict[int, float]:
    done = ((run.seed, measure_value(run.archive, measure)) for run in cell.runs if run.archive and run.done)
    return {seed: value for seed, value in done if value is not None}
