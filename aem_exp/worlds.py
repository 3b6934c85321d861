"""The world of an experiment: opened, and held to what it promises before anything is played in it."""

from collections.abc import Iterable

from aem_exp import config, exam, leaks, smoke
from aem_exp.config import ConfigError, Experiment
from aem_exp.core.user_code import blaming
from aem_exp.envs import World
from aem_exp.smoke import TARGET, TINY


def opened(experiment: Experiment) -> World:
    """The world that the config names.

    Raises:
        ConfigError: it cannot be opened, or is no world.
    """
    make = experiment.env.make
    path = make["_target_"]
    with blaming(TARGET, path, "making it"):
        world: World = config.instantiate(make)
    for name in ("fingerprint", "splits", "tasks", "env"):
        with blaming(TARGET, path, name):
            there = hasattr(world, name)
        if not there:
            raise ConfigError(TARGET, path, f"has no {name}, which aem_exp.envs.World asks for")
        if name in ("tasks", "env") and not callable(getattr(world, name)):
            raise ConfigError(TARGET, path, f"its {name} must be a method")
    names = [] if isinstance(world.splits, str) or not isinstance(world.splits, Iterable) else list(world.splits)
    if not isinstance(world.fingerprint, str) or "train" not in names:
        remedy = "must have a text as its fingerprint, and a tuple of names, train among them, as its splits"
        raise ConfigError(TARGET, path, remedy)
    if names == ["train"]:
        raise ConfigError(TARGET, path, "its splits must name held-out panels beside train, such as dev and test")
    return world


def fitting(experiment: Experiment) -> World:
    """The world, opened; refuses what it cannot give: a player to imitate, so many tasks, panels apart from them.

    Whatever of the experiment may be a user's own is tried (see `smoke`).
    """
    with blaming(TARGET, experiment.env.make["_target_"], "importing it"):
        kind = config.instantiate(experiment.env.make, partial=True).func
    teachable = not isinstance(kind, type) or (hasattr(kind, "words") and hasattr(kind, "expert"))
    if experiment.model.make and experiment.model.make["_target_"] == TINY and not teachable:
        remedy = f"env {experiment.env.name} has no scripted player to imitate; load a policy: model=NAME, or"
        raise ConfigError("model.make", TINY, f"{remedy} model.make=null model.path=FOLDER")
    smoke.check_parts(experiment)
    world, settings = opened(experiment), experiment.trainer
    train = exam.listed(world, "train")
    if settings["tasks_per_step"] * settings["oversample"] > len(train):
        remedy = f"env {experiment.env.name} has {len(train)} training tasks"
        raise ConfigError("trainer.tasks_per_step", settings["tasks_per_step"], remedy)
    how = experiment.evaluation
    panels = {
        split: exam.panel(world, split, how.tasks, (field, "evaluation.tasks"))
        for field, split in (("evaluation.panel", how.panel), ("evaluation.final", how.final))
    }
    name, held_out = experiment.env.name, {split: panel.tasks for split, panel in panels.items()}
    some = exam.drawn(world, "train", train, leaks.looked_at(train, held_out))
    leaks.refuse_shared(name, some, held_out)
    playable = smoke.check_world(experiment, world, some)
    if playable and (played := smoke.games(experiment, world, {"train": some, **held_out})):
        leaks.refuse_alike(name, played.pop("train"), played)
    return world
