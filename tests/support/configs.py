"""Helpers of the tests of configs: fixed settings, changed experiments, and what an error says."""

import copy
import dataclasses
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from aem_exp import config
from aem_exp.config import ConfigError, Experiment
from aem_exp.core.errors import format_value
from support import ROOT

GROUPS = config.list_choices([ROOT / "conf"])
FIXED = [  # settings that the tests rely on; tuning conf/ does not change them
    *("model=tiny", "env=household", "baseline=grpo", "modulation=aem", "launch=local"),
    *("trainer.steps=60", "trainer.tasks_per_step=8", "trainer.group_size=8", "trainer.mini_batch=32"),
    *("env.make={_target_: aem_exp.envs.household.Household}", "env.history=full", "env.window=0"),
    *("env.response_tokens=12", "env.context_tokens=512", "env.prompt={first: '{observation}', next: '{observation}'}"),
    *("evaluation.every=10", "launch.trainer={use_cpu: true}"),
]


def get_key(experiment: Experiment, dotted: str) -> Any:
    """The value of a dotted key."""
    value: Any = config.to_dict(experiment)
    for key in dotted.split("."):
        value = value[key]
    return value


def with_trainer(experiment: Experiment, **changes: Any) -> Experiment:
    """The experiment with other values in its `trainer` block."""
    return dataclasses.replace(experiment, trainer=dataclasses.replace(experiment.trainer, **changes))


def with_overrides(tree: DictConfig, overrides: str) -> DictConfig:
    """A composed config with overrides (separated by ` | `) applied as Hydra would; composing again takes 0.1 s."""
    tree = copy.deepcopy(tree)
    for override in OverridesParser.create().parse_overrides(overrides.split(" | ")):
        OmegaConf.update(tree, override.key_or_group, override.value(), merge=False, force_add=True)
    return tree


def assert_error(error: ConfigError, field: str, *facts: str) -> None:
    """The error names this field, fits in one line, and contains each fact after `field=value:`."""
    head = f"{error.field}={format_value(error.value)}: "
    assert error.field == field
    assert str(error).startswith(head) and "\n" not in str(error)
    for fact in facts:
        assert fact in str(error).removeprefix(head), (fact, str(error))


def assert_refused(tree: DictConfig, overrides: str, field: str, *facts: str) -> None:
    """Resolving the config with these overrides raises an error about this field, with these facts."""
    with pytest.raises(ConfigError) as caught:
        config.resolve(with_overrides(tree, overrides))
    assert_error(caught.value, field, *facts)
