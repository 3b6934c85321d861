"""The tasks of a split, and the panel of held-out tasks that a policy is evaluated on."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from aem_exp.core.errors import ConfigError
from aem_exp.core.user_code import wrap_call_errors, wrap_result_errors
from aem_exp.envs import Task, World
from aem_exp.envs.executor import serialize_task

ENV_TARGET = "env.make._target_"


@dataclass(frozen=True)
class Panel:
    """`hash` covers ids, seeds and payloads of the tasks, in order."""

    name: str
    tasks: Sequence[Task]
    hash: str


def build_panel(
    world: World, name: str, tasks: int = 0, fields: Sequence[str] = ("evaluation.panel", "evaluation.tasks")
) -> Panel:
    """The panel of a split; `tasks` > 0 takes only its first ones, and its name then includes their number.

    Raises:
        ConfigError: there is no such panel, or not so many tasks in it; `fields` are the settings that asked.
    """
    if name == "train":
        raise ConfigError(fields[0], name, "must name a panel of held-out tasks, such as dev or test")
    if name not in world.splits:
        raise ConfigError(fields[0], name, [split for split in world.splits if split != "train"])
    full = list_tasks(world, name)
    if tasks > len(full) or not len(full):
        raise ConfigError(fields[1], tasks, f"the panel {name!r} has {len(full)} tasks")
    chosen = select_tasks(world, name, full, range(tasks or len(full)))
    twice = next((i for i, count in Counter(task.id for task in chosen).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(fields[0], name, f"two of its tasks have the id {twice!r}; each must have its own")
    text = json.dumps([asdict(task) for task in chosen], sort_keys=True)
    return Panel(f"{name}[:{tasks}]" if tasks else name, chosen, sha256(text.encode()).hexdigest()[:12])


def list_tasks(world: World, split: str) -> Sequence[Task]:
    """The tasks of a split, as the world has them.

    Raises:
        ConfigError: the world has something else.
    """
    path, call = world_path(world), f"tasks({split!r})"
    with wrap_call_errors(ENV_TARGET, path, call, world.tasks):
        tasks: Any = world.tasks(split)
    if isinstance(tasks, str | Mapping) or not (hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__")):
        remedy = f"{call} must return a list of tasks, or aem_exp.envs.LazyTasks, not a {type(tasks).__name__}"
        raise ConfigError(ENV_TARGET, path, remedy)
    return tasks


def select_tasks(world: World, split: str, tasks: Sequence[Task], chosen: Iterable[int]) -> list[Task]:
    """Some tasks of a split.

    Raises:
        ConfigError: they cannot be made, or are none.
    """
    path, call = world_path(world), f"tasks({split!r})"
    with wrap_call_errors(ENV_TARGET, path, call, world.tasks):
        selected = [tasks[index] for index in chosen]
    for task in selected:
        if not isinstance(task, Task):
            remedy = f"{call} must hold aem_exp.envs.Task, not {type(task).__name__}"
            raise ConfigError(ENV_TARGET, path, remedy)
        with wrap_result_errors(ENV_TARGET, path, world.tasks, f"{call}: "):
            for field, kind in (("id", str), ("seed", int), ("kind", str)):
                if not isinstance(value := getattr(task, field), kind):
                    raise TypeError(f"the {field} of a task must be a {kind.__name__}, not {type(value).__name__}")
            serialize_task(task)
    return selected


def world_path(world: World) -> str:
    """What a config calls the world."""
    return f"{type(world).__module__}.{type(world).__qualname__}"
