"""Command `python -m aem_exp.trial WORKER_DIR`: one worker of a study.

It asks the storage for a trial, runs it, reports its metric at each evaluation, stops it if the pruner says so, and records the
result. A restarted worker resumes its own trial from the newest checkpoint.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aem_exp import config
from aem_exp.cluster import slurm
from aem_exp.config import Experiment
from aem_exp.core import cli, disk, extras
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.core.typed import build_from_mapping
from aem_exp.sweep.study import (
    ask,
    drop_replaced_trials,
    find_finished_duplicate,
    open_study,
    reopen_trial,
    tell,
    tell_failure,
)
from aem_exp.sweep.study_space import parameter_values
from aem_exp.sweep.study_spec import STUDY_FILE, TRIAL_FILE, PrintLine, Search, Study, read_card


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run_cli(
        lambda: _run_command(_parse_arguments(argv), print), lambda: "to continue, run the command of the sweep again"
    )


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = "Run one trial of a study. python -m aem_exp.sweep submits this command."
    parser = cli.Parser("python -m aem_exp.trial", description=about, allow_abbrev=False)
    parser.add_argument("worker_dir", type=Path)
    return parser.parse_args(argv)


def _run_command(arguments: argparse.Namespace, print_line: PrintLine) -> int:
    from aem_exp.cluster import distributed
    from aem_exp.core import console
    from aem_exp.jobs import dispatch
    from aem_exp.rundir import lock

    worker = arguments.worker_dir.expanduser().absolute()
    cli.add_frozen_modules(worker)
    console.silence_libraries()
    study = read_study(worker)
    config.check_machine(study.base)
    extras.require_training("launch", study.base.launch.name, "a trial")
    if not distributed.is_main_process():
        return _run_other_rank(worker, study)
    dispatch.check_prepared(study.base)  # before a trial is taken, so that a missing resource does not fail the trial
    try:
        with lock.hold_run_lock(worker):
            return _run_rank_zero(worker, study, print_line)
    except lock.RunLocked as locked:
        print_line(str(locked))
        return 0


def read_study(worker: Path) -> Study:
    """Read the study of a worker.

    Raises:
        ConfigError: the folder is not a worker, or the storage differs from the one at submission.
    """
    from aem_exp.core.errors import redact

    file = worker / STUDY_FILE
    if not file.is_file():
        raise ConfigError("WORKER_DIR", str(worker), f"must be the folder of a worker, which contains {STUDY_FILE}")
    spec, configs = json.loads(file.read_text()), worker / "config"
    os.environ.pop("AEM_ROOT", None)  # use the conf/ that was frozen with the code
    search = build_from_mapping(Search, spec["search"], "search")
    study = Study(
        worker.parent, spec["question"], tuple(spec["overrides"]), configs if configs.is_dir() else None, search
    )
    if redact(study.storage_url or "") != spec["storage"]:
        remedy = f"was {spec['storage'] or 'not set'} at submission; check that the job inherits the environment"
        raise ConfigError("AEM_STUDY", redact(study.storage_url or "") or None, remedy)
    return study


def _run_rank_zero(worker: Path, study: Study, print_line: PrintLine) -> int:
    """Take a trial, run it and record its result. Only rank 0 does this; it notifies the other ranks through a file."""
    opened = open_study(study)
    number = _take_trial(worker, study, opened)
    if number is None:
        _notify_other_ranks(worker, {"play": False})
        print_line("no trial is missing")
        return 0
    frozen = opened.get_trials(deepcopy=False)[number]
    if frozen.state.is_finished():  # killed after the result was recorded
        _notify_other_ranks(worker, {"play": False})
        print_line(f"trial {number} has ended: {frozen.state.name.lower()}")
        return 0
    trial = reopen_trial(opened, frozen)
    try:
        experiment = study.experiment(parameter_values(frozen))
        _record_membership(study, opened, trial, experiment)
    except ConfigError as error:
        tell_failure(opened, frozen, "config", str(error))
        raise
    print_line(f"trial    {number}: {' '.join(f'{key}={value}' for key, value in parameter_values(frozen).items())}")
    print_line(f"run      {config.run_dir(experiment)}")
    return _run_trial(worker, study, opened, trial, experiment, print_line)


def _take_trial(worker: Path, study: Study, opened: Any) -> int | None:
    """The number of the worker's trial, existing or new; None if no trial is missing."""
    card = read_card(worker)
    if "number" in card:
        return int(card["number"])
    with study.lock():
        trial = ask(study, opened)
        if trial is None:
            return None
        disk.write_atomically(worker / TRIAL_FILE, json.dumps({"number": trial.number, "id": trial._trial_id}) + "\n")
        return trial.number


def _record_membership(study: Study, opened: Any, trial: Any, experiment: Experiment) -> None:
    """Record which runs belong to the study, for status and MLflow."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, views

    folder = config.run_dir(experiment)
    with study.lock():
        trial.set_user_attr("run", folder.name)
        rows = [
            {
                "run": t.user_attrs["run"],
                "arm": f"trial {t.number}",
                "group": f"trial {t.number}",
                "seed": experiment.seed,
            }
            for t in drop_replaced_trials(opened.get_trials(deepcopy=False))
            if "run" in t.user_attrs
        ]
        membership.write(study.outputs, study.name, study.question, rows)
    folder.mkdir(parents=True, exist_ok=True)
    group = f"trial {trial.number}"
    if membership.add_label(folder, study.name, group):
        publish.add_tags(folder, {views.sweep_tag(study.name): group})


def _run_trial(
    worker: Path, study: Study, opened: Any, trial: Any, experiment: Experiment, print_line: PrintLine
) -> int:
    """Run the trial and record its result. An interrupted trial stays open, and its job is requeued."""
    from aem_exp.cluster import distributed
    from aem_exp.cluster.signals import Interrupted, Pruned
    from aem_exp.run import execution
    from aem_exp.rundir import attempts, lock

    while True:
        if (other := find_finished_duplicate(opened, trial)) is not None:
            _notify_other_ranks(worker, {"play": False})
            for step, value in other.intermediate_values.items():
                trial.report(value, step)
            return tell(opened, trial, other.state.name, other.value, print_line)
        _notify_other_ranks(
            worker, {"play": True, "values": parameter_values(opened.get_trials(deepcopy=False)[trial.number])}
        )
        try:
            with _make_progress() as line:
                execution.run(experiment, _TrialReporter(opened, trial, study.search.metric, line))
            return tell(opened, trial, "COMPLETE", _final_value(study, config.run_dir(experiment)), print_line)
        except Pruned:
            return tell(opened, trial, "PRUNED", None, print_line)
        except Interrupted as stop:
            print_line(f"{stop}; the trial stays open")
            slurm.requeue_and_wait(stop.signal)
            raise
        except lock.RunLocked as locked:  # a trial with the same parameters runs in this run directory
            if distributed.world_size() > 1:
                raise RunError(str(locked)) from locked
            _wait_for_duplicate(print_line)
        except Exception as error:
            tell_failure(
                opened,
                opened.get_trials(deepcopy=False)[trial.number],
                attempts.classify_error(error),
                attempts.describe_error(error),
            )
            raise


def _run_other_rank(worker: Path, study: Study) -> int:
    """Wait until rank 0 has taken a trial, then take part in its run."""
    from aem_exp.cluster.signals import Interrupted, Pruned
    from aem_exp.run import execution

    while (card := read_card(worker)).get("start") != _start_id():
        time.sleep(0.5)
    if card["play"]:
        try:
            with suppress(Pruned):
                execution.run(study.experiment(card["values"]))
        except Interrupted as stop:
            slurm.requeue_and_wait(stop.signal)
            raise
    return 0


def _notify_other_ranks(worker: Path, news: dict[str, Any]) -> None:
    disk.write_atomically(worker / TRIAL_FILE, json.dumps({**read_card(worker), "start": _start_id(), **news}) + "\n")


def _start_id() -> str:
    """An id of this start of this job."""
    return f"{os.environ.get('SLURM_JOB_ID', os.getpid())}/{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _make_progress() -> Any:
    from aem_exp.run import progress

    return progress.Progress()


class _TrialReporter:
    """Callback of a run: reports the metric to the storage and returns whether to prune. Step 0 is not reported."""

    def __init__(self, opened: Any, trial: Any, metric: str, line: Any):
        self.trial, self.metric, self.line = trial, metric, line
        self.reported = set(opened.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def __call__(self, step: int, steps: int, row: dict[str, float]) -> bool:
        self.line(step, steps, row)
        if self.metric not in row:
            self._check_metric(row)
            return False
        if step > 0 and step not in self.reported:
            self.trial.report(row[self.metric], step)
            self.reported.add(step)
        return 0 < step < steps and self.trial.should_prune()  # pruning at the last step would save nothing

    def _check_metric(self, row: Mapping[str, float]) -> None:
        """Raise at the first evaluation if the metric does not exist, not only at the end of the run."""
        names = [name for name in row if name.startswith("eval/")]
        if names and self.metric.startswith("eval/"):
            raise ConfigError("search.metric", self.metric, names)


def _final_value(study: Study, folder: Path) -> float:
    """The value of a finished trial: the last value of its metric."""
    from aem_exp.rundir import metrics

    name, rows = metrics.sanitise_name(study.search.metric), metrics.read(folder)
    values = [row[name] for row in rows if name in row]
    if not values:
        raise ConfigError(
            "search.metric", study.search.metric, sorted({key for row in rows for key in row if "/" in key})
        )
    if not math.isfinite(values[-1]):
        raise RunError(f"{study.search.metric} is {values[-1]} at the end", "nan")
    return values[-1]


def _wait_for_duplicate(print_line: PrintLine, seconds: float = 2.0) -> None:
    from aem_exp.cluster.signals import Signals

    print_line("another trial with the same parameters is running; waiting for its result")
    with Signals():
        time.sleep(seconds)
