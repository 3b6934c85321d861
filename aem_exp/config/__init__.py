"""Turns a command line into one frozen, typed `Experiment`, whose hash names its run dir.

All mistakes in an experiment are found here, before anything heavy is imported. `compose` (Hydra) merges YAML files and
overrides to one tree. `schema` and `saved` give it types. `targets` checks the functions that it names. `rules` refuses
contradictions. `identity` computes the hash. The package imports `core` and `rundir`; other packages use the names below.
"""

from aem_exp.config.identity import arm_signature, diff, outputs_root, run_dir, signature
from aem_exp.config.launch_rules import check_machine
from aem_exp.config.lint import notes
from aem_exp.config.loading import load, resolve
from aem_exp.config.saved import from_dict, nearest_run, read
from aem_exp.config.schema import (
    Baseline,
    Env,
    Evaluation,
    Experiment,
    Launch,
    Model,
    Modulation,
    WarmStart,
    apply_evaluation_limits,
    final_steps,
    max_context,
    to_dict,
)
from aem_exp.config.sources import conf_root, config_roots, list_choices
from aem_exp.config.targets import instantiate
from aem_exp.config.trainer_schema import Trainer
from aem_exp.core.errors import ConfigError

__all__ = [
    "Baseline",
    "ConfigError",
    "Env",
    "Evaluation",
    "Experiment",
    "Launch",
    "Model",
    "Modulation",
    "Trainer",
    "WarmStart",
    "apply_evaluation_limits",
    "arm_signature",
    "check_machine",
    "conf_root",
    "config_roots",
    "diff",
    "final_steps",
    "from_dict",
    "instantiate",
    "list_choices",
    "load",
    "max_context",
    "nearest_run",
    "notes",
    "outputs_root",
    "read",
    "resolve",
    "run_dir",
    "signature",
    "to_dict",
]
