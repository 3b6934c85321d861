"""The inputs of a start of a run, and the policy that it loads."""

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
    """The inputs of a start of a run, the same in all its processes."""

    experiment: Experiment
    folder: Path
    """The run directory."""
    world: World
    weights: str
    """Folder of the initial weights, after a warm start if there is one."""
    start: ResumePoint
    warm_start: dict[str, Any] | None = None
    """What the warm start trained and measured; None without one."""


@dataclass(frozen=True)
class LoadedPolicy:
    """The trained policy with its tokenizer."""

    model: Any
    """A causal LM of transformers, or a PEFT model around it. The trainer moves it to its device."""
    tokenizer: Any
    chat: Chat


def load_policy(context: RunContext) -> LoadedPolicy:
    """Load the policy with its initial weights; on a resume, the trainer then loads those of the checkpoint."""
    experiment = context.experiment
    log.info("loading the policy from %s", context.weights)
    fsdp.enable_ram_efficient_loading(experiment.launch.trainer)
    model, tokenizer = policy.load(experiment.model, context.weights, experiment.seed)
    return LoadedPolicy(model, tokenizer, Chat(tokenizer, experiment.model.system, experiment.model.thinking))
