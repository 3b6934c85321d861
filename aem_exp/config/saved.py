"""Reads the experiment of a run dir (`experiment.json`), and finds the most similar existing run."""

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

# Dotted keys that older versions wrote, and that no longer have an effect.
RETIRED: tuple[str, ...] = ("launch.workers_at",)


def read(folder: str | Path, trust: bool = False) -> Experiment:
    """Read the resolved experiment of a run dir.

    Raises:
        ConfigError: there is no experiment, it was edited, or it belongs to another user and is not trusted.
    """
    folder = Path(folder).expanduser().absolute()
    check_owner(folder, trust)
    file = folder / EXPERIMENT
    if not os.access(file, os.R_OK):
        raise ConfigError("RUN_DIR", str(folder), f"must be a run dir, but it has no readable {file.name}")
    experiment = bind_targets(from_dict(disk.read_json(file)))
    if not folder.name.endswith(f"-{signature(experiment)}"):
        remedy = f"{file.name} has the hash {signature(experiment)}, so it was edited, or written by another version"
        raise ConfigError("RUN_DIR", str(folder), remedy)
    return experiment


def from_dict(data: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_dict`. Contradictions are not checked again, and retired keys are ignored."""
    return build_experiment(_without_retired(data))


def _without_retired(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without_retired(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in data.items()
        if f"{prefix}{key}" not in RETIRED
    }


def build_experiment(data: Mapping[str, Any]) -> Experiment:
    """Build an experiment from a mapping of blocks and values; unknown keys are refused."""
    for group, block in data.items():
        if isinstance(block, Mapping) and (group in block or ("trainer" in block and group != "launch")):
            remedy = "a file that sets several blocks must begin with the line `# @package _global_`"
            raise ConfigError(group, f"{{{', '.join(block)}}}", f"{remedy}; check your file in {group}/")
    values = convert_fields(Experiment, {key: value for key, value in data.items() if key != "trainer"})
    launch = values.get("launch", Launch())
    launch = replace(launch, trainer=trainer_keys.resolve_launch_trainer(launch.trainer))
    block = convert(dict[str, Any], data.get("trainer", {}), "trainer")
    return Experiment(**values | {"launch": launch, "trainer": trainer_keys.resolve_trainer(block)})


def nearest_run(experiment: Experiment) -> tuple[Path, list[str]] | None:
    """The existing run with the fewest differences from this experiment, and these differences; None without runs."""
    candidates = []
    for file in outputs_root(experiment).glob(f"*/{EXPERIMENT}"):
        try:
            candidates.append((file.parent, diff(from_dict(disk.read_json(file)), experiment)))
        except ConfigError:  # written by another version, or damaged
            continue
    return min(candidates, key=lambda pair: len(pair[1]), default=None)
