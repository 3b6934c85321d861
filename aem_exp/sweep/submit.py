"""Submits or runs the missing cells of a sweep, and records its members for status, MLflow and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aem_exp.cluster.run_state import RunState
    from aem_exp.sweep.cells import Sweep, SweepCell
    from aem_exp.sweep.study_spec import PrintLine

ALL: Final = "all"  # failure classes


def outputs_folder(sweep: "Sweep") -> Path:
    """The folder that holds the run directories of the sweep."""
    return sweep.cells[0].folder.parent


def should_run(state: "RunState", retry: Sequence[str]) -> bool:
    """Whether a cell is missing, or failed with a class in `retry`."""
    return state.missing or (state.what == "failed" and (state.kind in retry or ALL in retry))


def record_membership(sweep: "Sweep") -> None:
    """Record which runs belong to the sweep, for status, MLflow and the report."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, views

    rows = [
        {"run": cell.folder.name, "arm": label.arm, "group": label.group, "seed": cell.seed}
        for cell in sweep.cells
        for label in cell.labels
    ]
    membership.write(outputs_folder(sweep), sweep.name, sweep.question, rows)
    for cell in sweep.cells:
        cell.folder.mkdir(parents=True, exist_ok=True)
        if membership.add_label(cell.folder, sweep.name, cell.group):
            publish.add_tags(cell.folder, {views.sweep_tag(sweep.name): cell.group})


def submit_cells(sweep: "Sweep", todo: Sequence["SweepCell"], at_once: int, print_line: "PrintLine") -> None:
    """Submit one job array for each launch configuration."""
    from aem_exp.jobs import dispatch
    from aem_exp.rundir import membership

    sizes: dict[str, list[SweepCell]] = {}
    for cell in todo:
        sizes.setdefault(repr(cell.experiment.launch), []).append(cell)
    for cells in sizes.values():
        logs = outputs_folder(sweep) / membership.FOLDER / sweep.name
        jobs = dispatch.submit_runs([cell.experiment for cell in cells], sweep.name, logs, at_once)
        print_line(f"sent    {len(jobs)} cells as job {jobs[0][1].partition('_')[0]}; logs in {logs}")


def run_cells(todo: Sequence["SweepCell"], at_once: int, print_line: "PrintLine") -> int:
    """Run each cell in its own process; a failure does not stop the others. Return 1 if any cell failed, else 0."""
    from aem_exp.jobs import dispatch

    experiments = {f"{cell.group} seed {cell.seed}": cell.experiment for cell in todo}
    failed = dispatch.run_locally(experiments, max(1, at_once), print_line)
    if failed:
        print_line(f"\n{failed} of {len(todo)} cells did not finish; python -m aem_exp.status shows the reasons")
    return 1 if failed else 0


def save_views(sweep: "Sweep", print_line: "PrintLine") -> None:
    """Save views of the sweep in MLflow and print their links. If MLflow is not available, only the views are missing."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, store_uri

    outputs = outputs_folder(sweep)
    experiments = dict.fromkeys(cell.experiment.name for cell in sweep.cells)
    uri = store_uri.resolve_uri(sweep.cells[0].experiment.tracking, outputs)
    lines = [f"{name:<7} {text}" for name, text in publish.save_views(outputs, uri, experiments, sweep.name)]
    for line in lines:
        print_line(line)
    membership.write_links(outputs, sweep.name, lines)
