"""How far a study is: its trials and workers, what is missing, and the best trial; for people and for programs."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.sweep.study import count_missing, drop_replaced_trials, load_trials
from aem_exp.sweep.study_space import parameter_values
from aem_exp.sweep.study_spec import PrintLine, Study, read_card

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class StudyStatus:
    """Trials, without those that another stands in for, and workers."""

    study: Study
    trials: "list[FrozenTrial]"
    workers_by_trial: Mapping[int, Path]
    """Number of a trial -> its worker."""
    active_workers: frozenset[Path]
    """Workers that are at work, or in the queue."""
    idle_workers: tuple[Path, ...]
    """Workers that are not, and have no trial."""

    def trials_in_state(self, *names: str) -> "list[FrozenTrial]":
        return [trial for trial in self.trials if trial.state.name in names]

    @property
    def running_trials(self) -> "list[FrozenTrial]":
        return [
            trial
            for trial in self.trials_in_state("RUNNING")
            if self.workers_by_trial.get(trial.number) in self.active_workers
        ]

    @property
    def orphaned_trials(self) -> "list[FrozenTrial]":
        """Begun, and no active worker has them."""
        return [
            trial
            for trial in self.trials_in_state("RUNNING")
            if self.workers_by_trial.get(trial.number) not in self.active_workers
        ]

    @property
    def missing_count(self) -> int:
        """How many were never asked for, or are to be asked for again."""
        return count_missing(self.study, self.trials)

    @property
    def pending_count(self) -> int:
        """How many of those active workers will ask for."""
        return len(self.active_workers - set(self.workers_by_trial.values()))

    @property
    def best_trial(self) -> "FrozenTrial | None":
        up = 1 if self.study.search.direction == "maximize" else -1
        return max(self.trials_in_state("COMPLETE"), key=lambda trial: up * (trial.value or 0.0), default=None)


def read_status(study: Study) -> StudyStatus:
    """The study as it is now."""
    from aem_exp.cluster import run_state
    from aem_exp.cluster.run_state import RunStatus

    workers = sorted(study.folder.glob("worker-*"))
    states = run_state.read(workers)
    active = frozenset(worker for worker in workers if states[worker].what in (RunStatus.RUNNING, RunStatus.QUEUED))
    cards = {worker: read_card(worker) for worker in workers}
    by_trial = {card["number"]: worker for worker, card in cards.items() if "number" in card}
    idle = tuple(worker for worker in workers if worker not in active and "number" not in cards[worker])
    return StudyStatus(study, drop_replaced_trials(load_trials(study)), by_trial, active, idle)


def show_status(status: StudyStatus, print_line: PrintLine) -> None:
    """Print the space, how many trials are in which state, and the best one."""
    study, search = status.study, status.study.search
    print_line(f"{study.name}  {study.question}")
    for i, (key, text) in enumerate(search.space.items()):
        print_line(f"{'' if i else 'space':<8} {key}: {text}")
    counts = {
        "complete": status.trials_in_state("COMPLETE"),
        "pruned": status.trials_in_state("PRUNED"),
        "running": status.running_trials,
    }
    counts |= {"stopped": status.orphaned_trials, "failed": status.trials_in_state("FAIL")}
    counted = ", ".join(f"{len(trials)} {name}" for name, trials in counts.items())
    waiting = f" ({status.pending_count} on the way)" if status.pending_count else ""
    print_line(f"trials   {counted}, {status.missing_count} missing{waiting}, of {search.trials}")
    for trial in status.trials_in_state("FAIL"):
        print_line(
            f"         trial {trial.number}: {trial.user_attrs.get('class')}: {trial.user_attrs.get('sentence')}"
        )
    if status.best_trial is None:
        return
    _show_best(status, status.best_trial, print_line)


def _show_best(status: StudyStatus, best: "FrozenTrial", print_line: PrintLine) -> None:
    """Print the best trial; where all have ended, also the command that runs it again."""
    study, search = status.study, status.study.search
    values = " ".join(f"{key}={value}" for key, value in parameter_values(best).items())
    print_line(f"best     trial {best.number}: {search.metric}={best.value:.4g} with {values}")
    if not status.missing_count and not status.trials_in_state("RUNNING"):
        where = ["--config-dir", str(study.config_dir)] if study.config_dir else []
        command = shlex.join(["python", "-m", "aem_exp", *study.trial_overrides(parameter_values(best)), *where])
        panel = study.base.evaluation.panel
        print_line(f"         {command}")
        print_line(
            f"         chosen on {panel}, so {panel} flatters it: compare it by {study.base.evaluation.final}, with new seeds"
        )


def status_as_json(status: StudyStatus) -> dict[str, Any]:
    orphaned = {trial.number for trial in status.orphaned_trials}
    return {
        "sweep": status.study.name,
        "question": status.study.question,
        "missing": status.missing_count,
        "best": status.best_trial.number if status.best_trial else None,
        "trials": [
            {
                "trial": trial.number,
                "state": "stopped" if trial.number in orphaned else trial.state.name.lower(),
                "value": trial.value,
                "parameters": parameter_values(trial),
                "run": str(status.study.outputs / trial.user_attrs["run"]) if "run" in trial.user_attrs else None,
                "class": trial.user_attrs.get("class"),
                "why": trial.user_attrs.get("sentence"),
            }
            for trial in status.trials
        ],
    }
