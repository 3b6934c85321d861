"""Finds held-out tasks that are also training tasks, by comparing what tasks contain (seed, kind, payload) and how they
play under the same actions.

Only if the compared training games all differ, and half of a panel's games occur among them, is a panel refused for playing
alike.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task

MAX_TRAIN_TASKS: Final = 128  # training tasks that are looked at, where they are made when asked for
PROBED_PANEL_TASKS: Final = 16  # tasks of a panel whose seeds are looked for among the others
MIN_GAMES: Final = 8  # training games that must all differ before a panel is refused for playing alike


def select_indices(train: Sequence[Task], panels: Mapping[str, Sequence[Task]]) -> list[int]:
    """Which training tasks to compare: all of a list; else the first, the last, some between, and those of a panel's seeds."""
    size = len(train)
    if size <= MAX_TRAIN_TASKS or isinstance(train, list | tuple):
        return list(range(size))
    ends = [*range(MAX_TRAIN_TASKS // 2), *range(size - MAX_TRAIN_TASKS // 4, size)]
    between = range(0, size, size // (MAX_TRAIN_TASKS // 4))
    first = getattr(train[0], "seed", 0)
    aimed = [task.seed - first for held_out in panels.values() for task in held_out[:PROBED_PANEL_TASKS]]
    return list(dict.fromkeys([*ends, *between, *(index for index in aimed if 0 <= index < size)]))


def check_shared_tasks(env: str, train: Sequence[Task], panels: Mapping[str, Sequence[Task]]) -> None:
    """Compare training tasks with those of panels by what they say.

    Raises:
        ConfigError: one is in both.
    """
    train_keys = {_task_key(task, task.id): task for task in train}
    by_seed = {_task_key(task): task for task in train} if len({task.seed for task in train}) > 1 else {}
    for split, held_out in panels.items():
        for task in held_out:
            if _task_key(task, task.id) in train_keys:
                raise ConfigError(f"env {env}", task.id, f"is a task of train and of the panel {split}")
            if duplicate := by_seed.get(_task_key(task)):
                remedy = f"seed, kind and payload are those of {duplicate.id}, a task of train, so it is the same game"
                raise ConfigError(
                    f"env {env}", task.id, f"of the panel {split}: {remedy}; give each split its own seeds"
                )


def check_identical_games(
    env: str, train: Mapping[str, tuple[Any, ...]], panels: Mapping[str, Mapping[str, tuple[Any, ...]]]
) -> None:
    """Compare training tasks with those of panels by how they played: task id -> goal, observations and rewards.

    Raises:
        ConfigError: half of the games of a panel or more are those of training tasks.
    """
    train_games = {played: name for name, played in train.items()}
    if len(train) < MIN_GAMES or len(train_games) < len(train):
        return
    for split, held_out in panels.items():
        duplicates = [(name, train_games[played]) for name, played in held_out.items() if played in train_games]
        if duplicates and 2 * len(duplicates) >= len(held_out):
            how_alike = f"plays exactly as {duplicates[0][1]} of train does: goal, observations and rewards"
            share = f"{len(duplicates)} of {len(held_out)} games of the panel {split} are games of train"
            raise ConfigError(f"env {env}", duplicates[0][0], f"{how_alike}; {share}, under other ids and seeds")


def _task_key(task: Task, name: str = "") -> str:
    return json.dumps([name, task.seed, task.kind, task.payload], sort_keys=True)
