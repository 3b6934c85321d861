"""What a start of a run is given, and the policy that it loads."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_exp import policy
from aem_exp.config import Experiment
from aem_exp.envs import World
from aem_exp.rollout.chat import Chat
from aem_exp.run.resume import ResumePoint
from aem_exp.training import fsdp

log = logging.getLogger("aem_exp")


@dataclass(frozen=True)
class RunContext:
    """What a start of a run is given; the same in all of its processes."""

    experiment: Experiment
    folder: Path
    """The run dir."""
    world: World
    weights: str
    """The folder of the weights that training starts from."""
    start: ResumePoint


@dataclass(frozen=True)
class LoadedPolicy:
    """The policy that is trained."""

    model: Any
    """A causal LM of transformers, or a model of peft around it; the trainer moves it to its device."""
    tokenizer: Any
    chat: Chat


def load_policy(context: RunContext) -> LoadedPolicy:
    """Load the policy as the run begins with it; a checkpoint replaces its weights later."""
    experiment = context.experiment
    log.info("loading %s", context.weights)
    fsdp.enable_ram_efficient_loading(experiment.launch.trainer)
    model, tokenizer = policy.load(experiment.model, context.weights, experiment.seed)
    return LoadedPolicy(model, tokenizer, Chat(tokenizer, experiment.model.system, experiment.model.thinking))
