"""The environment of ALFWorld: plays one game at a time by text commands."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from aem_exp.envs import Task, Turn, parsing
from aem_exp.envs.alfworld.engine import Engine

MAX_COMMAND_CHARACTERS: Final = 100  # longest command; later prompts quote it
HIDDEN_COMMAND: Final = "help"  # admissible, but useless to a policy


class AlfWorldEnv:
    """One game at a time; `load_game` reads the game file of a task."""

    def __init__(self, load_game: Callable[[Task], Mapping[str, Any]], tags: bool, reward: float):
        self._load_game, self._tags, self._reward = load_game, tags, reward
        self._engine = Engine()
        self.goal = ""

    def parse(self, response: str) -> str:
        return self._parse_command(response)[0]

    def reset(self, task: Task) -> Turn:
        self.task = task
        self._state = self._engine.start(self._load_game(task))
        self.observations = [self._state.text]
        self.places = [
            command.removeprefix("go to ") for command in self._state.commands if command.startswith("go to ")
        ]
        self.goal = self._state.text.partition("Your task is to: ")[2].strip()
        return self._turn(metrics={"won": float(self._state.won)})

    def step(self, response: str) -> Turn:
        (command, valid), previous = self._parse_command(response), self._state
        valid = valid and (self._tags or self._engine.matches_grammar(command))
        admissible = command in previous.commands and not previous.won
        if not previous.won:
            self._state = self._engine.step(command)
            self.observations.append(self._state.text)
        won = self._state.won
        metrics = {"won": float(won), "format_valid": float(valid), "admissible": float(admissible)}
        return self._turn(self._reward if won and not previous.won else 0.0, valid, metrics)

    def close(self) -> None:
        self._engine.close()

    @property
    def commands(self) -> tuple[str, ...]:
        """The admissible commands that a policy sees."""
        return tuple(command for command in self._state.commands if command != HIDDEN_COMMAND)

    def _turn(self, reward: float = 0.0, valid: bool = True, metrics: Mapping[str, float] | None = None) -> Turn:
        state = self._state
        return Turn(state.text, reward, state.won, valid=valid, actions=self.commands, metrics=dict(metrics or {}))

    def _parse_command(self, response: str) -> tuple[str, bool]:
        return parsing.parse_response(response, MAX_COMMAND_CHARACTERS, self._tags)
