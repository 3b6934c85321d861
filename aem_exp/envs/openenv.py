"""Adapter to an OpenEnv server: each environment is one session of the server.

If the server has OpenEnv's Task API, its splits and tasks are used; else a task is a seed. Fields of observations with the names
`goal`, `actions`, `valid`, `truncated` and `metrics` have the meaning that they have in a `Turn`; `aem-exp offer` serves them.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingOnThisMachine, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs import LazyTasks, Task, Turn, fingerprint_of
from aem_exp.envs.adapter import AdapterEnv, AdapterWorld

METADATA_SECONDS: Final = 10.0  # for a server to describe itself
SPLIT_OF_TYPE: Final = {"train": "train", "validation": "dev", "test": "test"}  # OpenEnv's type -> our split
CAPACITY_REACHED: Final = "CAPACITY_REACHED"  # OpenEnv's code


class OpenEnvEnv(AdapterEnv):
    """One session."""

    def __init__(self, world: "OpenEnv"):
        from openenv.core.generic_client import GenericEnvClient

        super().__init__(world)
        self._fields = world.action_field, world.observation_field
        self._session = GenericEnvClient(base_url=world.base_url, message_timeout_s=world.seconds).sync()
        self._lost = False

    def reset(self, task: Task) -> Turn:
        # OpenEnv's client opens a new session when an old one was lost.
        self._start = {"split": task.payload["split"], "index": task.payload["index"]} if task.payload else {}
        self._lost = False
        return self._add_fields(super().reset(task))

    def step(self, response: str) -> Turn:
        self._answered = False
        return self._add_fields(super().step(response))

    def start_game(self, seed: int) -> str:
        return self._read(self._request(lambda: self._session.reset(**(self._start or {"seed": seed}))))

    def apply_action(self, action: Any) -> tuple[str, float, bool, bool]:
        if self._lost:
            raise ConnectionError("the session was lost; reset it first")
        result = self._request(lambda: self._session.step({self._fields[0]: action}))
        text, truncated = self._read(result), bool(self._seen.get("truncated", False))
        return text, float(result.reward or 0.0), bool(result.done) and not truncated, bool(result.done) and truncated

    def close(self) -> None:
        self._session.close()

    def _request(self, call: Callable[[], Any]) -> Any:
        """Raises: any error of the client. The session counts as lost, because the client would silently open another one."""
        try:
            return call()
        except Exception as error:
            self._lost = True
            if CAPACITY_REACHED in str(error):
                remedy = "raise max_concurrent_envs of the server (aem-exp offer: --sessions), or play fewer episodes at once"
                raise RuntimeError(f"the server has no free session: {remedy}") from error
            raise

    def _read(self, result: Any) -> str:
        """Note the observation and return its text."""
        self._seen: dict[str, Any] = result.observation
        self._answered = True
        name = self._fields[1]
        if name not in self._seen:
            there = ", ".join(sorted(self._seen))
            raise KeyError(f"the server's observations have no field {name!r}; they have {there}")
        self.goal = str(self._seen.get("goal") or self._world.goal)
        return str(self._seen[name])

    def _add_fields(self, turn: Turn) -> Turn:
        """The turn with the fields of the last observation.

        After a response that was not sent, because it is no action, only the outcome so far is still true.
        """
        actions, own = self._seen.get("actions"), self._seen.get("metrics")
        metrics = own if isinstance(own, dict) else {}
        if not self._answered:
            metrics = {name: metrics[name] for name in ("won", "score") if name in metrics}
        return replace(
            turn,
            valid=turn.valid and (not self._answered or bool(self._seen.get("valid", True))),
            actions=turn.actions if actions is None else tuple(map(str, actions)),
            metrics=turn.metrics | metrics,
        )


class OpenEnv(AdapterWorld):
    """Games of a server.

    Args:
        base_url: address of the server.
        action_field: the field of the server's actions that contains the text.
        observation_field: the field of the server's observations that contains the text.
        actions: name -> value of the action field; null: the server takes text.
        goal: the goal of a game, unless observations state it. Prompts quote it.
        wins: an episode is a success if its total reward is at least this, unless observations have `metrics.won`.
        tags: responses must be `<think>..</think><action>..</action>`.
        reward: factor for the server's rewards.
        seconds: time limit of a request.
        sizes: tasks per split, if tasks are seeds.

    Raises:
        MissingOnThisMachine: no server answers.
        ConfigError: it is no OpenEnv server, has no training split, or lacks a field.
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
        if not all(isinstance(one, dict) for one in descriptions):
            remedy = "the server at this address does not describe an environment as OpenEnv 0.2 and newer do"
            raise ConfigError("env.make.base_url", base_url, remedy)
        action = descriptions[1].get("action")
        fields = action.get("properties") if isinstance(action, dict) else None
        if fields and action_field not in fields:
            raise ConfigError("env.make.action_field", action_field, sorted(fields))
        self._server_splits = self._find_splits()
        if self._server_splits:
            if sizes:
                raise ConfigError("env.make.sizes", sizes, "has no effect, because the server has its own tasks")
            self.splits = tuple(self._server_splits)
        settings = [descriptions, action_field, observation_field, actions, goal, wins, tags, reward]
        settings += [self._server_splits] if self._server_splits else []
        self.fingerprint = fingerprint_of("openenv", settings)

    def tasks(self, split: str) -> Sequence[Task]:
        if not self._server_splits:
            return super().tasks(split)
        if split not in self._server_splits:
            raise ConfigError("split", split, choices=self.splits)
        name, count = self._server_splits[split]
        return LazyTasks(count, lambda index: Task(f"{split}-{index}", payload={"split": name, "index": index}))

    def env(self) -> OpenEnvEnv:
        return OpenEnvEnv(self)

    def _find_splits(self) -> dict[str, tuple[str, int]]:
        """Our name of a split -> the server's name and the number of tasks; empty if the server has no Task API."""
        names = self._request_json("/list_environments")
        if not (isinstance(names, list) and names):
            return {}
        listed = self._request_json(f"/{names[0]}/splits")
        if not isinstance(listed, list) or not listed:
            return {}
        found: dict[str, tuple[str, int]] = {}
        for entry in listed:
            name, kind = str(entry["name"]), str(entry.get("type"))
            own = name if name in SPLIT_OF_TYPE.values() else SPLIT_OF_TYPE.get(kind, name)
            answer = self._request_json(f"/{names[0]}/num_tasks", {"split": name})
            found[name if own in found else own] = (name, int(answer["num_tasks"]))
        if "train" not in found:
            remedy = f"the server has no split of the type train; it has {', '.join(sorted(found))}"
            raise ConfigError("env.make.base_url", self.base_url, remedy)
        return {"train": found.pop("train"), **found}

    def _request_json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A description of the server; None if the server does not have it. A body is sent by POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (404, 405, 501):
                return None
            reason = getattr(error, "reason", None) or repr(error)
            raise MissingOnThisMachine(
                "env.make.base_url", self.base_url, f"no OpenEnv server answers at this address ({reason}); start it"
            ) from error
