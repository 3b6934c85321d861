"""A study in Optuna: storage, sampler, pruner, and the ask-and-tell interface for trials."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aem_exp import config
from aem_exp.core.errors import ConfigError
from aem_exp.sweep.study_space import distribution
from aem_exp.sweep.study_spec import JOURNAL_FILE, PrintLine, Study

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def _open_storage(study: Study) -> Any:
    """Open the storage of the trials; create it if it does not exist."""
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
        remedy = (
            f"cannot be used ({why}); use postgresql://host/base, sqlite:////folder/file.db, or null for a journal file"
        )
        raise ConfigError("search.storage", redact(study.storage_url), remedy) from error


def load_trials(study: Study) -> "list[FrozenTrial]":
    """All trials so far. Does not create a storage.

    Raises:
        ConfigError: the storage holds another study of this name.
    """
    import optuna

    if study.storage_url is None and not (study.folder / JOURNAL_FILE).exists():
        return []
    storage = _open_storage(study)
    if study.name not in optuna.get_all_study_names(storage):
        return []
    opened = optuna.load_study(study_name=study.name, storage=storage)
    _check_identity(study, opened)
    return opened.get_trials(deepcopy=False)


def open_study(study: Study) -> "optuna.Study":
    """Open the study in its storage; create it if it does not exist.

    Raises:
        ConfigError: the storage cannot be used, or holds another study of this name.
    """
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
    """The settings that all trials share. The number of trials, the pruner and the launch may change during a study."""
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
            remedy = (
                f"the study was started with {old}; give the new study another file name (finished runs are reused)"
            )
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
    """TPE with random sampling for the first third of the trials.

    The seed depends on the number of existing trials, so that workers differ and a study can be reproduced.
    """
    from optuna.samplers import TPESampler

    return TPESampler(
        n_startup_trials=max(1, min(10, study.search.trials // 3)), seed=100_003 * study.base.seed + count
    )


def ask(study: Study, opened: "optuna.Study") -> "optuna.Trial | None":
    """Ask for a new trial; None if no trial is missing."""
    trials = opened.get_trials(deepcopy=False)
    if not count_missing(study, trials):
        return None
    opened.sampler = sampler(study, len(trials))
    return opened.ask({key: distribution(study, key) for key in study.search.space})


def reopen_trial(opened: "optuna.Study", trial: "FrozenTrial") -> "optuna.Trial":
    """A trial object for reports on an existing trial, which another process may have asked for."""
    from optuna.trial import Trial

    return Trial(opened, trial._trial_id)


def find_finished_duplicate(opened: "optuna.Study", trial: "optuna.Trial") -> "FrozenTrial | None":
    """A finished trial of the same run, or None."""
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


def tell(opened: "optuna.Study", trial: "optuna.Trial", state: str, value: float | None, print_line: PrintLine) -> int:
    """Record the result of a trial in the storage; return the worker's exit code, 0."""
    from optuna.trial import TrialState

    opened.tell(trial, value if state == "COMPLETE" else None, TrialState[state], skip_if_finished=True)
    print_line(f"result   trial {trial.number}: {state.lower()}" + ("" if value is None else f", {value:.4g}"))
    return 0


def tell_failure(opened: "optuna.Study", trial: "FrozenTrial", kind: str, sentence: str) -> None:
    """Record in the storage that a trial failed, with class and reason."""
    from optuna.trial import TrialState

    from aem_exp.core.errors import redact

    failed = reopen_trial(opened, trial)
    failed.set_user_attr("class", kind)
    failed.set_user_attr("sentence", redact(sentence))
    opened.tell(failed, state=TrialState.FAIL)


def drop_replaced_trials(trials: "Sequence[FrozenTrial]") -> "list[FrozenTrial]":
    """The trials, without those that a retry replaced."""
    replaced = {trial.user_attrs.get("instead_of") for trial in trials}
    return [trial for trial in trials if trial.number not in replaced]


def count_missing(study: Study, trials: "Sequence[FrozenTrial]") -> int:
    """The number of trials that were not asked for yet, or must be asked for again."""
    return max(0, study.search.trials - sum(trial.state.name != "WAITING" for trial in drop_replaced_trials(trials)))
