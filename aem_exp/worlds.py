"""The world of an experiment: opened, and held to what it promises before anything is played in it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from aem_exp import config, exam
from aem_exp.config import ConfigError, Experiment
from aem_exp.envs import World

TARGET = "env.make._target_"
TINY = "aem_exp.tiny.make"


def opened(experiment: Experiment) -> World:
    """The world that the config names.

    Raises:
        ConfigError: it cannot be opened, or is no world.
    """
    make = experiment.env.make
    world: World = config.instantiate(make)
    for name in ("fingerprint", "splits", "tasks", "env"):
        if not hasattr(world, name):
            raise ConfigError(TARGET, make["_target_"], f"has no {name}, which aem_exp.envs.World asks for")
    if not isinstance(world.fingerprint, str) or isinstance(world.splits, str) or "train" not in world.splits:
        remedy = "must have a text as its fingerprint, and a tuple of names, train among them, as its splits"
        raise ConfigError(TARGET, make["_target_"], remedy)
    return world


def fitting(experiment: Experiment) -> World:
    """The world, opened; refuses what it cannot give: a player to imitate, so many tasks, panels apart from them."""
    kind = config.instantiate(experiment.env.make, partial=True).func
    teachable = not isinstance(kind, type) or (hasattr(kind, "words") and hasattr(kind, "expert"))
    if experiment.model.make and experiment.model.make["_target_"] == TINY and not teachable:
        remedy = f"env {experiment.env.name} has no scripted player to imitate; load a policy: model=NAME, or"
        raise ConfigError("model.make", TINY, f"{remedy} model.make=null model.path=FOLDER")
    world, settings = opened(experiment), experiment.trainer
    train = world.tasks("train")
    if settings["tasks_per_step"] * settings["oversample"] > len(train):
        remedy = f"env {experiment.env.name} has {len(train)} training tasks"
        raise ConfigError("trainer.tasks_per_step", settings["tasks_per_step"], remedy)
    how = experiment.evaluation
    panels = {
        split: exam.panel(world, split, how.tasks, (field, "evaluation.tasks"))
        for field, split in (("evaluation.panel", how.panel), ("evaluation.final", how.final))
    }
    for split, panel in panels.items():
        if (shared := _shared(train, panel.tasks)) is not None:
            raise ConfigError(f"env {experiment.env.name}", shared, f"is a task of train and of the panel {split}")
    return world


def _shared(train: Sequence[Any], held_out: Sequence[Any]) -> str | None:
    """The id of a task that is in both, where the training tasks are a list (and not made as they are drawn)."""
    if not isinstance(train, list | tuple):
        return None
    known = {task.id: asdict(task) for task in held_out}
    return next((task.id for task in train if task.id in known and asdict(task) == known[task.id]), None)
