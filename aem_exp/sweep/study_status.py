"""The state of a study, as text or JSON: its trials and workers, the missing trials, and the best trial."""

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
    """The trials of a study, without those that a retry replaced, and its workers."""

    study: Study
    trials: "list[FrozenTrial]"
    workers_by_trial: Mapping[int, Path]
    """Trial number -> folder of its worker."""
    active_workers: frozenset[Path]
    """Workers that are running or queued."""
    idle_workers: tuple[Path, ...]
    """Workers that are not active and have no trial."""

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
        """Trials that were started and have no active worker."""
        return [
            trial
            for trial in self.trials_in_state("RUNNING")
            if self.workers_by_trial.get(trial.number) not in self.active_workers
        ]

    @property
    def missing_count(self) -> int:
        """The number of trials that were not asked for yet, or must be asked for again."""
        return count_missing(self.study, self.trials)

    @property
    def pending_count(self) -> int:
        """The number of active workers that have no trial yet and will ask for one."""
        return len(self.active_workers - set(self.workers_by_trial.values()))

    @property
    def best_trial(self) -> "FrozenTrial | None":
        up = 1 if self.study.search.direction == "maximize" else -1
        return max(self.trials_in_state("COMPLETE"), key=lambda trial: up * (trial.value or 0.0), default=None)


def read_status(study: Study) -> StudyStatus:
    """Read the current state of a study."""
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
    """Print the search space, the number of trials in each state, and the best trial."""
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
    waiting = f" ({status.pending_count} with an active worker)" if status.pending_count else ""
    print_line(f"trials   {counted}, {status.missing_count} missing{waiting}, of {search.trials}")
    for trial in status.trials_in_state("FAIL"):
        print_line(
            f"         trial {trial.number}: {trial.user_attrs.get('class')}: {trial.user_attrs.get('sentence')}"
        )
    if status.best_trial is None:
        return
    _show_best(status, status.best_trial, print_line)


def _show_best(status: StudyStatus, best: "FrozenTrial", print_line: PrintLine) -> None:
    """Print the best trial and, if all trials have ended, the command that runs it again."""
    study, search = status.study, status.study.search
    values = " ".join(f"{key}={value}" for key, value in parameter_values(best).items())
    print_line(f"best     trial {best.number}: {search.metric}={best.value:.4g} with {values}")
    if not status.missing_count and not status.trials_in_state("RUNNING"):
        where = ["--config-dir", str(study.config_dir)] if study.config_dir else []
        command = shlex.join(["python", "-m", "aem_exp", *study.trial_overrides(parameter_values(best)), *where])
        panel = study.base.evaluation.panel
        print_line(f"         {command}")
        print_line(
            f"         it was selected on {panel}, so its score there is biased: "
            f"evaluate it on {study.base.evaluation.final} with new seeds"
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
