"""The ten parts of a report: what was asked, what was run, what it came to, and how to make it again.

Whatever is said follows from tables that stand beside it, and every number in those from a run that is named. `design` has the
question, provenance and commands; `verdicts` the scores and differences; `breakdowns` the curves, and what explains them.
"""

from collections.abc import Sequence
from pathlib import Path

from aem_exp.report.analysis import ArmCell, Difference
from aem_exp.report.render import Report
from aem_exp.report.sections import breakdowns, design, verdicts
from aem_exp.report.sections.design import SweepDescription
from aem_exp.report.sections.formats import format_interval, format_points

__all__ = ["SweepDescription", "build_report", "format_interval", "format_points"]


def build_report(
    sweep: SweepDescription, cells: Sequence[ArmCell], primary: Sequence[Difference], published: Path | None = None
) -> Report:
    """All of it; where runs are missing, what there is. `primary`: the differences in success, as declared; then others."""
    parts = [
        design.question_section(sweep, cells),
        design.provenance_section(cells),
        verdicts.cells_section(cells),
        verdicts.differences_section(sweep, cells, primary),
        breakdowns.curves_section(cells),
        breakdowns.breakdown_section(cells),
        breakdowns.sanity_section(cells),
        breakdowns.published_section(cells, published),
        design.commands_section(cells),
        design.interpretation_section(cells),
    ]
    return Report(f"{sweep.name}: report of a sweep", sweep.question, parts)
