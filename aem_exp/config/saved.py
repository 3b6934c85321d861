"""An experiment as a run dir holds it: `experiment.json`, written and read."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aem_exp.config import trainer_keys
from aem_exp.config.identity import diff, outputs_root, signature
from aem_exp.config.schema import Experiment, Launch
from aem_exp.config.targets import bind_targets
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.core.trust import check_run_dir as check_owner
from aem_exp.core.typed import convert, convert_fields
from aem_exp.rundir import EXPERIMENT

RETIRED: tuple[str, ...] = ()  # dotted keys that older versions wrote into records, and that decide nothing any more


def read(folder: str | Path, trust: bool = False) -> Experiment:
    """The experiment of a run dir, as it was resolved.

    Raises:
        ConfigError: there is none, it was edited, or it is somebody else's and not to be trusted.
    """
    folder = Path(folder).expanduser().absolute()
    check_owner(folder, trust)
    file = folder / EXPERIMENT
    if not os.access(file, os.R_OK):
        raise ConfigError("RUN_DIR", str(folder), f"must be the folder of a run; no {file.name} can be read there")
    experiment = bind_targets(from_dict(disk.read_json(file)))
    if not folder.name.endswith(f"-{signature(experiment)}"):
        remedy = f"{file.name} hashes to {signature(experiment)}: it was edited, or written by another version"
        raise ConfigError("RUN_DIR", str(folder), remedy)
    return experiment


def from_dict(data: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_dict`: typed, complete, and not checked for contradictions again; retired keys are left out."""
    return build_experiment(_without_retired(data))


def _without_retired(data: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    return {
        key: _without_retired(value, f"{at}{key}.") if isinstance(value, Mapping) else value
        for key, value in data.items()
        if f"{at}{key}" not in RETIRED
    }


def build_experiment(data: Mapping[str, Any]) -> Experiment:
    """An experiment of blocks and values; a key that is not known is refused."""
    for group, block in data.items():
        if isinstance(block, Mapping) and (group in block or ("trainer" in block and group != "launch")):
            header = "a file that sets more than its own block begins with the line `# @package _global_`"
            raise ConfigError(group, f"{{{', '.join(block)}}}", f"{header}: does the one in conf/{group}/?")
    values = convert_fields(Experiment, {key: value for key, value in data.items() if key != "trainer"})
    launch = values.get("launch", Launch())
    launch = replace(launch, trainer=trainer_keys.resolve_launch_trainer(launch.trainer))
    block = convert(dict[str, Any], data.get("trainer", {}), "trainer")
    return Experiment(**values | {"launch": launch, "trainer": trainer_keys.resolve_trainer(block)})


def nearest_run(experiment: Experiment) -> tuple[Path, list[str]] | None:
    """The existing run that differs least from this experiment, and how this experiment differs from it."""
    found = []
    for file in outputs_root(experiment).glob(f"*/{EXPERIMENT}"):
        try:
            found.append((file.parent, diff(from_dict(disk.read_json(file)), experiment)))
        except ConfigError:  # written by another version, or damaged
            continue
    return min(found, key=lambda pair: len(pair[1]), default=None)
