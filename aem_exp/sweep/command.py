"""Command `python -m aem_exp.sweep NAME`: show the plan of a sweep, then submit or run its missing cells.

The command can be repeated: it never runs a finished cell again.
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
from aem_exp.sweep.submit import (
    ALL,
    outputs_folder,
    record_membership,
    run_cells,
    save_views,
    should_run,
    submit_cells,
)

if TYPE_CHECKING:
    from aem_exp.sweep.cells import Sweep, SweepCell

ABOUT = """\
Plan the experiments of a sweep, and submit or run the missing ones.

  python -m aem_exp.sweep household_quick                          show the plan; run nothing
  python -m aem_exp.sweep household_quick --local                  run on this machine, one after another
  python -m aem_exp.sweep household_quick launch=slurm_cpu --submit   submit to SLURM, as one array
  python -m aem_exp.sweep household_quick --retry oom --submit     also submit the cells that failed with class oom
  python -m aem_exp.sweep household_quick --from DIR --local       run the cells that have no archive (see aem_exp.report) in DIR
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "aem_exp.sweep", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv), argv), lambda: f"to continue: {again}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.sweep", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", help="a sweep file, or a name in sweeps/; without it, list the sweeps")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of every cell")
    parser.add_argument("--submit", action="store_true", help="submit the missing cells to SLURM, as one array")
    parser.add_argument("--local", action="store_true", help="run the missing cells on this machine")
    parser.add_argument("--at-once", type=int, metavar="N", help="maximum number of cells that run at the same time")
    parser.add_argument(
        "--retry", metavar="CLASS", action="append", default=[], help="also run cells with this failure class, or: all"
    )
    parser.add_argument(
        "--from", dest="archives", type=Path, metavar="FOLDER", help="skip the runs that are finished in these archives"
    )
    parser.add_argument("--json", action="store_true", help="print only the plan, as JSON")
    parser.add_argument("--config-dir", help="your own configuration folder, searched before conf/")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.submit and arguments.local:
        raise ConfigError("--submit", True, "cannot be combined with --local; use one of them")
    if arguments.at_once is not None and arguments.at_once < 1:
        raise ConfigError("--at-once", arguments.at_once, "must be an integer of at least 1")
    for kind in arguments.retry:
        if kind not in (ALL, *FAILURE_CLASSES):
            raise ConfigError("--retry", kind, (ALL, *FAILURE_CLASSES))
    arguments.at_once = arguments.at_once or 0
    return arguments


def _run_command(arguments: argparse.Namespace, argv: list[str]) -> int:
    from aem_exp.sweep import question, sweep_file

    if arguments.sweep is None:
        for name, text in sweep_file.list_sweeps().items():
            print(f"{name:<22} {text}")
        return 0
    cli.add_user_modules(arguments.config_dir)
    typed = shlex.join(["python", "-m", "aem_exp.sweep", *argv])
    sweep = question.load(arguments.sweep, arguments.overrides, arguments.config_dir)
    return execute_sweep(sweep, arguments, typed)


def execute_sweep(sweep: "Sweep", arguments: argparse.Namespace, typed: str) -> int:
    """Show the plan of a sweep, then submit or run its missing cells as `arguments` say. `typed` is the command line."""
    from aem_exp.cluster import run_state
    from aem_exp.jobs import dispatch
    from aem_exp.rundir import archive
    from aem_exp.sweep import plan

    if sweep.search is not None:
        if arguments.archives:
            raise ConfigError(
                "--from", str(arguments.archives), "is not available for a study, whose cells are not known in advance"
            )
        return _execute_study(sweep, arguments, typed)
    states = run_state.read([cell.folder for cell in sweep.cells])
    if arguments.archives:
        archived = archive.read_folder(
            arguments.archives, [folder for folder in states if states[folder].what != "done"]
        )
        states |= {folder: run_state.RunState(run_state.RunStatus.DONE) for folder, run in archived.items() if run.done}
    todo = [cell for cell in sweep.cells if should_run(states[cell.folder], arguments.retry)]
    if arguments.json:
        print(json.dumps(plan.plan_as_json(sweep, states, todo), indent=1))
        return 0
    if arguments.submit or arguments.local:
        experiments = [cell.experiment for cell in todo]
        dispatch.check_can_start(experiments, arguments.submit, outputs_folder(sweep))
    plan.show_plan(sweep, states, todo)
    if not (arguments.submit or arguments.local):
        print(f"\nnext    {_next_command(sweep, todo, typed, arguments)}")
        return 0
    return _start_cells(sweep, todo, arguments)


def _start_cells(sweep: "Sweep", todo: Sequence["SweepCell"], arguments: argparse.Namespace) -> int:
    """Submit or run the missing cells; return the exit code."""
    record_membership(sweep)
    if todo and arguments.submit:
        submit_cells(sweep, todo, arguments.at_once, print)
    save_views(
        sweep, print
    )  # after the submission, as importing MLflow takes seconds; before local runs, which take minutes
    code = 0
    if not todo:
        print("\nno cell is missing")
    elif arguments.local:
        code = run_cells(todo, arguments.at_once, partial(print, flush=True))
    complete = sweep.file is not None and (not todo or (arguments.local and not code))
    print(f"next    {_report_command(arguments) if complete else f'python -m aem_exp.status {sweep.name}'}")
    return code


def _execute_study(sweep: "Sweep", arguments: argparse.Namespace, typed: str) -> int:
    """Show and run a study, whose cells are not known in advance."""
    from aem_exp.jobs import dispatch
    from aem_exp.sweep import study_space, study_submit

    study = study_space.from_sweep(sweep, arguments.overrides, arguments.config_dir)
    if (arguments.submit or arguments.local) and not arguments.json:
        dispatch.check_can_start([study.base], arguments.submit, study.outputs)
        save_views(sweep, print)
    return study_submit.execute_study(study, arguments, typed, print)


def _report_command(arguments: argparse.Namespace) -> str:
    """The command that compares the runs."""
    own = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    own += ["--from", str(arguments.archives)] if arguments.archives else []
    return shlex.join(["python", "-m", "aem_exp.report", arguments.sweep, *arguments.overrides, *own])


def _next_command(sweep: "Sweep", todo: Sequence["SweepCell"], typed: str, arguments: argparse.Namespace) -> str:
    """The command that the user most likely needs next."""
    if not todo:
        return _report_command(arguments) if sweep.file else f"python -m aem_exp.status {sweep.name}"
    return f"{typed} {'--submit' if todo[0].experiment.launch.where == 'slurm' else '--local'}"
