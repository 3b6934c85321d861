"""Send or run the cells of a sweep that are missing, and record where status, MLflow and the report look for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aem_exp.cluster.run_state import RunState
    from aem_exp.sweep.cells import Sweep, SweepCell
    from aem_exp.sweep.study_spec import PrintLine

ALL: Final = "all"  # classes of failures


def outputs_folder(sweep: "Sweep") -> Path:
    """The folder of the sweep's runs."""
    return sweep.cells[0].folder.parent


def should_run(state: "RunState", retry: Sequence[str]) -> bool:
    """Whether a cell is missing, or has failed in a way that is to be tried again."""
    return state.missing or (state.what == "failed" and (state.kind in retry or ALL in retry))


def record_membership(sweep: "Sweep") -> None:
    """Write down which runs belong to the sweep, where status, MLflow and the report look."""
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
    """One array for all cells of one size."""
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
    """Each cell in a process of its own; one that fails stops no other. The exit code: 1 if any failed."""
    from aem_exp.jobs import dispatch

    experiments = {f"{cell.group} seed {cell.seed}": cell.experiment for cell in todo}
    failed = dispatch.run_locally(experiments, max(1, at_once), print_line)
    if failed:
        print_line(f"\n{failed} of {len(todo)} cells did not finish; python -m aem_exp.status says why")
    return 1 if failed else 0


def save_views(sweep: "Sweep", print_line: "PrintLine") -> None:
    """Save views of the sweep in MLflow, and print their links; a tracker that is down costs nothing but them."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, store_uri

    outputs = outputs_folder(sweep)
    experiments = dict.fromkeys(cell.experiment.name for cell in sweep.cells)
    uri = store_uri.resolve_uri(sweep.cells[0].experiment.tracking, outputs)
    lines = [f"{name:<7} {text}" for name, text in publish.save_views(outputs, uri, experiments, sweep.name)]
    for line in lines:
        print_line(line)
    membership.write_links(outputs, sweep.name, lines)
