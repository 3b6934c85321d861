"""`python -m aem_exp.run RUN_DIR`: run, or go on with, what a run dir holds, with a live line and a summary."""

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
    """Run with a live line, and show what there is at the end; the exit code.

    Args:
        header: printed first, unless the run is refused: then the reason is all that is printed.
    """
    console.silence_libraries()
    command = shlex.join(
        [sys.executable, "-m", "aem_exp.run", str(folder)]
    )  # from any folder, whatever the environment
    return cli.run_cli(
        lambda: _run_with_progress(experiment, folder, header),
        lambda: f"to go on from step {find_resume_point(folder).step}: {command}",
    )


def _run_with_progress(experiment: Experiment, folder: Path, header: Sequence[str]) -> int:
    from aem_exp.run import summary

    def begin() -> None:
        if distributed.is_main_process():
            print(*header, sep="\n", flush=True)

    if (folder / RESULT).exists():
        begin()
        for change in _changes_since_run(experiment, folder):
            print(f"note      since this run, {change}; to run again, move its folder away")
    else:
        try:
            with progress.Progress(enabled=distributed.is_main_process()) as line:
                run(experiment, line, folder, begin)
        except RunLocked as locked:
            begin()
            print(locked)
            return 0 if distributed.world_size() == 1 else 1  # the other processes of this job end with it
        except RunError as error:
            raise RunError(
                f"{error}. The run dir has all up to step {find_resume_point(folder).step}: {folder}", error.kind
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
    """What has changed since a finished run ran: its result stands for what it was."""
    try:
        weights = policy.locate(experiment.model) if experiment.model.path else None
    except ConfigError:  # moved away since
        weights = None
    return provenance.list_changes(folder, experiment, weights)


def main() -> int:
    return cli.run_cli(lambda: _run_command(_parse_arguments()))


def _parse_arguments() -> argparse.Namespace:
    about = "Run, or go on with, what a run dir holds."
    parser = cli.Parser("python -m aem_exp.run", description=about, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--inexact", action="store_true", help="go on though code, libraries or machine changed")
    parser.add_argument("--trust", action="store_true", help="run somebody else's config, which can call any function")
    return parser.parse_args()


def _run_command(arguments: argparse.Namespace) -> int:
    cli.add_frozen_modules(arguments.run_dir, arguments.trust)
    experiment, folder = config.read(arguments.run_dir, arguments.trust), arguments.run_dir.expanduser().absolute()
    if arguments.inexact:
        experiment = replace(experiment, resume="inexact")
    if distributed.is_main_process() and not (folder / RESULT).exists():
        disk.check_writable(folder, "RUN_DIR")
    return run_in_terminal(experiment, folder, [f"run       {folder}"])
