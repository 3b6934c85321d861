"""Reads and checks the tasks of a split, and builds the panel of held-out tasks for an evaluation."""

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
    """Held-out tasks that evaluations use."""

    name: str
    """The split, with the number of tasks if only the first ones are used: `dev[:64]`."""
    tasks: Sequence[Task]
    hash: str
    """Covers id, seed, kind and payload of each task, and their order."""


def build_panel(
    world: World, name: str, tasks: int = 0, fields: Sequence[str] = ("evaluation.panel", "evaluation.tasks")
) -> Panel:
    """The panel of a split.

    Args:
        name: the split.
        tasks: use only the first ones; 0: all.
        fields: the settings of `name` and `tasks`, for errors.

    Raises:
        ConfigError: there is no such panel, or it has too few tasks, or two tasks with the same id.
    """
    if name == "train":
        raise ConfigError(fields[0], name, "must be a panel of held-out tasks, such as dev or test")
    if name not in world.splits:
        raise ConfigError(fields[0], name, [split for split in world.splits if split != "train"])
    full = list_tasks(world, name)
    if tasks > len(full) or not len(full):
        raise ConfigError(fields[1], tasks, f"the panel {name!r} has {len(full)} tasks")
    chosen = select_tasks(world, name, full, range(tasks or len(full)))
    duplicate = next((i for i, count in Counter(task.id for task in chosen).items() if count > 1), None)
    if duplicate is not None:
        raise ConfigError(fields[0], name, f"two tasks have the id {duplicate!r}; give each task its own id")
    text = json.dumps([asdict(task) for task in chosen], sort_keys=True)
    return Panel(f"{name}[:{tasks}]" if tasks else name, chosen, sha256(text.encode()).hexdigest()[:12])


def list_tasks(world: World, split: str) -> Sequence[Task]:
    """The tasks of a split, as the world returns them.

    Raises:
        ConfigError: the world raised an error or returned no sequence.
    """
    path, call = world_path(world), f"tasks({split!r})"
    with wrap_call_errors(ENV_TARGET, path, call, world.tasks):
        tasks: Any = world.tasks(split)
    if isinstance(tasks, str | Mapping) or not (hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__")):
        remedy = f"{call} must return a list of tasks or aem_exp.envs.LazyTasks, not a {type(tasks).__name__}"
        raise ConfigError(ENV_TARGET, path, remedy)
    return tasks


def select_tasks(world: World, split: str, tasks: Sequence[Task], chosen: Iterable[int]) -> list[Task]:
    """The tasks of a split at the chosen indices, checked.

    Raises:
        ConfigError: a task cannot be built, or is not a valid `Task`.
    """
    path, call = world_path(world), f"tasks({split!r})"
    with wrap_call_errors(ENV_TARGET, path, call, world.tasks):
        selected = [tasks[index] for index in chosen]
    for task in selected:
        if not isinstance(task, Task):
            remedy = f"{call} must contain aem_exp.envs.Task, not {type(task).__name__}"
            raise ConfigError(ENV_TARGET, path, remedy)
        with wrap_result_errors(ENV_TARGET, path, world.tasks, f"{call}: "):
            for field, kind in (("id", str), ("seed", int), ("kind", str)):
                if not isinstance(value := getattr(task, field), kind):
                    raise TypeError(f"the {field} of a task must be a {kind.__name__}, not {type(value).__name__}")
            serialize_task(task)
    return selected


def world_path(world: World) -> str:
    """The dotted path of a world's class, as a config names it."""
    return f"{type(world).__module__}.{type(world).__qualname__}"
