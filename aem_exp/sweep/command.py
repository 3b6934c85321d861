"""Command `python -m aem_exp.sweep NAME`: plan a sweep of experiments that answers one question, then submit or run
locally the runs that are missing.

Running it again only submits what is still missing.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp.core import cli
from aem_exp.core.errors import ConfigError
from aem_exp.rundir.attempts import FAILURE_CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aem_exp.cluster.run_state import RunState
    from aem_exp.sweep.question import Sweep, SweepCell

ALL = "all"  # classes of failures
ABOUT = """\
Plan the experiments of a question, and send or run those that are missing.

  python -m aem_exp.sweep household_quick                          the plan; nothing is run
  python -m aem_exp.sweep household_quick --local                  here, one after another
  python -m aem_exp.sweep household_quick launch=slurm_cpu --submit   to SLURM, as one array
  python -m aem_exp.sweep household_quick --retry oom --submit     once more, also what failed with `oom`
"""


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "aem_exp.sweep", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv), argv), lambda: f"to go on: {again}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.sweep", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", help="a file, or a name of sweeps/; none: list them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over every cell")
    parser.add_argument("--submit", action="store_true", help="send what is missing to SLURM, as one array")
    parser.add_argument("--local", action="store_true", help="run what is missing here")
    parser.add_argument("--at-once", type=int, help="cells that run at a time")
    parser.add_argument(
        "--retry", metavar="CLASS", action="append", default=[], help="also cells that failed so; or: all"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON and nothing else")
    parser.add_argument("--config-dir", help="a folder of your own over conf/")
    asked = parser.parse_intermixed_args(argv)
    if asked.submit and asked.local:
        raise ConfigError("--submit", True, "or --local, not both")
    if asked.at_once is not None and asked.at_once < 1:
        raise ConfigError("--at-once", asked.at_once, "must be a whole number of at least 1")
    for kind in asked.retry:
        if kind not in (ALL, *FAILURE_CLASSES):
            raise ConfigError("--retry", kind, (ALL, *FAILURE_CLASSES))
    asked.at_once = asked.at_once or 0
    return asked


def _run_command(asked: argparse.Namespace, argv: list[str]) -> int:
    from aem_exp.sweep import question

    if asked.sweep is None:
        for name, asks in question.list_sweeps().items():
            print(f"{name:<22} {asks}")
        return 0
    cli.add_user_modules(asked.config_dir)
    typed = shlex.join(["python", "-m", "aem_exp.sweep", *argv])
    return execute_sweep(question.load(asked.sweep, asked.overrides, asked.config_dir), asked, typed)


def execute_sweep(sweep: "Sweep", asked: argparse.Namespace, typed: str) -> int:
    """Show the plan of a sweep, and do what `asked` says with it; `typed`: the command that asked."""
    from aem_exp.cluster import run_state
    from aem_exp.jobs import dispatch

    if sweep.search is not None:
        return _execute_study(sweep, asked, typed)
    states = run_state.read([cell.folder for cell in sweep.cells])
    todo = [cell for cell in sweep.cells if _should_run(states[cell.folder], asked.retry)]
    if asked.json:
        print(json.dumps(_as_json(sweep, states, todo), indent=1))
        return 0
    if asked.submit or asked.local:
        dispatch.check_can_start([cell.experiment for cell in todo], asked.submit, _outputs(sweep))
    _show_plan(sweep, states, todo)
    if not (asked.submit or asked.local):
        print(f"\nnext    {_next_command(sweep, todo, typed, asked)}")
        return 0
    _record_membership(sweep)
    if todo and asked.submit:
        _submit(sweep, todo, asked.at_once)
    _save_views(sweep)  # after what was asked for, as MLflow takes seconds to import; before what takes minutes
    code = 0
    if not todo:
        print("\nnothing is missing")
    elif asked.local:
        code = _run_locally(todo, asked.at_once)
    whole = sweep.file is not None and (not todo or (asked.local and not code))
    print(f"next    {_report_command(asked) if whole else f'python -m aem_exp.status {sweep.name}'}")
    return code


def _report_command(asked: argparse.Namespace) -> str:
    """The command that compares what was run."""
    own = ["--config-dir", asked.config_dir] if asked.config_dir else []
    return shlex.join(["python", "-m", "aem_exp.report", asked.sweep, *asked.overrides, *own])


def _execute_study(sweep: "Sweep", asked: argparse.Namespace, typed: str) -> int:
    """The same for a search, whose cells nobody knows before they are asked for."""
    from aem_exp.jobs import dispatch
    from aem_exp.sweep import study

    search = study.from_sweep(sweep, asked.overrides, asked.config_dir)
    if (asked.submit or asked.local) and not asked.json:
        dispatch.check_can_start([search.base], asked.submit, search.outputs)
        _save_views(sweep)
    return study.execute_study(search, asked, typed, print)


def _should_run(state: "RunState", retry: Sequence[str]) -> bool:
    return state.missing or (state.what == "failed" and (state.kind in retry or ALL in retry))


def _record_membership(sweep: "Sweep") -> None:
    """Write down who belongs to the sweep, where status, MLflow and the report look."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, views

    rows = [
        {"run": cell.folder.name, "arm": label.arm, "group": label.group, "seed": cell.seed}
        for cell in sweep.cells
        for label in cell.labels
    ]
    membership.write(_outputs(sweep), sweep.name, sweep.question, rows)
    for cell in sweep.cells:
        cell.folder.mkdir(parents=True, exist_ok=True)
        if membership.add_label(cell.folder, sweep.name, cell.group):
            publish.add_tags(cell.folder, {views.sweep_tag(sweep.name): cell.group})


def _submit(sweep: "Sweep", todo: Sequence["SweepCell"], at_once: int) -> None:
    """One array for all cells of one size."""
    from aem_exp.jobs import dispatch
    from aem_exp.rundir import membership

    sizes: dict[str, list[SweepCell]] = {}
    for cell in todo:
        sizes.setdefault(repr(cell.experiment.launch), []).append(cell)
    for cells in sizes.values():
        logs = _outputs(sweep) / membership.FOLDER / sweep.name
        sent = dispatch.submit_runs([cell.experiment for cell in cells], sweep.name, logs, at_once)
        print(f"sent    {len(sent)} cells as job {sent[0][1].partition('_')[0]}; logs in {logs}")


def _run_locally(todo: Sequence["SweepCell"], at_once: int) -> int:
    """Each cell in a process of its own; one that fails stops no other. How many failed decides the exit code."""
    from aem_exp.jobs import dispatch

    named = {f"{cell.group} seed {cell.seed}": cell.experiment for cell in todo}
    failed = dispatch.run_locally(named, max(1, at_once), partial(print, flush=True))
    if failed:
        print(f"\n{failed} of {len(todo)} cells did not finish; python -m aem_exp.status says why")
    return 1 if failed else 0


def _save_views(sweep: "Sweep") -> None:
    """Save views of the sweep in MLflow, and print their links; a tracker that is down costs nothing but them."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, store_uri

    experiments = dict.fromkeys(cell.experiment.name for cell in sweep.cells)
    uri = store_uri.resolve_uri(sweep.cells[0].experiment.tracking, _outputs(sweep))
    lines = [f"{name:<7} {text}" for name, text in publish.save_views(_outputs(sweep), uri, experiments, sweep.name)]
    if lines:
        print(*lines, sep="\n")
    membership.write_links(_outputs(sweep), sweep.name, lines)


def _outputs(sweep: "Sweep") -> Path:
    return sweep.cells[0].folder.parent


# The plan, for people and for programs.


def _show_plan(sweep: "Sweep", states: "Mapping[Path, RunState]", todo: Sequence["SweepCell"]) -> None:
    from rich.console import Console
    from rich.table import Table

    from aem_exp.cluster.run_state import RunStatus

    console = Console(highlight=False)
    console.print(f"[bold]{sweep.name}[/bold]  {sweep.question}", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "cells", "done", "on the way", "missing", "failed"):
        table.add_column(column, header_style="bold", justify="left" if column == "arm" else "right")
    for group in dict.fromkeys(label.group for cell in sweep.cells for label in cell.labels):
        mine = [states[c.folder] for c in sweep.cells if any(label.group == group for label in c.labels)]
        counts = [sum(state.what in what for state in mine) for what in (("done",), ("running", "queued"))]
        missing = sum(state.missing for state in mine)
        table.add_row(group, str(len(mine)), *map(str, counts), str(missing), str(len(mine) - sum(counts) - missing))
    console.print(table)
    for cell in sweep.cells:
        state = states[cell.folder]
        if state.what in ("failed", "stopped"):
            console.print(
                f"  {cell.group} seed {cell.seed}: {state.kind or state.what}: {state.sentence}", soft_wrap=True
            )
    to_run = ("to run", f"{len(todo)} of {len(sweep.cells)} cells")
    finished = [folder for folder, how in states.items() if how.what == RunStatus.DONE]
    facts = (to_run, *_cost(sweep, todo), *_power(sweep), *_revision_warning(finished))
    for heading, text in facts:
        console.print(f"[bold]{heading:<7}[/bold] {text}", soft_wrap=True)


def _cost(sweep: "Sweep", todo: Sequence["SweepCell"]) -> list[tuple[str, str]]:
    """What the missing cells will take: at most, and as those took that are done."""
    from aem_exp.core.console import format_duration
    from aem_exp.rundir import attempts

    seconds = [took for cell in sweep.cells if (took := attempts.total_seconds(cell.folder)) is not None]
    machines = [c.experiment.launch for c in todo]
    gpus = [(launch.nodes + launch.server_nodes) * launch.gpus_per_node for launch in machines]
    most = sum(n * c.experiment.launch.hours for n, c in zip(gpus, todo, strict=True))
    out = [("budget", f"at most {most:,.0f} GPU-hours, by the time limits")] if most else []
    if not todo:
        return out
    if not seconds:
        return [*out, ("time", "unknown until a cell is done")]
    each = sum(seconds) / len(seconds)
    hours = f", {sum(gpus) * each / 3600:,.1f} GPU-hours" if any(gpus) else ""
    return [
        *out,
        ("time", f"about {format_duration(each)} a cell, {format_duration(each * len(todo))} one after another{hours}"),
    ]


def _power(sweep: "Sweep") -> list[tuple[str, str]]:
    """What the sweep will be able to show."""
    from aem_exp.stats import power

    how, seeds = sweep.cells[0].experiment.evaluation, len(sweep.seeds)
    if not sweep.pairs:
        return []
    if seeds < 2:
        return [("power", "one seed an arm shows no difference between arms, whatever it is")]
    tasks = how.tasks or _count_final_tasks(sweep.cells[0])
    if tasks is None:
        return []
    comparisons = len(sweep.pairs) * len(sweep.points)
    points = [
        power.detectable_difference(seeds, tasks, how.repeats, sd, comparisons=comparisons) for sd in power.SEED_SDS
    ]
    spread = " and ".join(f"{sd:g}" for sd in power.SEED_SDS)
    found = " and ".join(f"{value:.0f}" for value in points)
    text = f"{seeds} seeds x {tasks} tasks find differences of {found} points (4 times in 5, where seeds spread by {spread})"
    return [("power", text)]


def _revision_warning(done: Sequence[Path]) -> list[tuple[str, str]]:
    """Whether runs that are done were trained by another revision of the method than those to come would be."""
    from aem_exp import METHOD, provenance

    others = [number for folder in done if (number := provenance.method_revision(folder)) not in (METHOD, None)]
    if not others:
        return []
    numbers = ", ".join(map(str, sorted(set(others))))
    text = f"{len(others)} of the finished runs are of method revision {numbers}, and this code is {METHOD}: the report refuses"
    return [("note", f"{text} to compare them with newer ones; to run them again, move their folders away")]


def _count_final_tasks(cell: "SweepCell") -> int | None:
    """The size of the panel that is read at the end, where its world is at hand."""
    from aem_exp.envs import opening

    try:
        return len(opening.open_world(cell.experiment).tasks(cell.experiment.evaluation.final))
    except ConfigError:
        return None


def _next_command(sweep: "Sweep", todo: Sequence["SweepCell"], typed: str, asked: argparse.Namespace) -> str:
    """The command that most likely comes next."""
    if not todo:
        return _report_command(asked) if sweep.file else f"python -m aem_exp.status {sweep.name}"
    return f"{typed} {'--submit' if todo[0].experiment.launch.where == 'slurm' else '--local'}"


def _as_json(sweep: "Sweep", states: "Mapping[Path, RunState]", todo: Sequence["SweepCell"]) -> dict[str, object]:
    wanted = {cell.folder for cell in todo}
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
                "to_run": cell.folder in wanted,
                "overrides": list(cell.overrides),
            }
            for cell in sweep.cells
        ],
    }
