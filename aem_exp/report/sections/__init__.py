"""The sections of a report.

Each statement follows from a table of the same section, and each number in a table from runs that the report lists. `design`
builds the question, provenance, commands and interpretation; `verdicts` the scores and differences; `breakdowns` the curves,
breakdowns, sanity checks and published numbers.
"""

from collections.abc import Sequence
from pathlib import Path

from aem_exp.report.analysis import ArmCell, Difference
from aem_exp.report.contrasts import ContrastResult
from aem_exp.report.render import Report
from aem_exp.report.sections import breakdowns, design, verdicts
from aem_exp.report.sections.design import SweepDescription
from aem_exp.report.sections.formats import format_interval, format_points

__all__ = ["SweepDescription", "build_report", "format_interval", "format_points"]


def build_report(
    sweep: SweepDescription,
    cells: Sequence[ArmCell],
    primary: Sequence[Difference],
    published: Path | None = None,
    contrasts: Sequence[ContrastResult] = (),
) -> Report:
    """Build the report from the finished runs.

    Args:
        primary: the declared differences in success, then the differences to runs of other frameworks.
        published: CSV file of published numbers, if any.
        contrasts: the declared contrasts. With them, all differences are exploratory.
    """
    parts = [
        design.question_section(sweep, cells),
        design.provenance_section(cells),
        verdicts.cells_section(cells),
        *([verdicts.contrasts_section(contrasts)] if contrasts else []),
        verdicts.differences_section(sweep, cells, primary, exploratory=bool(contrasts)),
        breakdowns.curves_section(cells),
        breakdowns.breakdown_section(cells),
        breakdowns.sanity_section(cells),
        breakdowns.published_section(cells, published),
        design.commands_section(cells),
        design.interpretation_section(cells),
    ]
    return Report(f"{sweep.name}: report of a sweep", sweep.question, parts)
