"""Decides where a run with `from=RUN_DIR` begins: at the end of its parent, or at the newest complete checkpoint of a
stopped one.

The new run's signature contains this starting point, such as `0123456789ab@3`.
"""

import shlex
from contextlib import suppress
from pathlib import Path

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import RESULT, checkpoints, lock


def starting_point(parent: str, experiment: Experiment) -> tuple[str, int]:
    """How a new run names the one at `parent`, and how many steps that one has.

    Raises:
        ConfigError: it is running, or was stopped before it had a checkpoint.
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
    if who := lock.describe_owner(folder):
        raise ConfigError("from", parent, f"is at work, {_format_progress(done)}; stop it, or wait for its end ({who})")
    if checkpoint is None:
        again = shlex.join(["python", "-m", "aem_exp.run", str(folder)])
        raise ConfigError(
            "from", parent, f"stands at step 0 and has no checkpoint to begin at; to go on with it: {again}"
        )
    return (name if done == steps else f"{name}@{done}"), done


def starting_checkpoint(experiment: Experiment) -> Path:
    """The checkpoint of its parent that a run begins at.

    Raises:
        ConfigError: it is gone.
    """
    assert experiment.parent_dir is not None
    parent, steps = Path(experiment.parent_dir), experiment.parent_steps
    steps = steps or config.read(parent, trust=True).trainer.steps  # of a run that an older version has begun
    found = dict[int, Path]()
    for each in checkpoints.list_complete(parent):
        with suppress(OSError, ValueError, KeyError, TypeError):  # its mark is damaged: then nobody knows its step
            found[checkpoints.steps(each)] = each
    if steps in found:
        if why := checkpoints.describe_damage(found[steps]):
            raise ConfigError("from", str(parent), f"its last checkpoint is damaged: {why}; put a good copy there")
        return found[steps]
    if max(found, default=0) > steps:
        remedy = f"has gone on to step {max(found)}, and step {steps} is no longer there; ask for from= again"
        raise ConfigError("from", str(parent), remedy)
    raise ConfigError("from", str(parent), f"has no checkpoint of step {steps}; it may have been removed")


def _format_progress(steps: int) -> str:
    return f"at step {steps}" if steps else "and has no checkpoint yet"
