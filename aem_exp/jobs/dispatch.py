"""From experiments to jobs: checks them, writes their run directories with the code, and submits them to SLURM or runs
them in local processes.
"""

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
from aem_exp.cluster import slurm
from aem_exp.cluster.signals import PRESS_AGAIN, Signals
from aem_exp.config import Experiment
from aem_exp.core import cli, disk, extras
from aem_exp.core.console import format_duration
from aem_exp.core.errors import ConfigError, MissingOnThisMachine
from aem_exp.jobs import fit
from aem_exp.rundir import EXPERIMENT, RESULT, attempts
from aem_exp.rundir.lock import describe_owner

LOCAL_LOG = "local.log"  # of a process that is started here
PrintLine = Callable[[str], None]


def submit_runs(experiments: Sequence[Experiment], name: str, logs: Path, at_once: int = 0) -> list[tuple[Path, str]]:
    """Submit experiments of one size as one array; the run dirs and their jobs.

    Raises:
        ConfigError: something is missing that a job could not fetch, or SLURM refuses; nothing was submitted.
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
    """Refuse what can neither be submitted from here nor, where that is asked, be run here; before anything is written.

    Raises:
        ConfigError: which launch is wrong, that there is no SLURM, that this Python cannot train, or that the folder of the
            runs takes no files.
    """
    _require_training(experiments, submit)
    for experiment in experiments:
        if not submit:
            config.check_machine(experiment)
            if experiment.launch.gpus_per_node:
                from aem_exp import policy

                policy.select_device(experiment.launch)
        elif experiment.launch.where != "slurm":
            remedy = "runs here; to submit, choose one for SLURM, such as launch=slurm_cpu or launch=slurm1; or --local"
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
    """Run experiments, by their names, on this machine, with the code as it is now; how many failed. See `run_processes`."""
    folders = _write_run_dirs(list(experiments.values()))
    names = dict(zip(folders, experiments, strict=True))

    def explain_failure(folder: Path, code: int, last_line: str) -> str:
        return "" if (folder / RESULT).exists() else last_line.removeprefix("aem_exp: ")

    print_line(f"logs    {folders[0].parent}/*/{LOCAL_LOG}")
    return run_processes("aem_exp.run", folders, at_once, print_line, explain_failure, names)


ExplainFailure = Callable[
    [Path, int, str], str
]  # folder, exit code, the last line that was printed -> why it failed, or nothing


def run_processes(
    module: str,
    folders: Sequence[Path],
    at_once: int,
    print_line: PrintLine,
    explain_failure: ExplainFailure,
    names: Mapping[Path, str],
) -> int:
    """`python -m MODULE FOLDER` for each folder, in processes of their own, so many at a time; how many failed.

    Each end is printed, with the time that is left for the others. Interrupted, it asks those that run to save and end, and
    waits for them.
    """
    waiting, live = list(folders), dict[subprocess.Popen[bytes], Path]()
    estimate = _TimeEstimate(len(folders), at_once)
    with Signals():  # TERM ends as Ctrl-C does
        try:
            while waiting or live:
                while waiting and len(live) < at_once:
                    folder = waiting.pop(0)
                    print_line(f"start   {names[folder]}")
                    estimate.begin(folder)
                    live[_start_process(module, folder)] = folder
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
    """How many processes have ended, how long they took, and how long the others will."""

    def __init__(self, count: int, at_once: int) -> None:
        self.all, self.at_once, self.done, self.failed = count, at_once, 0, 0
        self._begun: dict[Path, float] = {}
        self._took: list[float] = []

    def begin(self, folder: Path) -> None:
        self._begun[folder] = time.monotonic()

    def end(self, folder: Path, failed: bool, waiting: int) -> tuple[str, str]:
        """The time that it took, and the time that is left, in words; the latter is empty where it is not known."""
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
    """The success of a finished run before and after its training, where the folder is one."""
    if not (folder / RESULT).exists():
        return ""
    result = json.loads((folder / RESULT).read_text())
    before, after, final = (result[when]["success"] for when in ("before", "after", "final"))
    panel, last = (result[when]["panel"].partition("[")[0] for when in ("after", "final"))
    return f"{panel} {before:.0%} -> {after:.0%}, {last} {final:.0%}, "


def _stop_processes(live: Sequence["subprocess.Popen[bytes]"], print_line: PrintLine) -> None:
    """Ask processes to save and end, and wait for them. Another Ctrl-C asks them to leave at once; a third kills them."""
    if live:
        print_line(f"stopping: {len(live)} at work save at the end of their step; {PRESS_AGAIN}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with suppress(KeyboardInterrupt):
            for process in live:
                process.send_signal(number)
            for process in live:
                process.wait()
            return


def _start_process(module: str, folder: Path) -> "subprocess.Popen[bytes]":
    """A process with the code that lies in its folder; Ctrl-C is for its parent."""
    path = os.pathsep.join(filter(None, (str(folder / provenance.CODE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}
    environment.setdefault("PYTHONSAFEPATH", cli.JOB_SAFE_PATH)  # not this folder before the code
    command = [sys.executable, "-u", "-m", module, str(folder)]
    with (folder / LOCAL_LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "no output")


def check_worlds(experiments: Sequence[Experiment]) -> None:
    """Refuse worlds that a job could not open, and functions that would fail in it; what many experiments share is tried once.

    Raises:
        ConfigError: with the command that helps.
    """
    from aem_exp.jobs import dry_run, preflight

    for experiment in {repr((e.baseline, e.modulation.lam)): e for e in experiments}.values():
        dry_run.check_functions(experiment)
    distinct = {
        repr((e.env.make, e.model.make, e.evaluation, e.trainer.tasks_per_step, e.trainer.oversample)): e
        for e in experiments
    }
    for experiment in distinct.values():
        try:
            preflight.open_checked_world(experiment)
        except MissingOnThisMachine:
            continue
        except ConfigError:
            raise
        except Exception as error:  # a world's own, of any kind
            problem = f"its world cannot be opened: {attempts.describe_error(error)}"
            raise ConfigError("env.make", experiment.env.make["_target_"], problem) from error


def check_prepared(experiment: Experiment) -> None:
    """Refuse what a job would refuse, or would have to fetch.

    Raises:
        ConfigError: with the command that helps.
    """
    from aem_exp import policy
    from aem_exp.tracking import store_uri

    if experiment.model.path:
        policy.locate(experiment.model)
        fit.check_memory(experiment)
        fit.check_disk(experiment)
    folder = config.run_dir(experiment)
    store_uri.probe(store_uri.resolve_uri(experiment.tracking, folder.parent))
    disk.check_writable(folder.parent, "outputs")


def describe_active_job(folder: Path) -> str | None:
    """The live process that runs it, or its job in the queue; None where there is neither."""
    if owner := describe_owner(folder):
        return owner
    job = slurm.read_job_record(folder).get("job")
    status = slurm.query_jobs([job]).get(job) if job else None
    return f"job {status.id}, {status.state.lower()}" if status and status.is_live else None


def _write_run_dirs(experiments: Sequence[Experiment]) -> list[Path]:
    """The run dirs, with what the jobs need: the experiment, and the code that runs it."""
    runs = {config.run_dir(experiment): experiment for experiment in experiments}
    provenance.freeze_code(runs)
    for folder, experiment in runs.items():
        disk.write_atomically(folder / EXPERIMENT, json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return list(runs)
