"""`python -m aem_exp.run RUN_DIR`: run or resume the experiment of a run directory, with a progress line and a summary."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aem_exp import config, policy, provenance
from aem_exp.cluster import distributed, slurm
from aem_exp.cluster.signals import Interrupted
from aem_exp.config.schema import Experiment
from aem_exp.core import cli, console, disk
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.run import progress
from aem_exp.run.execution import run
from aem_exp.run.resume import find_resume_point
from aem_exp.rundir import RESULT
from aem_exp.rundir.lock import RunLocked


def run_in_terminal(experiment: Experiment, folder: Path, header: Sequence[str]) -> int:
    """Run an experiment with a progress line, print the summary, and return the exit code.

    Args:
        header: lines printed first. If the run cannot start, only the error is printed.
    """
    console.silence_libraries()
    # Absolute paths: the command works in any folder and any environment.
    command = shlex.join([sys.executable, "-m", "aem_exp.run", str(folder)])
    return cli.run_cli(
        lambda: _run_with_progress(experiment, folder, header),
        lambda: f"to continue from step {find_resume_point(folder).step}: {command}",
    )


def _run_with_progress(experiment: Experiment, folder: Path, header: Sequence[str]) -> int:
    from aem_exp.run import summary

    def print_header() -> None:
        if distributed.is_main_process():
            print(*header, sep="\n", flush=True)

    if (folder / RESULT).exists():
        print_header()
        if changes := _changes_since_run(experiment, folder):
            print(*(f"note      since this run, {change}" for change in changes), sep="\n")
            print("note      to run it again with these changes, move the run directory away")
    else:
        try:
            with progress.Progress(enabled=distributed.is_main_process()) as line:
                run(experiment, line, folder, print_header)
        except RunLocked as locked:
            print_header()
            print(locked)
            return 0 if distributed.world_size() == 1 else 1  # an error ends the other processes of this job too
        except RunError as error:
            raise RunError(
                f"{error}. The run is saved up to step {find_resume_point(folder).step}: {folder}", error.kind
            ) from error
        except Interrupted as interruption:
            if distributed.is_main_process():
                step = find_resume_point(folder).step
                print(f"{interruption}; {f'step {step} is saved' if step else 'no step is saved yet'}", flush=True)
            slurm.requeue_and_wait(interruption.signal)
            raise
    if distributed.is_main_process():
        summary.print_summary(folder)
    return 0


def _changes_since_run(experiment: Experiment, folder: Path) -> list[str]:
    """Return the changes of code, libraries and weights since a finished run; its result belongs to the recorded ones."""
    try:
        weights = policy.locate(experiment.model) if experiment.model.path else None
    except ConfigError:  # the weights were moved since then
        weights = None
    return provenance.list_changes(folder, experiment, weights)


def main() -> int:
    return cli.run_cli(lambda: _run_command(_parse_arguments()))


def _parse_arguments() -> argparse.Namespace:
    about = "Run or resume the experiment of a run directory."
    parser = cli.Parser("python -m aem_exp.run", description=about, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("--inexact", action="store_true", help="resume even if code, libraries or machine have changed")
    parser.add_argument("--trust", action="store_true", help="run another user's config, which can call any function")
    return parser.parse_args()


def _run_command(arguments: argparse.Namespace) -> int:
    cli.add_frozen_modules(arguments.run_dir, arguments.trust)
    experiment, folder = config.read(arguments.run_dir, arguments.trust), arguments.run_dir.expanduser().absolute()
    if arguments.inexact:
        experiment = replace(experiment, resume="inexact")
    if distributed.is_main_process() and not (folder / RESULT).exists():
        disk.check_writable(folder, "RUN_DIR")
    return run_in_terminal(experiment, folder, [f"run       {folder}"])
