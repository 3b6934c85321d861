"""The ledger of the project's sweeps, in Markdown: from the sweep files and the archives of their runs."""

from pathlib import Path

from tables import table

from aem_exp.report import analysis, command
from aem_exp.report.contrasts import compute_contrasts
from aem_exp.report.sections import format_interval, format_points
from aem_exp.rundir import archive
from aem_exp.sweep import question
from aem_exp.sweep.cells import Sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"
INTRODUCTION = """\
# Ledger of sweeps

This page lists every sweep of the project, with and without results. Nothing is left out because of its result. A sweep file is
written before its runs. Its **hypothesis** is its first contrast, or its declared pairs if it has no contrast. All
other comparisons of a report are exploratory.

`aem-exp report NAME` makes the report of a sweep with results again, from a clone. Values are points of success, with 95 %
intervals: of Student's t over seeds for a contrast, and simultaneous over the declared pairs otherwise.
"""


def ledger_page() -> str:
    done, open_rows = [], []
    for file in sorted(SWEEPS.glob("*.yaml")):
        sweep = question.load(file)
        if sweep.search is not None:
            open_rows.append((f"`{sweep.name}`", sweep.question, "a study: it tunes, and tests nothing", "0"))
            continue
        folder = SWEEPS / "results" / sweep.name
        files = {cell.folder: folder / f"{cell.folder.name}{archive.SUFFIX}" for cell in sweep.cells}
        archives = {run: archive.read(path) for run, path in files.items() if path.is_file()}
        runs = f"{len(archives)} of {len(sweep.cells)}"
        if archives:
            done.append(
                (f"`{sweep.name}`", sweep.question, runs, _results(sweep, command.build_cells(sweep, archives)))
            )
        else:
            open_rows.append((f"`{sweep.name}`", sweep.question, _hypothesis(sweep), str(len(sweep.cells))))
    return "\n".join(
        [
            INTRODUCTION,
            "## With results\n",
            table(("Sweep", "Question", "Runs", "Hypothesis and result"), done),
            "\n## Without results\n",
            "The runs of these sweeps have not been made, or not in this project.\n",
            table(("Sweep", "Question", "Hypothesis", "Runs"), open_rows),
        ]
    )


def _hypothesis(sweep: Sweep) -> str:
    if sweep.contrasts:
        return sweep.contrasts[0].name
    if len(sweep.pairs) > 4 and len({other for _, other in sweep.pairs}) == 1:
        return f"each of the other {len(sweep.pairs)} arms against {sweep.pairs[0][1]}"
    return "; ".join(f"{one} against {other}" for one, other in sweep.pairs) or "none"


def _results(sweep: Sweep, cells: list[analysis.ArmCell]) -> str:
    if sweep.contrasts:
        (primary, *_) = compute_contrasts(cells, sweep.contrasts)
        found = [(primary.name, primary.interval, primary.verdict)]
    else:
        compared = analysis.differences(cells, [sweep.pairs])
        found = [(f"{d.arm} against {d.reference} {d.point}".strip(), d.interval, d.verdict) for d in compared]
    return "<br>".join(
        f"{name}: {format_points(interval.difference, True)} {format_interval(interval)}, {verdict.partition(';')[0]}"
        if interval
        else f"{name}: {verdict}"
        for name, interval, verdict in found
    )
