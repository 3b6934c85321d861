"""Serves the household environment with OpenEnv's own server: `python openenv_server.py PORT`."""

import sys
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

from aem_exp.envs.household import Household

WORLD = Household(kinds=["pick_and_place"], receptacles=3, openable=1, copies=1, objects=2)


class TextAction(Action):
    text: str


class TextObservation(Observation):
    text: str
    actions: list[str]


class House(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.env = WORLD.env()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> TextObservation:
        return self._convert(self.env.reset(WORLD.tasks("train")[(seed or 0) % len(WORLD.tasks("train"))]))

    def step(self, action: TextAction, timeout_s: float | None = None, **_: Any) -> TextObservation:
        if action.text == "break":
            raise RuntimeError("the house burnt down")
        return self._convert(self.env.step(action.text))

    @property
    def state(self) -> State:
        return State()

    def _convert(self, turn: Any) -> TextObservation:
        return TextObservation(text=turn.observation, actions=list(turn.actions), reward=turn.reward, done=turn.done)


if __name__ == "__main__":
    app = create_app(House, TextAction, TextObservation, env_name="house", max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
