"""Loads an experiment from a command line: compose, convert to types, bind the targets, check the rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.config import rules
from aem_exp.config.saved import build_experiment, read
from aem_exp.config.schema import Experiment
from aem_exp.config.targets import bind_targets

if TYPE_CHECKING:
    from omegaconf import DictConfig


def load(overrides: list[str], config_dir: str | Path | None = None, trust: bool = False) -> Experiment:
    """The experiment of a command line.

    Args:
        overrides: such as `+experiment=alfworld_1_5b`, `modulation=none`, `trainer.steps=10`, `from=RUN_DIR`.
        config_dir: a folder of configs. Its files are added to those of `conf/`, and hide files of the same name.
        trust: allow `from=` a run of another user, whose config names functions that are called.

    Raises:
        ConfigError: the first mistake in the experiment.
    """
    from aem_exp.config.compose import compose

    return resolve(compose(overrides, config_dir, trust))


def resolve(cfg: "DictConfig | Mapping[str, Any]") -> Experiment:
    """Convert a composed config to an experiment, bind every `_target_`, and refuse contradictions."""
    from aem_exp.config.compose import to_container

    experiment = bind_targets(build_experiment(to_container(cfg)))
    rules.check(experiment)
    if experiment.parent_dir is not None:
        rules.check_against_parent(experiment, read(experiment.parent_dir, trust=True))
    return experiment
