"""Submits the workers of a study: one for each missing trial, and lost workers again."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aem_exp.core import disk
from aem_exp.sweep.study import open_study, tell_failure
from aem_exp.sweep.study_spec import STUDY_FILE, TRIAL_FILE, PrintLine, Study, read_card
from aem_exp.sweep.study_status import read_status, show_status, status_as_json

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TRIAL_MODULE: Final = "aem_exp.trial"  # what a worker runs
MAX_RETRIES: Final = 2  # of a trial whose worker was lost
MAX_KILLS: Final = 3  # a worker that was killed so often in a row at the same step counts as lost


def execute_study(study: Study, arguments: argparse.Namespace, typed: str, print_line: PrintLine) -> int:
    """Show the state of the study, then submit or run its missing trials as `arguments` say. `typed` is the command line."""
    status = read_status(study)
    if arguments.json:
        print_line(json.dumps(status_as_json(status), indent=1))
        return 0
    show_status(status, print_line)
    if arguments.submit or arguments.local:
        return _run_missing(study, arguments, print_line)
    todo = status.missing_count - status.pending_count + len(status.orphaned_trials)
    flag = "--submit" if study.base.launch.where == "slurm" else "--local"
    print_line(f"\nnext     {f'{typed} {flag}' if todo > 0 else f'python -m aem_exp.status {study.name}'}")
    return 0


def _run_missing(study: Study, arguments: argparse.Namespace, print_line: PrintLine) -> int:
    """Submit or run the missing trials; return the exit code."""
    from aem_exp.cluster import slurm
    from aem_exp.jobs import dispatch

    dispatch.check_worlds([study.base])
    dispatch.check_prepared(study.base)
    with study.lock():
        workers = _reconcile_workers(study, arguments.retry)
        if arguments.submit and workers:
            logs, launch = study.folder / "logs", study.base.launch
            ids = slurm.submit(workers, launch, study.name, logs, arguments.at_once, module=TRIAL_MODULE)
            print_line(f"sent     {len(ids)} workers as job {ids[0].partition('_')[0]}; logs in {logs}")
    if not workers:
        print_line("\nno trial is missing")
    failed = 0
    if arguments.local and workers:
        failed = _run_workers(workers, max(1, arguments.at_once), print_line)
        show_status(read_status(study), print_line)
    print_line(f"next     python -m aem_exp.status {study.name}")
    return 1 if failed else 0


def _run_workers(workers: Sequence[Path], at_once: int, print_line: PrintLine) -> int:
    """Run workers on this machine; return the number of failures."""
    from aem_exp.jobs import dispatch

    def explain_failure(worker: Path, code: int, last_line: str) -> str:
        if not code:
            print_line(f"{worker.name}: {last_line}")
        return last_line if code else ""

    names = {worker: worker.name for worker in workers}
    return dispatch.run_processes(TRIAL_MODULE, workers, at_once, print_line, explain_failure, names)


def _reconcile_workers(study: Study, retry: Sequence[str]) -> list[Path]:
    """Fail the trials whose workers were lost, and enqueue retries; return the workers to start."""
    restarted = _settle_trials(study, retry)
    status = read_status(study)
    count = max(0, status.missing_count - status.pending_count)
    first = 1 + max((int(path.name.rpartition("-")[2]) for path in study.folder.glob("worker-*")), default=-1)
    fresh = [*status.idle_workers, *(study.folder / f"worker-{first + i:03d}" for i in range(count))][:count]
    return [_prepare_worker(study, worker) for worker in (*restarted, *fresh)]


def _settle_trials(study: Study, retry: Sequence[str]) -> list[Path]:
    """Record lost trials as failed, and enqueue their retries; return the workers to start again."""
    opened, restarted = open_study(study), list[Path]()
    status = read_status(study)
    for trial in status.orphaned_trials:
        worker = status.workers_by_trial.get(trial.number)
        why = "its worker folder does not exist" if worker is None else _stuck_reason(study, trial)
        if worker is not None and why is None:
            restarted.append(worker)
            continue
        tell_failure(opened, trial, "killed", str(why))
        if (retries := trial.user_attrs.get("retries", 0)) < MAX_RETRIES:
            opened.enqueue_trial(trial.params, {"instead_of": trial.number, "retries": retries + 1})
    for trial in status.trials_in_state("FAIL"):
        if trial.user_attrs.get("class") in retry or "all" in retry:
            opened.enqueue_trial(trial.params, {"instead_of": trial.number})
    return restarted


def _stuck_reason(study: Study, trial: "FrozenTrial") -> str | None:
    """The reason not to start the worker of this trial again, or None."""
    from aem_exp.rundir import attempts

    name = trial.user_attrs.get("run")
    events = attempts.read(study.outputs / name)[-MAX_KILLS:] if name else []
    if len(events) < MAX_KILLS or {(event["event"], event["step"]) for event in events} != {
        ("start", events[0]["step"])
    }:
        return None
    return f"its process was killed {MAX_KILLS} times at step {events[0]['step']}"  # starts without an end


def _prepare_worker(study: Study, worker: Path) -> Path:
    """Write the folder of a worker. A worker with a trial keeps the code with which the trial began."""
    from aem_exp import provenance
    from aem_exp.core.errors import redact

    has_trial = "number" in read_card(worker)
    worker.mkdir(parents=True, exist_ok=True)
    if not has_trial:
        (worker / TRIAL_FILE).unlink(missing_ok=True)
        provenance.freeze_code({worker: study.base})
        if study.config_dir:
            shutil.rmtree(worker / "config", ignore_errors=True)
            shutil.copytree(study.config_dir, worker / "config", ignore=_ignore_non_yaml)
    spec = {
        "question": study.question,
        "overrides": study.overrides,
        "search": asdict(study.search),
        "storage": redact(study.storage_url or ""),
    }
    disk.write_atomically(worker / STUDY_FILE, json.dumps(spec, indent=1) + "\n")
    return worker


def _ignore_non_yaml(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".yaml") and not (Path(folder) / name).is_dir()]
