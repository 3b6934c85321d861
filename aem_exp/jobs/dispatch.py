"""Turns experiments into jobs: checks them, writes their run directories with the code, and submits or runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from aem_exp import config, provenance
from aem_exp.cluster import node_memory, slurm
from aem_exp.cluster.signals import PRESS_AGAIN, Signals
from aem_exp.config import Experiment
from aem_exp.core import cli, disk, extras
from aem_exp.core.console import format_duration
from aem_exp.core.errors import ConfigError, MissingOnThisMachine
from aem_exp.jobs import fit
from aem_exp.rundir import EXPERIMENT, RESULT, attempts
from aem_exp.rundir.lock import describe_owner

LOCAL_LOG = "local.log"  # in a run directory: the output of a local process
PrintLine = Callable[[str], None]


def submit_runs(experiments: Sequence[Experiment], name: str, logs: Path, at_once: int = 0) -> list[tuple[Path, str]]:
    """Submit experiments with the same launch as one array; return run directories and job ids.

    Raises:
        ConfigError: a world, model or data file is missing or invalid, or SLURM rejects the job. Nothing was submitted.
    """
    _require_training(experiments, submit=True)
    slurm.check_available()
    check_worlds(experiments)
    for experiment in experiments:
        check_prepared(experiment)
    folders = _write_run_dirs(experiments)
    ids = slurm.submit(folders, experiments[0].launch, name, logs, at_once)
    return list(zip(folders, ids, strict=True))


def check_can_start(experiments: Sequence[Experiment], submit: bool, outputs: Path) -> None:
    """Check, before anything is written, that experiments can be submitted from this machine or run on it.

    Raises:
        ConfigError: the launch does not match, SLURM or the extra `train` is missing, or the outputs folder is not writable.
    """
    _require_training(experiments, submit)
    for experiment in experiments:
        if not submit:
            config.check_machine(experiment)
            if experiment.launch.gpus_per_node:
                from aem_exp import policy

                policy.select_device(experiment.launch)
        elif experiment.launch.where != "slurm":
            remedy = "runs on this machine; to submit, choose a SLURM launch such as launch=slurm_cpu or launch=slurm1"
            remedy += "; to run here, use --local"
            raise ConfigError("launch", experiment.launch.name, remedy)
    if submit and experiments:
        slurm.check_available()
    disk.check_writable(outputs, "outputs")


def _require_training(experiments: Sequence[Experiment], submit: bool) -> None:
    """Refuse to start runs with a Python that cannot train; a job runs the Python that submits it."""
    if experiments:
        subject = "a job runs this Python, which" if submit else "a run"
        extras.require_training("launch", experiments[0].launch.name, subject)


def run_locally(experiments: Mapping[str, Experiment], at_once: int, print_line: PrintLine) -> int:
    """Run named experiments on this machine with the current code; return the number of failures. See `run_processes`."""
    folders = _write_run_dirs(list(experiments.values()))
    names = dict(zip(folders, experiments, strict=True))

    def explain_failure(folder: Path, code: int, last_line: str) -> str:
        return "" if (folder / RESULT).exists() else last_line.removeprefix("aem_exp: ")

    print_line(f"logs    {folders[0].parent}/*/{LOCAL_LOG}")
    return run_processes("aem_exp.run", folders, at_once, print_line, explain_failure, names)


ExplainFailure = Callable[[Path, int, str], str]  # (folder, exit code, last printed line) -> reason of failure, or ""


def run_processes(
    module: str,
    folders: Sequence[Path],
    at_once: int,
    print_line: PrintLine,
    explain_failure: ExplainFailure,
    names: Mapping[Path, str],
) -> int:
    """Run `python -m MODULE FOLDER` for each folder, `at_once` at the same time; return the number of failures.

    Prints each result with the estimated remaining time. On an interrupt, it asks the running processes to save and end, and
    waits for them.
    """
    waiting, live = list(folders), dict[subprocess.Popen[bytes], Path]()
    estimate = _TimeEstimate(len(folders), at_once)
    with Signals():  # SIGTERM raises, as Ctrl-C does
        try:
            while waiting or live:
                while waiting and len(live) < at_once:
                    folder = waiting.pop(0)
                    print_line(f"start   {names[folder]}")
                    estimate.begin(folder)
                    live[_start_process(module, folder, min(at_once, len(folders)))] = folder
                time.sleep(0.2)
                for process in [process for process in live if process.poll() is not None]:
                    folder = live.pop(process)
                    why = explain_failure(folder, process.returncode, _last_line(folder / LOCAL_LOG))
                    took, left = estimate.end(folder, failed=bool(why), waiting=len(waiting))
                    end = f"failed: {why}" if why else f"{_format_success(folder)}{took}"
                    print_line(f"{f'{estimate.done}/{estimate.all}':<7} {names[folder]}: {end}{left}")
        except BaseException:
            _stop_processes(list(live), print_line)
            raise
    return estimate.failed


class _TimeEstimate:
    """Counts finished processes and estimates the remaining time."""

    def __init__(self, count: int, at_once: int) -> None:
        self.all, self.at_once, self.done, self.failed = count, at_once, 0, 0
        self._begun: dict[Path, float] = {}
        self._took: list[float] = []

    def begin(self, folder: Path) -> None:
        self._begun[folder] = time.monotonic()

    def end(self, folder: Path, failed: bool, waiting: int) -> tuple[str, str]:
        """Texts of the time that the process took and of the remaining time; the latter is empty if unknown."""
        now = time.monotonic()
        seconds = now - self._begun.pop(folder)
        self.done, self.failed = self.done + 1, self.failed + failed
        if not failed:
            self._took.append(seconds)
        if not self._took or self.done == self.all:
            return format_duration(seconds), ""
        each = sum(self._took) / len(self._took)
        left = waiting * each + sum(max(0.0, each - (now - begun)) for begun in self._begun.values())
        return format_duration(
            seconds
        ), f"; about {format_duration(left / min(self.at_once, self.all - self.done))} left"


def _format_success(folder: Path) -> str:
    """The success of a finished run before and after training; "" if the folder has no result."""
    if not (folder / RESULT).exists():
        return ""
    result = json.loads((folder / RESULT).read_text())
    before, after, final = (result[when]["success"] for when in ("before", "after", "final"))
    panel, last = (result[when]["panel"].partition("[")[0] for when in ("after", "final"))
    return f"{panel} {before:.0%} -> {after:.0%}, {last} {final:.0%}, "


def _stop_processes(live: Sequence["subprocess.Popen[bytes]"], print_line: PrintLine) -> None:
    """Ask processes to save and end, and wait for them. A second Ctrl-C ends them immediately; a third kills them."""
    if live:
        print_line(f"stopping: {len(live)} running, each saves at the end of its step; {PRESS_AGAIN}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with suppress(KeyboardInterrupt):
            for process in live:
                process.send_signal(number)
            for process in live:
                process.wait()
            return


def _start_process(module: str, folder: Path, at_once: int) -> "subprocess.Popen[bytes]":
    """Start a process with the code in its folder, in its own session, so that Ctrl-C reaches only the parent."""
    path = os.pathsep.join(filter(None, (str(folder / provenance.CODE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", node_memory.SHARED_BY: str(at_once)}
    environment.setdefault("PYTHONSAFEPATH", cli.JOB_SAFE_PATH)  # do not import from the current folder before the code
    command = [sys.executable, "-u", "-m", module, str(folder)]
    with (folder / LOCAL_LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "no output")


def check_worlds(experiments: Sequence[Experiment]) -> None:
    """Check the worlds and user-defined functions of experiments; what several experiments share is checked once.

    Raises:
        ConfigError: a world or function would fail in the job; with the command that helps.
    """
    from aem_exp.jobs import function_check, preflight

    for experiment in {repr((e.baseline, e.modulation.lam)): e for e in experiments}.values():
        function_check.check_functions(experiment)
    distinct = {}
    for e in experiments:
        settings = (
            e.env.make,
            e.model.make,
            e.warm_start.method,
            e.evaluation,
            e.trainer.tasks_per_step,
            e.trainer.oversample,
        )
        distinct[repr(settings)] = e
    for experiment in distinct.values():
        try:
            preflight.open_checked_world(experiment)
        except MissingOnThisMachine:
            continue
        except ConfigError:
            raise
        except Exception as error:  # raised by the world, of any type
            problem = f"the world cannot be opened: {attempts.describe_error(error)}"
            raise ConfigError("env.make", experiment.env.make["_target_"], problem) from error


def check_prepared(experiment: Experiment) -> None:
    """Check that weights, memory, disk, tracking store and outputs folder are ready for a job.

    Raises:
        ConfigError: something is missing; with the command that helps.
    """
    from aem_exp import policy
    from aem_exp.jobs import ram
    from aem_exp.tracking import store_uri

    if experiment.model.path:
        policy.locate(experiment.model)
        fit.check_memory(experiment)
        ram.check_ram(experiment)
        fit.check_disk(experiment)
    folder = config.run_dir(experiment)
    store_uri.probe(store_uri.resolve_uri(experiment.tracking, folder.parent))
    disk.check_writable(folder.parent, "outputs")


def describe_active_job(folder: Path) -> str | None:
    """The process that holds the run lock, or the queued job of a run; None if there is neither."""
    if owner := describe_owner(folder):
        return owner
    job = slurm.read_job_record(folder).get("job")
    status = slurm.query_jobs([job]).get(job) if job else None
    return f"job {status.id}, {status.state.lower()}" if status and status.is_live else None


def _write_run_dirs(experiments: Sequence[Experiment]) -> list[Path]:
    """Write the run directories with the experiment and its code."""
    runs = {config.run_dir(experiment): experiment for experiment in experiments}
    provenance.freeze_code(runs)
    for folder, experiment in runs.items():
        disk.write_atomically(folder / EXPERIMENT, json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return list(runs)
