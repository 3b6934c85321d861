"""The plan of a sweep, as text or JSON: the state of its cells, the cost of the missing cells, and the statistical power."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp.core.console import format_duration, make_console, make_table
from aem_exp.core.errors import ConfigError

if TYPE_CHECKING:
    from aem_exp.cluster.run_state import RunState
    from aem_exp.sweep.cells import Sweep, SweepCell

    States = Mapping[Path, RunState]  # by run directory

HEADINGS = ("arm", "cells", "done", "active", "missing", "failed")


def show_plan(sweep: "Sweep", states: "States", todo: Sequence["SweepCell"]) -> None:
    """Print the number of cells in each state, the reasons of failures, and the cost of the missing cells."""
    from aem_exp.cluster.run_state import RunStatus

    console = make_console()
    console.print(f"[bold]{sweep.name}[/bold]  {sweep.question}", soft_wrap=True)
    console.print(make_table(HEADINGS, list(_count_cells(sweep, states)), left=("arm",)))
    for cell in sweep.cells:
        state = states[cell.folder]
        if state.what in ("failed", "stopped"):
            console.print(
                f"  {cell.group} seed {cell.seed}: {state.kind or state.what}: {state.sentence}", soft_wrap=True
            )
    to_run = ("to run", f"{len(todo)} of {len(sweep.cells)} cells")
    finished = [folder for folder, state in states.items() if state.what == RunStatus.DONE]
    facts = (to_run, *_estimate_cost(sweep, todo), *_estimate_power(sweep), *_revision_warning(finished))
    for heading, text in facts:
        console.print(f"[bold]{heading:<7}[/bold] {text}", soft_wrap=True)


def _count_cells(sweep: "Sweep", states: "States") -> Iterator[tuple[str, ...]]:
    """For each group: its cells, and how many of them are done, active (running or queued), missing, failed."""
    for group in dict.fromkeys(label.group for cell in sweep.cells for label in cell.labels):
        group_states = [states[c.folder] for c in sweep.cells if any(label.group == group for label in c.labels)]
        done = sum(state.what == "done" for state in group_states)
        active = sum(state.what in ("running", "queued") for state in group_states)
        missing = sum(state.missing for state in group_states)
        failed = len(group_states) - done - active - missing
        yield group, *map(str, (len(group_states), done, active, missing, failed))


def _estimate_cost(sweep: "Sweep", todo: Sequence["SweepCell"]) -> list[tuple[str, str]]:
    """The cost of the missing cells: the maximum by time limits, and an estimate from finished cells."""
    from aem_exp.rundir import attempts

    seconds = [took for cell in sweep.cells if (took := attempts.total_seconds(cell.folder)) is not None]
    launches = [cell.experiment.launch for cell in todo]
    gpus = [(launch.nodes + launch.server_nodes) * launch.gpus_per_node for launch in launches]
    most = sum(count * launch.hours for count, launch in zip(gpus, launches, strict=True))
    budget = [("budget", f"at most {most:,.0f} GPU-hours (time limits)")] if most else []
    if not todo:
        return budget
    if not seconds:
        return [*budget, ("time", "unknown until the first cell is done")]
    each = sum(seconds) / len(seconds)
    hours = f", {sum(gpus) * each / 3600:,.1f} GPU-hours" if any(gpus) else ""
    total = format_duration(each * len(todo))
    return [*budget, ("time", f"about {format_duration(each)} per cell, {total} one after another{hours}")]


def _estimate_power(sweep: "Sweep") -> list[tuple[str, str]]:
    """The difference that the sweep can detect with 80 % power."""
    from aem_exp.stats import power

    evaluation, seeds = sweep.cells[0].experiment.evaluation, len(sweep.seeds)
    if not sweep.pairs and not sweep.contrasts:
        return []
    if seeds < 2:
        return [("power", "none: one seed per arm cannot show a difference")]
    tasks = evaluation.tasks or _count_final_tasks(sweep.cells[0])
    if tasks is None:
        return []
    repeats = evaluation.repeats * evaluation.average
    if sweep.contrasts:
        primary = sweep.contrasts[0]
        weights = list(primary.weights.values())
        points = [power.planned_contrast_points(seeds, tasks, repeats, weights, sd) for sd in power.SEED_SDS]
        head, found, digits = f"primary contrast ({primary.name}): ", "detect", 1
        condition = " and the runs of a seed are independent"
    else:
        comparisons = len(sweep.pairs) * len(sweep.points)
        points = [
            power.planned_detectable_points(seeds, tasks, repeats, sd, comparisons=comparisons) for sd in power.SEED_SDS
        ]
        head, found, digits, condition = "", "detect differences of", 0, ""
    detectable = " and ".join(f"{value:.{digits}f}" for value in points)
    spread = " and ".join(f"{sd:g}" for sd in power.SEED_SDS)
    text = (
        f"{head}{seeds} seeds x {tasks} tasks {found} {detectable} points "
        f"(80 % power, if the standard deviation over seeds is {spread} points{condition})"
    )
    return [("power", text)]


def _revision_warning(finished: Sequence[Path]) -> list[tuple[str, str]]:
    """A warning if finished runs have another method revision than this code."""
    from aem_exp import METHOD, provenance

    others = [number for folder in finished if (number := provenance.method_revision(folder)) not in (METHOD, None)]
    if not others:
        return []
    numbers = ", ".join(map(str, sorted(set(others))))
    text = f"{len(others)} finished runs have method revision {numbers}, this code has {METHOD}. The report does not compare"
    return [("note", f"{text} different revisions; to run them again, move their folders away")]


def _count_final_tasks(cell: "SweepCell") -> int | None:
    """The size of the final panel; None if its world is not available on this machine."""
    from aem_exp.envs import opening

    try:
        return len(opening.open_world(cell.experiment).tasks(cell.experiment.evaluation.final))
    except ConfigError:
        return None


def plan_as_json(sweep: "Sweep", states: "States", todo: Sequence["SweepCell"]) -> dict[str, object]:
    to_run = {cell.folder for cell in todo}
    return {
        "sweep": sweep.name,
        "question": sweep.question,
        "cells": [
            {
                "groups": [label.group for label in cell.labels],
                "seed": cell.seed,
                "run": str(cell.folder),
                "state": states[cell.folder].what,
                "class": states[cell.folder].kind,
                "why": states[cell.folder].sentence,
                "to_run": cell.folder in to_run,
                "overrides": list(cell.overrides),
            }
            for cell in sweep.cells
        ],
    }
