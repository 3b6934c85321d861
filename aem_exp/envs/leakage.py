"""Finds held-out tasks that are also training tasks.

Tasks are compared by their content (seed, kind, payload) and by how they play under the same actions. A panel is refused for
identical play only if all compared training games differ and at least half of the panel's games are among them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task

MAX_TRAIN_TASKS: Final = 128  # compared training tasks, if tasks are built on access
PROBED_PANEL_TASKS: Final = 16  # tasks of a panel whose seeds are searched for in the training tasks
MIN_GAMES: Final = 8  # fewest compared training games for which a panel can be refused for identical play


def select_indices(train: Sequence[Task], panels: Mapping[str, Sequence[Task]]) -> list[int]:
    """Indices of the training tasks to compare.

    All tasks of a list. Otherwise the first and the last ones, some in between, and those that may have the seeds of a panel.
    """
    size = len(train)
    if size <= MAX_TRAIN_TASKS or isinstance(train, list | tuple):
        return list(range(size))
    ends = [*range(MAX_TRAIN_TASKS // 2), *range(size - MAX_TRAIN_TASKS // 4, size)]
    between = range(0, size, size // (MAX_TRAIN_TASKS // 4))
    first = getattr(train[0], "seed", 0)
    aimed = [task.seed - first for held_out in panels.values() for task in held_out[:PROBED_PANEL_TASKS]]
    return list(dict.fromkeys([*ends, *between, *(index for index in aimed if 0 <= index < size)]))


def check_shared_tasks(env: str, train: Sequence[Task], panels: Mapping[str, Sequence[Task]]) -> None:
    """Compare the content of training tasks and panel tasks.

    Raises:
        ConfigError: a task is in both.
    """
    train_keys = {_task_key(task, task.id): task for task in train}
    by_seed = {_task_key(task): task for task in train} if len({task.seed for task in train}) > 1 else {}
    for split, held_out in panels.items():
        for task in held_out:
            if _task_key(task, task.id) in train_keys:
                raise ConfigError(f"env {env}", task.id, f"this task is in train and in the panel {split}")
            if duplicate := by_seed.get(_task_key(task)):
                problem = (
                    f"this task of the panel {split} has the seed, kind and payload of the training task {duplicate.id}"
                )
                raise ConfigError(
                    f"env {env}", task.id, f"{problem}: it is the same game; give each split its own seeds"
                )


def check_identical_games(
    env: str, train: Mapping[str, tuple[Any, ...]], panels: Mapping[str, Mapping[str, tuple[Any, ...]]]
) -> None:
    """Compare how training tasks and panel tasks play.

    Args:
        train: task id -> goal, observations and rewards of a game.
        panels: the same for each panel.

    Raises:
        ConfigError: at least half of the games of a panel are also games of training tasks.
    """
    train_games = {game: name for name, game in train.items()}
    if len(train) < MIN_GAMES or len(train_games) < len(train):
        return
    for split, held_out in panels.items():
        duplicates = [(name, train_games[game]) for name, game in held_out.items() if game in train_games]
        if duplicates and 2 * len(duplicates) >= len(held_out):
            problem = f"plays exactly as the training task {duplicates[0][1]} (same goal, observations and rewards)"
            share = f"{len(duplicates)} of {len(held_out)} games of the panel {split} are training games"
            raise ConfigError(f"env {env}", duplicates[0][0], f"{problem}; {share}, with other ids and seeds")


def _task_key(task: Task, name: str = "") -> str:
    return json.dumps([name, task.seed, task.kind, task.payload], sort_keys=True)
