"""From the config of an environment to its world, which is refused unless it has what a world promises."""

from collections.abc import Iterable

from aem_exp.config.schema import Experiment
from aem_exp.config.targets import instantiate
from aem_exp.core.errors import ConfigError
from aem_exp.core.user_code import wrap_call_errors
from aem_exp.envs import World
from aem_exp.envs.panel import ENV_TARGET


def open_world(experiment: Experiment) -> World:
    """The world that the config names.

    Raises:
        ConfigError: it cannot be opened, or is no world.
    """
    make = experiment.env.make
    path = make["_target_"]
    with wrap_call_errors(ENV_TARGET, path, "making it"):
        world: World = instantiate(make)
    for name in ("fingerprint", "splits", "tasks", "env"):
        with wrap_call_errors(ENV_TARGET, path, name):
            there = hasattr(world, name)
        if not there:
            raise ConfigError(ENV_TARGET, path, f"has no {name}, which aem_exp.envs.World asks for")
        if name in ("tasks", "env") and not callable(getattr(world, name)):
            raise ConfigError(ENV_TARGET, path, f"its {name} must be a method")
    names = [] if isinstance(world.splits, str) or not isinstance(world.splits, Iterable) else list(world.splits)
    if not isinstance(world.fingerprint, str) or "train" not in names:
        remedy = "must have a text as its fingerprint, and a tuple of names, train among them, as its splits"
        raise ConfigError(ENV_TARGET, path, remedy)
    if names == ["train"]:
        raise ConfigError(ENV_TARGET, path, "its splits must name held-out panels beside train, such as dev and test")
    return world
