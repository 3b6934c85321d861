"""Adapter to an OpenEnv server: each environment is one session of the server."""

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from importlib.util import find_spec
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingOnThisMachine, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs.adapter import AdapterEnv, AdapterWorld

METADATA_SECONDS: Final = 10.0  # for a server to describe itself


class OpenEnvEnv(AdapterEnv):
    def __init__(self, world: "OpenEnv"):
        from openenv.core.generic_client import GenericEnvClient

        super().__init__(world)
        self._fields = world.action_field, world.observation_field
        self._session = GenericEnvClient(base_url=world.base_url, message_timeout_s=world.seconds).sync()

    def start_game(self, seed: int) -> str:
        return self._text(self._session.reset(seed=seed).observation)

    def apply_action(self, action: Any) -> tuple[str, float, bool, bool]:
        result = self._session.step({self._fields[0]: action})
        return self._text(result.observation), float(result.reward or 0.0), bool(result.done), False

    def close(self) -> None:
        self._session.close()

    def _text(self, observation: dict[str, Any]) -> str:
        if self._fields[1] not in observation:
            raise KeyError(
                f"the server's observations have no field {self._fields[1]!r}; they have {', '.join(sorted(observation))}"
            )
        return str(observation[self._fields[1]])


class OpenEnv(AdapterWorld):
    """Games of a server. Each task is a seed, and the server must use it.

    Args:
        base_url: address of the server.
        action_field: the field of the server's actions that contains the text.
        observation_field: the field of the server's observations that contains the text.
        actions: name -> value of the action field; null: the server takes text.
        goal: the goal of a game. Prompts quote it.
        wins: an episode is a success if its total reward is at least this.
        tags: responses must be `<think>..</think><action>..</action>`.
        reward: factor for the server's rewards.
        seconds: time limit of a request.
        sizes: tasks per split.
    """

    external = True  # each environment opens a session of the server

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        action_field: str = "text",
        observation_field: str = "text",
        actions: dict[str, Any] | None = None,
        goal: str = "do what the environment asks",
        wins: float = 1.0,
        tags: bool = False,
        reward: float = 1.0,
        seconds: float = 60.0,
        sizes: dict[str, int] | None = None,
    ):
        super().__init__(actions, goal, wins, tags, reward, sizes)
        if find_spec("openenv") is None:
            raise MissingResource(
                "env.make.base_url", base_url, f"needs OpenEnv's client: {install_command('openenv')}"
            )
        self.base_url, self.action_field, self.observation_field = base_url.rstrip("/"), action_field, observation_field
        self.seconds = seconds
        descriptions = [self._request_json("/metadata"), self._request_json("/schema")]
        action = (descriptions[1] or {}).get("action") if isinstance(descriptions[1], dict) else None
        fields = action.get("properties") if isinstance(action, dict) else None
        if fields and action_field not in fields:
            raise ConfigError("env.make.action_field", action_field, sorted(fields))
        settings = [descriptions, action_field, observation_field, actions, goal, wins, tags, reward]
        self.fingerprint = f"openenv-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"

    def env(self) -> OpenEnvEnv:
        return OpenEnvEnv(self)

    def _request_json(self, path: str) -> Any:
        """A description of the server; None if the server is too old to have it."""
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=METADATA_SECONDS) as answer:
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (404, 405):  # an old server
                return None
            reason = getattr(error, "reason", None) or repr(error)
            raise MissingOnThisMachine(
                "env.make.base_url", self.base_url, f"no OpenEnv server answers at this address ({reason}); start it"
            ) from error
