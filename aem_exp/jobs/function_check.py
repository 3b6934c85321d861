"""Calls the schedule and a user-defined advantage function before a run, for a limited time.

Errors are reported with the user's file and line. A function that takes longer is skipped with a warning.
"""

import logging
import math
from typing import Any, Final

from aem_exp import config
from aem_exp.config import ConfigError, Experiment
from aem_exp.core import extras, user_code
from aem_exp.core.errors import RunError
from aem_exp.core.user_code import definition_location, run_with_timeout, wrap_call_errors

log = logging.getLogger("aem_exp")
OWN_ADVANTAGES: Final = "aem_exp.advantages."  # functions of this package, which its tests cover


def check_functions(experiment: Experiment) -> None:
    """Call the schedule, and a user-defined advantage function on a synthetic step.

    Raises:
        ConfigError: a function fails, or returns an invalid value.
    """
    _check_schedule(experiment)
    block = experiment.baseline.advantage
    if str(block["_target_"]).startswith(OWN_ADVANTAGES):
        return
    if missing := extras.first_missing(["torch"]):
        log.warning("%s: not tried before the run, because this needs %s", block["_target_"], missing)
        return
    from aem_exp.training import credit  # before the time limit starts, because it imports torch

    field, path = "baseline.advantage._target_", block["_target_"]
    with wrap_call_errors(field, path, "importing it"):
        estimator = config.instantiate(block, partial=True)
    step = _synthetic_step(experiment.trainer)
    try:
        if run_with_timeout(lambda _: credit.estimate_advantages(estimator, step), user_code.CHECK_SECONDS) is None:
            log.warning("%s: took more than %g s, so it was not checked before the run", path, user_code.CHECK_SECONDS)
    except RunError as stop:
        raise ConfigError(field, path, str(stop)) from stop


def _check_schedule(experiment: Experiment) -> None:
    block = experiment.modulation.lam
    if block is None:
        return
    field, path = "modulation.lam._target_", block["_target_"]
    with wrap_call_errors(field, path, "making it"):
        schedule = config.instantiate(block)
    if not callable(schedule):
        raise ConfigError(field, path, "must make a schedule, which is a function of the progress of a run from 0 to 1")
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        with wrap_call_errors(field, path, f"progress {progress:g}", schedule):
            lam = schedule(progress)
        if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam):
            remedy = (
                f"must return a finite number, not {lam!r} at progress {progress:g} ({definition_location(schedule)})"
            )
            raise ConfigError(field, path, remedy)


def _synthetic_step(settings: config.Trainer) -> Any:
    """A synthetic step with the experiment's number of groups and trajectories, of one to three turns; half of them win.

    If groups of equal returns are trained, the first group has equal returns.
    """
    import torch

    from aem_exp.advantages import StepBatch

    groups, size = settings.tasks_per_step, settings.group_size
    filtered = settings.drop_equal or settings.keep_variance is not None
    won = [float(m % 2 and (g > 0 or groups == 1 or filtered)) for g in range(groups) for m in range(size)]
    turns = [1 + m % 3 for m in range(groups * size)]
    owners = [m for m, count in enumerate(turns) for _ in range(count)]
    last = [turn == count - 1 for count in turns for turn in range(count)]
    doubles = {"dtype": torch.float64}
    return StepBatch(
        return_M=torch.tensor(won, **doubles),
        group_M=torch.arange(groups).repeat_interleave(size),
        trajectory_R=torch.tensor(owners),
        reward_R=torch.tensor([won[m] * end for m, end in zip(owners, last, strict=True)], **doubles),
        penalty_R=torch.zeros(len(owners), **doubles),
        state_R=torch.arange(len(owners)),
    )
