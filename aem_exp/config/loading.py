"""From a command line to one frozen, typed experiment: composed, typed, bound to its functions, and checked."""

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
    """What a command line resolves to.

    Args:
        overrides: as typed: `+experiment=alfworld_1_5b`, `modulation=none`, `trainer.steps=10`, `from=RUN_DIR`.
        config_dir: a folder laid over `conf/`: its groups add to ours, its files hide ours of the same name.
        trust: continue a run of somebody else's; its config names functions that are called.

    Raises:
        ConfigError: anything that is wrong with it.
    """
    from aem_exp.config.compose import compose

    return resolve(compose(overrides, config_dir, trust))


def resolve(cfg: "DictConfig | Mapping[str, Any]") -> Experiment:
    """The typed value of a composed config, with every `_target_` bound and every contradiction refused."""
    from aem_exp.config.compose import to_container

    experiment = bind_targets(build_experiment(to_container(cfg)))
    rules.check(experiment)
    if experiment.parent_dir is not None:
        rules.check_against_parent(experiment, read(experiment.parent_dir, trust=True))
    return experiment
