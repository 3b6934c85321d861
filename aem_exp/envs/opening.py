"""Makes the world that a config names, and refuses it if it does not have the attributes of `aem_exp.envs.World`."""

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
        ConfigError: the world cannot be made, or an attribute is missing or has the wrong type.
    """
    make = experiment.env.make
    path = make["_target_"]
    with wrap_call_errors(ENV_TARGET, path, "making it"):
        world: World = instantiate(make)
    for name in ("fingerprint", "splits", "tasks", "env"):
        with wrap_call_errors(ENV_TARGET, path, name):
            exists = hasattr(world, name)
        if not exists:
            raise ConfigError(
                ENV_TARGET, path, f"has no attribute {name}; every world needs it (see aem_exp.envs.World)"
            )
        if name in ("tasks", "env") and not callable(getattr(world, name)):
            raise ConfigError(ENV_TARGET, path, f"{name} must be a method")
    names = [] if isinstance(world.splits, str) or not isinstance(world.splits, Iterable) else list(world.splits)
    if not isinstance(world.fingerprint, str) or "train" not in names:
        remedy = "fingerprint must be a str, and splits a tuple of names that includes train"
        raise ConfigError(ENV_TARGET, path, remedy)
    if names == ["train"]:
        raise ConfigError(ENV_TARGET, path, "splits must also name held-out panels, such as dev and test")
    return world
