"""Base classes of adapters to environments of other libraries.

Each task is a seed, the policy names its actions, and the total reward of an episode decides success.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from aem_exp.core.errors import ConfigError
from aem_exp.envs import LazyTasks, Task, Turn, parsing, split_sizes

MAX_ACTION_CHARACTERS: Final = 2000  # longest action
FIRST_SEEDS: Final = {"train": 0, "dev": 10**6, "test": 2 * 10**6}  # the first seed of each split


class AdapterEnv:
    """One environment of another library, with text as observations and actions.

    A response that names none of the world's `actions` is invalid and changes nothing. If `actions` is None, any text is an
    action.
    """

    def __init__(self, world: "AdapterWorld"):
        self._world = world
        self.goal = world.goal
        self._is_over = True

    def parse(self, response: str) -> str:
        return self._parse_action(response)[0]

    def reset(self, task: Task) -> Turn:
        self._total_reward, self._is_over = 0.0, False
        self._observation = self.start_game(task.seed)
        return self._turn(metrics={"won": 0.0})

    def step(self, response: str) -> Turn:
        action, valid = self._parse_action(response)
        actions = self._world.actions
        admissible = valid and not self._is_over and (actions is None or action in actions)
        reward, terminated, truncated = 0.0, self._is_over, False
        if admissible:
            self._observation, reward, terminated, truncated = self.apply_action(
                action if actions is None else actions[action]
            )
            self._total_reward += reward
            self._is_over = terminated or truncated
        won = self._is_over and self._total_reward >= self._world.wins
        metrics = {"won": float(won), "format_valid": float(valid), "admissible": float(admissible)}
        return self._turn(self._world.reward * reward, terminated, truncated, admissible, metrics)

    def start_game(self, seed: int) -> str:
        """Start a game and return its first observation."""
        raise NotImplementedError

    def apply_action(self, action: Any) -> tuple[str, float, bool, bool]:
        """Take an action. Returns observation, reward, terminated, truncated."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _parse_action(self, response: str) -> tuple[str, bool]:
        if self._world.tags or self._world.actions is not None:
            return parsing.parse_response(response, MAX_ACTION_CHARACTERS, self._world.tags)
        return response[:MAX_ACTION_CHARACTERS], bool(response.strip()) and len(response) <= MAX_ACTION_CHARACTERS

    def _turn(
        self,
        reward: float = 0.0,
        terminated: bool = False,
        truncated: bool = False,
        valid: bool = True,
        metrics: Mapping[str, float] | None = None,
    ) -> Turn:
        actions = None if self._world.actions is None else tuple(self._world.actions)
        return Turn(self._observation, reward, terminated, truncated, valid, actions, dict(metrics or {}))


class AdapterWorld:
    """Games of one environment; each task is a seed.

    Args:
        actions: name -> action; None: the environment takes text.
        goal: the goal of a game. Prompts quote it.
        wins: an episode is a success if its total reward is at least this.
        tags: responses must be `<think>..</think><action>..</action>`.
        reward: factor for the environment's rewards.
        sizes: tasks per split.
    """

    splits = tuple(FIRST_SEEDS)

    def __init__(
        self,
        actions: Mapping[str, Any] | None,
        goal: str,
        wins: float,
        tags: bool,
        reward: float,
        sizes: Mapping[str, int] | None,
    ):
        self.actions = None if actions is None else {name.lower(): value for name, value in actions.items()}
        self.goal, self.wins, self.tags, self.reward = goal, wins, tags, reward
        self.sizes = split_sizes({"train": 4096, "dev": 128, "test": 128}, sizes, FIRST_SEEDS["dev"])
        if not goal.strip():
            raise ConfigError("env.make.goal", goal, "must describe the goal of a game; prompts quote it")

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in FIRST_SEEDS:
            raise ConfigError("split", split, choices=FIRST_SEEDS)
        return LazyTasks(self.sizes[split], lambda index: Task(f"{split}-{index}", seed=FIRST_SEEDS[split] + index))
