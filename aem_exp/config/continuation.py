"""Decides where a run with `from=RUN_DIR` begins: at the end of its parent, or at the newest complete checkpoint if the
parent was stopped.

The signature of the new run includes this starting point, such as `0123456789ab@3`.
"""

import shlex
from contextlib import suppress
from pathlib import Path

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import RESULT, checkpoints, lock


def starting_point(parent: str, experiment: Experiment) -> tuple[str, int]:
    """The value of `parent` for a new run, and the number of steps that the parent has completed.

    Raises:
        ConfigError: the parent is running, or was stopped before its first checkpoint.
    """
    folder, name, steps = (
        Path(parent).expanduser().absolute(),
        config.signature(experiment),
        experiment.trainer.steps,
    )
    if (folder / RESULT).exists():
        return name, steps
    checkpoint = checkpoints.find_newest(folder)
    done = checkpoints.steps(checkpoint) if checkpoint else 0
    if owner := lock.describe_owner(folder):
        raise ConfigError(
            "from", parent, f"is running, {_format_progress(done)}; stop it or wait until it ends ({owner})"
        )
    if checkpoint is None:
        command = shlex.join(["python", "-m", "aem_exp.run", str(folder)])
        raise ConfigError("from", parent, f"has no checkpoint yet (step 0); to continue this run itself: {command}")
    return (name if done == steps else f"{name}@{done}"), done


def starting_checkpoint(experiment: Experiment) -> Path:
    """The checkpoint of the parent at which a run begins.

    Raises:
        ConfigError: the checkpoint is missing or damaged.
    """
    assert experiment.parent_dir is not None
    parent, steps = Path(experiment.parent_dir), experiment.parent_steps
    steps = steps or config.read(parent, trust=True).trainer.steps  # 0 in runs that an older version has started
    by_step = dict[int, Path]()
    for each in checkpoints.list_complete(parent):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged marker file: its step is unknown
            by_step[checkpoints.steps(each)] = each
    if steps in by_step:
        if damage := checkpoints.describe_damage(by_step[steps]):
            raise ConfigError(
                "from", str(parent), f"its last checkpoint is damaged: {damage}; restore it from a backup"
            )
        return by_step[steps]
    if max(by_step, default=0) > steps:
        remedy = f"has continued to step {max(by_step)} and no longer has step {steps}; start again with from="
        raise ConfigError("from", str(parent), remedy)
    raise ConfigError("from", str(parent), f"has no checkpoint of step {steps}; it may have been deleted")


def _format_progress(steps: int) -> str:
    return f"at step {steps}" if steps else "without a checkpoint yet"
