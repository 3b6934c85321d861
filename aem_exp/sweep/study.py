"""The only room that speaks optuna: a question with `search:` is a study, and each trial of it is one ordinary run.

There is no master. `python -m aem_exp.sweep NAME` sends workers, each of which takes one trial (see `trial`). Here is what they
share: the space, the storage, and where the study stands. All that is chosen is chosen on dev.

    search:
      space:                     # Hydra's grammar for sweeps, and its ranges
        trainer.learning_rate: tag(log, interval(1e-4, 1e-3))
        modulation.lam.value: choice(0.5, 1, 2)
        env.window: range(1, 9)  # or int(interval(1, 8))
      trials: 12
      metric: eval/success       # its last value is the trial's
      direction: maximize        # or minimize
      pruner: median             # or hyperband, none
      storage: null              # null: $AEM_STUDY, else a journal file beside the workers; or the URL of a data base
"""

import argparse
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.core.typed import AT_LEAST_1, build_from_mapping

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from aem_exp.config.compose import Composer
    from aem_exp.sweep.question import Sweep

FOLDER: Final = "studies"  # of the outputs
STUDY_FILE, TRIAL_FILE, JOURNAL_FILE = "study.json", "trial.json", "journal.log"
TRIAL_MODULE: Final = "aem_exp.sweep.trial"  # of a worker
MAX_RETRIES: Final = 2  # of a trial whose worker is lost
MAX_KILLS: Final = 3  # in a row and at one step, after which a worker counts as lost
NOT_SEARCHABLE: Final = {  # what the search may not turn, and why
    "seed": "a seed is luck; choose it in seeds:",
    "outputs": "a study has one folder of runs; set it in base:",
    "tracking": "a study has one MLflow store; set it in base:",
    "launch": "how much machine decides no result",
    "evaluation": "trials are compared by one measure; set it in base:",
}
PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """What `search:` says."""

    space: dict[str, str] = field(default_factory=dict)  # key -> its range, as text
    trials: Annotated[int, AT_LEAST_1] = 1
    metric: str = "eval/success"
    direction: Literal["maximize", "minimize"] = "maximize"
    pruner: Literal["hyperband", "median", "none"] = "none"
    storage: str | None = None


@dataclass(frozen=True)
class Study:
    """A search, and where it lives."""

    folder: Path  # OUTPUTS/studies/NAME
    question: str
    overrides: tuple[str, ...]  # of every trial
    config_dir: Path | None
    search: Search

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def outputs(self) -> Path:
        return self.folder.parents[1]

    @cached_property
    def composer(self) -> "Composer":
        from aem_exp.config.compose import Composer

        return Composer(self.config_dir)

    @cached_property
    def base(self) -> Experiment:
        return self.experiment({})

    @cached_property
    def storage_url(self) -> str | None:
        """A data base; None: a journal file."""
        return self.search.storage or os.environ.get("AEM_STUDY") or None

    def trial_overrides(self, values: Mapping[str, str]) -> list[str]:
        """A trial as a command line."""
        return self.composer.drop_replaced_choices(
            [*self.overrides, *(f"{key}={value}" for key, value in values.items())]
        )

    def experiment(self, values: Mapping[str, str]) -> Experiment:
        experiment = config.resolve(self.composer.compose(self.trial_overrides(values)))
        return replace(experiment, outputs=str(self.outputs))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else asks, settles or records meanwhile."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield


# From a sweep file to a study.


def from_sweep(sweep: "Sweep", typed: Sequence[str] = (), config_dir: str | None = None) -> Study:
    """The study of a sweep with `search:`; `typed`: what was typed over it.

    Raises:
        ConfigError: anything that is wrong with it, before any trial.
    """
    from aem_exp.config.compose import override_key
    from aem_exp.tracking import views

    (cell,) = sweep.cells
    at = f"{sweep.name}.search"
    views.sweep_tag(sweep.name)  # refuses a name that is none
    assert sweep.search is not None
    search = parse_search(sweep.search, at)
    folder = cell.folder.parent / FOLDER / sweep.name
    over = Path(config_dir).expanduser().absolute() if config_dir else sweep.config_dir
    study = Study(folder, sweep.question, cell.overrides, over, search)
    for text in typed:
        if override_key(text) in search.space:
            raise ConfigError("overrides", text, f"is searched; change it in {at}.space")
    _check_search(study, at)
    return study


def parse_search(block: Mapping[str, Any], at: str) -> Search:
    """The block `search:` of a file, typed."""
    space = block.get("space")
    for key, text in space.items() if isinstance(space, Mapping) else ():
        if not isinstance(text, str):
            remedy = "must be text such as interval(1e-4, 1e-3), range(1, 9) or choice(a, b)"
            raise ConfigError(f"{at}.space.{key}", text, remedy)
    search = build_from_mapping(Search, block, at)
    for key in ("space", "trials"):
        if not block.get(key):
            raise ConfigError(f"{at}.{key}", block.get(key), "must hold something")
    return search


def _check_search(study: Study, at: str) -> None:
    from aem_exp.core.errors import redact

    search, how = study.search, study.base.evaluation
    if search.metric.startswith("test/"):
        raise ConfigError(f"{at}.metric", search.metric, "tuning reads the dev panel only: eval/success, for example")
    if how.panel == "test":
        raise ConfigError("evaluation.panel", how.panel, "is the final test; tuning reads another panel, such as dev")
    if search.storage and redact(search.storage) != search.storage:
        remedy = "holds credentials; those come from the environment: the whole URL in AEM_STUDY"
        raise ConfigError(f"{at}.storage", redact(search.storage), remedy)
    space = {key: representative_values(study, key, f"{at}.space") for key in search.space}
    first = {key: found[0] for key, found in space.items()}
    for key, found in space.items():
        places = {}
        for value in found:
            try:
                places[config.signature(study.experiment({**first, key: value}))] = value
            except ConfigError as error:
                where = f"{at}.space.{key}: {error.field}"
                raise ConfigError(where, error.value, error.choices, error.remedy) from error
        if len(places) < len(found):
            remedy = f"changes nothing between {' and '.join(found[:2])}; does the base use it?"
            raise ConfigError(f"{at}.space.{key}", search.space[key], remedy)


def representative_values(study: Study, key: str, at: str) -> list[str]:
    """Values of a parameter that show whether it is taken: all choices, or both ends."""
    found = distribution(study, key, at)
    if hasattr(found, "choices"):
        return [str(choice) for choice in found.choices]
    return [format_value(found.low), format_value(found.high)]


def distribution(study: Study, key: str, at: str = "space") -> Any:
    """A parameter's range, as optuna calls it. Choices are kept as they are written, so that overrides are made of them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from aem_exp.config.compose import override_key, override_value

    text, where = study.search.space[key], f"{at}.{key}"
    try:
        if why := NOT_SEARCHABLE.get(override_key(f"{key}=0").partition(".")[0]):
            raise ConfigError(where, text, why)
        swept = override_value(f"{key}={text}")
        log = "log" in getattr(swept, "tags", ())
        if strange := set(getattr(swept, "tags", ())) - {"log"}:
            raise ConfigError(where, text, f"only read with the tag log, not {', '.join(sorted(strange))}")
        if hasattr(swept, "end"):  # an interval
            low, high, step = swept.start, swept.end, None
        else:
            values = [word.partition("=")[2] for word in study.composer.expand_sweep(f"{key}={text}")]
            if len(set(values)) < 2:
                raise ConfigError(where, text, "one value; it belongs in base:, or write interval(1e-4, 1e-3)")
            if not hasattr(swept, "stop"):  # not a range
                return CategoricalDistribution(values)
            ends = swept.start, swept.start + (len(values) - 1) * swept.step
            low, high, step = min(ends), max(ends), abs(swept.step)
    except ConfigError as error:
        if error.field == where:
            raise
        raise ConfigError(where, text, error.choices, error.remedy) from error
    whole = all(isinstance(number, int) for number in (low, high, step or 0))
    if not low < high or not all(map(math.isfinite, (low, high))) or (log and low <= 0):
        raise ConfigError(where, text, "must go from a lower to a higher number" + (", both above 0" if log else ""))
    if log and step not in (None, 1):
        raise ConfigError(where, text, "a range with the tag log has steps of 1")
    return IntDistribution(low, high, log, step or 1) if whole else FloatDistribution(low, high, log, step)


def format_value(value: Any) -> str:
    """A parameter as an override has it: six digits of a float say enough, and are what the run's folder is named by."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# The storage.


def _open_storage(study: Study) -> Any:
    """The trials' store, made where it is not there."""
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    from aem_exp.core.errors import redact

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if study.storage_url is None:
        study.folder.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(study.folder / JOURNAL_FILE)))
    try:
        return optuna.storages.RDBStorage(study.storage_url)
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        why = redact(" ".join(str(error).split()))[:200]
        remedy = f"cannot be used ({why}); postgresql://host/base, sqlite:////folder/file.db, or null: a journal file"
        raise ConfigError("search.storage", redact(study.storage_url), remedy) from error


def _load_trials(study: Study) -> "list[FrozenTrial]":
    """All trials so far; nothing is made where there are none.

    Raises:
        ConfigError: they belong to another search of that name.
    """
    import optuna

    if study.storage_url is None and not (study.folder / JOURNAL_FILE).exists():
        return []
    storage = _open_storage(study)
    if study.name not in optuna.get_all_study_names(storage):
        return []
    begun = optuna.load_study(study_name=study.name, storage=storage)
    _check_identity(study, begun)
    return begun.get_trials(deepcopy=False)


def open_study(study: Study) -> "optuna.Study":
    """The study in its storage, begun where it was not."""
    import optuna

    search = study.search
    opened = optuna.create_study(
        study_name=study.name,
        storage=_open_storage(study),
        pruner=_pruner(study),
        direction=search.direction,
        load_if_exists=True,
    )
    if "asked" not in opened.user_attrs:
        opened.set_user_attr("asked", _identity(study))
    _check_identity(study, opened)
    return opened


def _identity(study: Study) -> dict[str, Any]:
    """What all trials have in common; how many there are, who prunes them and where they run may change."""
    search = study.search
    return {
        "base": config.signature(study.base),
        "space": dict(search.space),
        "metric": search.metric,
        "direction": search.direction,
    }


def _check_identity(study: Study, opened: "optuna.Study") -> None:
    now = _identity(study)
    for key, old in opened.user_attrs.get("asked", now).items():
        if old != now[key]:
            remedy = f"the study was begun with {old}; give the new one's file another name (runs in common run once)"
            raise ConfigError(f"{study.name}.{key}", now[key], remedy)


def _pruner(study: Study) -> Any:
    from optuna import pruners

    search, steps = study.search, study.base.trainer.steps
    every = study.base.evaluation.every if search.metric.startswith("eval/") else 1
    if search.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=max(2, min(5, search.trials // 3)))
    if search.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=min(max(1, every), steps), max_resource=steps)
    return pruners.NopPruner()


def sampler(study: Study, count: int) -> Any:
    """TPE, at random for the first third; seeded by what is there, so that workers differ and a study can be repeated."""
    from optuna.samplers import TPESampler

    return TPESampler(
        n_startup_trials=max(1, min(10, study.search.trials // 3)), seed=100_003 * study.base.seed + count
    )


# Trials.


def ask(study: Study, opened: "optuna.Study") -> "optuna.Trial | None":
    """A new trial; None where none is missing."""
    trials = opened.get_trials(deepcopy=False)
    if not count_missing(study, trials):
        return None
    opened.sampler = sampler(study, len(trials))
    return opened.ask({key: distribution(study, key) for key in study.search.space})


def reopen_trial(opened: "optuna.Study", trial: "FrozenTrial") -> "optuna.Trial":
    """A trial that was asked for, perhaps by an earlier process, to report to."""
    from optuna.trial import Trial

    return Trial(opened, trial._trial_id)


def find_finished_duplicate(opened: "optuna.Study", trial: "optuna.Trial") -> "FrozenTrial | None":
    """A trial of the same run whose end is known."""
    name = trial.user_attrs["run"]
    return next(
        (
            other
            for other in opened.get_trials(deepcopy=False)
            if other.state.name in ("COMPLETE", "PRUNED")
            and other.number != trial.number
            and other.user_attrs.get("run") == name
        ),
        None,
    )


def tell(opened: "optuna.Study", trial: "optuna.Trial", state: str, value: float | None, say: PrintLine) -> int:
    """Tell the storage how a trial ended; the exit code of who does."""
    from optuna.trial import TrialState

    opened.tell(trial, value if state == "COMPLETE" else None, TrialState[state], skip_if_finished=True)
    say(f"told     trial {trial.number}: {state.lower()}" + ("" if value is None else f", {value:.4g}"))
    return 0


def tell_failure(opened: "optuna.Study", trial: "FrozenTrial", kind: str, sentence: str) -> None:
    """Tell the storage that a trial failed, and why."""
    from optuna.trial import TrialState

    from aem_exp.core.errors import redact

    asked = reopen_trial(opened, trial)
    asked.set_user_attr("class", kind)
    asked.set_user_attr("sentence", redact(sentence))
    opened.tell(asked, state=TrialState.FAIL)


# Where the study stands.


@dataclass(frozen=True)
class StudyStatus:
    """Trials, without those that another stands in for, and workers."""

    study: Study
    trials: "list[FrozenTrial]"
    workers_by_trial: Mapping[int, Path]  # number of a trial -> its worker
    active_workers: frozenset[Path]  # workers that are at work, or in the queue
    idle_workers: tuple[Path, ...]  # workers that are not, and have no trial

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
        """Begun, and nobody is at them."""
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
        """How many of those somebody will ask for."""
        return len(self.active_workers - set(self.workers_by_trial.values()))

    @property
    def best_trial(self) -> "FrozenTrial | None":
        up = 1 if self.study.search.direction == "maximize" else -1
        return max(self.trials_in_state("COMPLETE"), key=lambda trial: up * (trial.value or 0.0), default=None)


def read_status(study: Study) -> StudyStatus:
    from aem_exp.cluster import run_state
    from aem_exp.cluster.run_state import RunStatus

    workers = sorted(study.folder.glob("worker-*"))
    states = run_state.read(workers)
    live = frozenset(worker for worker in workers if states[worker].what in (RunStatus.RUNNING, RunStatus.QUEUED))
    cards = {worker: read_card(worker) for worker in workers}
    holders = {card["number"]: worker for worker, card in cards.items() if "number" in card}
    spare = tuple(worker for worker in workers if worker not in live and "number" not in cards[worker])
    return StudyStatus(study, drop_replaced_trials(_load_trials(study)), holders, live, spare)


def drop_replaced_trials(trials: "Sequence[FrozenTrial]") -> "list[FrozenTrial]":
    replaced = {trial.user_attrs.get("instead_of") for trial in trials}
    return [trial for trial in trials if trial.number not in replaced]


def count_missing(study: Study, trials: "Sequence[FrozenTrial]") -> int:
    return max(0, study.search.trials - sum(trial.state.name != "WAITING" for trial in drop_replaced_trials(trials)))


def read_card(worker: Path) -> dict[str, Any]:
    file = worker / TRIAL_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def parameter_values(trial: "FrozenTrial") -> dict[str, str]:
    """A trial's parameters as overrides have them."""
    return {key: format_value(value) for key, value in trial.params.items()}


# The door's half: plan, settle, send.


def execute_study(study: Study, asked: argparse.Namespace, typed: str, say: PrintLine) -> int:
    """Show where the study stands, and do what `asked` says; `typed`: the command that asked."""
    now = read_status(study)
    if asked.json:
        say(json.dumps(_as_json(now), indent=1))
        return 0
    _show_status(now, say)
    if asked.submit or asked.local:
        return _run_missing(study, asked, say)
    todo = now.missing_count - now.pending_count + len(now.orphaned_trials)
    way = "--submit" if study.base.launch.where == "slurm" else "--local"
    say(f"\nnext     {f'{typed} {way}' if todo > 0 else f'python -m aem_exp.status {study.name}'}")
    return 0


def _run_missing(study: Study, asked: argparse.Namespace, say: PrintLine) -> int:
    """Send, or run here, what is missing."""
    from aem_exp.cluster import slurm
    from aem_exp.jobs import dispatch

    dispatch.check_worlds([study.base])
    dispatch.check_prepared(study.base)
    with study.lock():
        workers = _reconcile_workers(study, asked.retry)
        if asked.submit and workers:
            logs = study.folder / "logs"
            ids = slurm.submit(workers, study.base.launch, study.name, logs, asked.at_once, room=TRIAL_MODULE)
            say(f"sent     {len(ids)} workers as job {ids[0].partition('_')[0]}; logs in {logs}")
    if not workers:
        say("\nnothing is missing")
    code = 0
    if asked.local and workers:

        def ended(worker: Path, code: int, last: str) -> str:
            if not code:
                say(f"{worker.name}: {last}")
            return last if code else ""

        names = {worker: worker.name for worker in workers}
        code = 1 if dispatch.run_processes(TRIAL_MODULE, workers, max(1, asked.at_once), say, ended, names) else 0
        _show_status(read_status(study), say)
    say(f"next     python -m aem_exp.status {study.name}")
    return code


def _reconcile_workers(study: Study, retry: Sequence[str]) -> list[Path]:
    """See to what was lost, or is to be tried again; the workers to send."""
    opened, again = open_study(study), []
    now = read_status(study)
    for trial in now.orphaned_trials:
        worker = now.workers_by_trial.get(trial.number)
        why = "its worker is gone" if worker is None else _stuck_reason(study, trial)
        if worker is not None and why is None:
            again.append(worker)
            continue
        tell_failure(opened, trial, "killed", str(why))
        if (retries := trial.user_attrs.get("retries", 0)) < MAX_RETRIES:
            opened.enqueue_trial(trial.params, {"instead_of": trial.number, "retries": retries + 1})
    for trial in now.trials_in_state("FAIL"):
        if trial.user_attrs.get("class") in retry or "all" in retry:
            opened.enqueue_trial(trial.params, {"instead_of": trial.number})
    now = read_status(study)
    count = max(0, now.missing_count - now.pending_count)
    first = 1 + max((int(path.name.rpartition("-")[2]) for path in study.folder.glob("worker-*")), default=-1)
    fresh = [*now.idle_workers, *(study.folder / f"worker-{first + i:03d}" for i in range(count))][:count]
    return [_prepare_worker(study, worker) for worker in (*again, *fresh)]


def _stuck_reason(study: Study, trial: "FrozenTrial") -> str | None:
    """Why it is no use to start this trial's worker again, if it is not."""
    from aem_exp.rundir import attempts

    name = trial.user_attrs.get("run")
    events = attempts.read(study.outputs / name)[-MAX_KILLS:] if name else []
    if len(events) < MAX_KILLS or {(event["event"], event["step"]) for event in events} != {
        ("start", events[0]["step"])
    }:
        return None
    return f"its process was killed {MAX_KILLS} times at step {events[0]['step']}"  # starts without an end


def _prepare_worker(study: Study, worker: Path) -> Path:
    """A folder with all that a worker needs; one that has a trial keeps the code that this began with."""
    from aem_exp import provenance
    from aem_exp.core.errors import redact

    begun = "number" in read_card(worker)
    worker.mkdir(parents=True, exist_ok=True)
    if not begun:
        (worker / TRIAL_FILE).unlink(missing_ok=True)
        provenance.freeze_code({worker: study.base})
        if study.config_dir:
            shutil.rmtree(worker / "config", ignore_errors=True)
            shutil.copytree(study.config_dir, worker / "config", ignore=_ignore_non_yaml)
    asked = {
        "question": study.question,
        "overrides": study.overrides,
        "search": asdict(study.search),
        "storage": redact(study.storage_url or ""),
    }
    disk.write_atomically(worker / STUDY_FILE, json.dumps(asked, indent=1) + "\n")
    return worker


def _ignore_non_yaml(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".yaml") and not (Path(folder) / name).is_dir()]


def _show_status(now: StudyStatus, say: PrintLine) -> None:
    study, search = now.study, now.study.search
    say(f"{study.name}  {study.question}")
    for i, (key, text) in enumerate(search.space.items()):
        say(f"{'' if i else 'space':<8} {key}: {text}")
    counts = {
        "complete": now.trials_in_state("COMPLETE"),
        "pruned": now.trials_in_state("PRUNED"),
        "running": now.running_trials,
    }
    counts |= {"stopped": now.orphaned_trials, "failed": now.trials_in_state("FAIL")}
    told = ", ".join(f"{len(trials)} {name}" for name, trials in counts.items())
    waiting = f" ({now.pending_count} on the way)" if now.pending_count else ""
    say(f"trials   {told}, {now.missing_count} missing{waiting}, of {search.trials}")
    for trial in now.trials_in_state("FAIL"):
        say(f"         trial {trial.number}: {trial.user_attrs.get('class')}: {trial.user_attrs.get('sentence')}")
    if now.best_trial is None:
        return
    values = " ".join(f"{key}={value}" for key, value in parameter_values(now.best_trial).items())
    say(f"best     trial {now.best_trial.number}: {search.metric}={now.best_trial.value:.4g} with {values}")
    if not now.missing_count and not now.trials_in_state("RUNNING"):
        where = ["--config-dir", str(study.config_dir)] if study.config_dir else []
        command = shlex.join(
            ["python", "-m", "aem_exp", *study.trial_overrides(parameter_values(now.best_trial)), *where]
        )
        panel = study.base.evaluation.panel
        say(f"         {command}")
        say(
            f"         chosen on {panel}, so {panel} flatters it: compare it by {study.base.evaluation.final}, with new seeds"
        )


def _as_json(now: StudyStatus) -> dict[str, Any]:
    lost = {trial.number for trial in now.orphaned_trials}
    return {
        "sweep": now.study.name,
        "question": now.study.question,
        "missing": now.missing_count,
        "best": now.best_trial.number if now.best_trial else None,
        "trials": [
            {
                "trial": trial.number,
                "state": "stopped" if trial.number in lost else trial.state.name.lower(),
                "value": trial.value,
                "parameters": parameter_values(trial),
                "run": str(now.study.outputs / trial.user_attrs["run"]) if "run" in trial.user_attrs else None,
                "class": trial.user_attrs.get("class"),
                "why": trial.user_attrs.get("sentence"),
            }
            for trial in now.trials
        ],
    }
