"""Adapter to Gymnasium, for any environment whose observations or renderings are text."""

import re
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs import fingerprint_of
from aem_exp.envs.adapter import AdapterEnv, AdapterWorld

RULES_VERSION: Final = 2  # raise when the same task would read or play differently
_COLOUR_CODE: Final = re.compile(r"\x1b\[([\d;]*)m")
_COLOUR_NAMES: Final = {
    1: "red",
    2: "green",
    3: "yellow",
    4: "blue",
    5: "purple",
    6: "cyan",
    7: "white",
}  # by the last digit of a code


class GymnasiumEnv(AdapterEnv):
    def __init__(self, world: "Gymnasium"):
        import gymnasium

        super().__init__(world)
        self._env = gymnasium.make(world.id, **world.kwargs)

    def start_game(self, seed: int) -> str:
        observation, _ = self._env.reset(seed=seed)
        return self._text(observation)

    def apply_action(self, action: Any) -> tuple[str, float, bool, bool]:
        observation, reward, terminated, truncated, _ = self._env.step(action)
        return self._text(observation), float(reward), bool(terminated), bool(truncated)

    def close(self) -> None:
        self._env.close()

    def _text(self, observation: Any) -> str:
        text: Any = observation
        if not isinstance(text, str) and self._env.render_mode is not None:
            text = self._env.render()
        if not isinstance(text, str):
            kind = type(observation).__name__
            raise TypeError(
                f"its observations are {kind} and it renders no text; set kwargs: {{render_mode: ansi}} if it supports that"
            )
        return describe_colours(text).strip()


def describe_colours(text: str) -> str:
    """A terminal text without colour codes: coloured parts are in brackets, with the colour if there are several colours."""
    before, *rest = _COLOUR_CODE.split(text)
    pieces: list[tuple[list[str], str]] = []
    names: list[str] = []
    for codes, piece in zip(rest[::2], rest[1::2], strict=True):
        colours = [_COLOUR_NAMES.get(int(code) % 10, "") for code in codes.split(";") if len(code) > 1]
        names = [*names, *filter(None, colours)] if colours else []  # a code without colour is a reset
        pieces.append((names, piece))
    several = len({name for names, piece in pieces for name in names if piece}) > 1
    return before + "".join(
        f"[{' '.join([*names, piece] if several else [piece])}]" if names and piece else piece
        for names, piece in pieces
    )


class Gymnasium(AdapterWorld):
    """Games of a registered environment.

    Args:
        id: the id for `gymnasium.make`; `module:Name-v0` imports the module first.
        kwargs: further keywords for `gymnasium.make`.
        actions: name -> action; null: the environment takes text.
        goal: the goal of a game. Prompts quote it.
        wins: an episode is a success if its total reward is at least this.
        tags: responses must be `<think>..</think><action>..</action>`.
        reward: factor for the environment's rewards.
        sizes: tasks per split.
    """

    def __init__(
        self,
        id: str,
        kwargs: dict[str, Any] | None = None,
        actions: dict[str, Any] | None = None,
        goal: str = "reach the goal",
        wins: float = 1.0,
        tags: bool = False,
        reward: float = 1.0,
        sizes: dict[str, int] | None = None,
    ):
        super().__init__(actions, goal, wins, tags, reward, sizes)
        if find_spec("gymnasium") is None:
            raise MissingResource("env.make.id", id, f"needs Gymnasium: {install_command('gymnasium')}")
        import gymnasium

        self.id, self.kwargs = id, dict(kwargs or {})
        try:
            with warnings.catch_warnings(action="ignore"):  # the error below is enough
                env = gymnasium.make(id, **self.kwargs)
                space, mode = env.action_space, env.render_mode
                env.close()
        except Exception as error:  # Gymnasium's own errors, and any error of the environment
            reason = " ".join(str(error).split())
            raise ConfigError("env.make.id", id, f"Gymnasium cannot make this environment: {reason}") from error
        if actions is None and not isinstance(space, gymnasium.spaces.Text):
            raise ConfigError("env.make.actions", None, f"must name the actions of this environment: {space}")
        for name, action in (actions or {}).items():
            if not space.contains(action):
                raise ConfigError(f"env.make.actions.{name}", action, f"is not an action of this environment: {space}")
        if mode not in (None, "ansi"):
            remedy = "renders no text; use ansi, or leave it out if the observations are text"
            raise ConfigError("env.make.kwargs.render_mode", mode, remedy)
        settings = [RULES_VERSION, id, self.kwargs, actions, goal, wins, tags, reward, version("gymnasium")]
        self.fingerprint = fingerprint_of("gymnasium", settings)

    def env(self) -> GymnasiumEnv:
        return GymnasiumEnv(self)
