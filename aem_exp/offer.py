"""Command `aem-exp offer`: serves an environment as an OpenEnv server, for OpenEnv's client and everything that uses it."""

import argparse
import itertools
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from aem_exp.core import cli, extras
from aem_exp.core.errors import ConfigError, MissingResource

if TYPE_CHECKING:
    from aem_exp.config import Experiment
    from aem_exp.envs import Task, World
    from aem_exp.envs.executor import EnvExecutor, Reply

ABOUT = """\
Serve an environment as an OpenEnv server, with OpenEnv's Task API. Any client of OpenEnv can then play it. Each session has its
own environment; launch.workers=N steps them in N processes.

  python -m aem_exp.offer env=household
  python -m aem_exp.offer env=textworld_express launch.workers=4 --port 8001 --sessions 32

In a Python script:

  from openenv.core.generic_client import GenericEnvClient

  with GenericEnvClient(base_url="http://127.0.0.1:8000").sync() as env:
      result = env.reset(split="test", index=0)
      result = env.step({"text": "look"})
      print(result.observation["text"], result.reward, result.done)

The server has no authentication, so it listens only on this machine unless --host names another address.
"""
TASK_PREVIEW: Final = 1000  # largest number of tasks that one request lists
SPLIT_TYPES: Final = {"train": "train", "test": "test"}  # our split -> OpenEnv's type; all others are validation
GROUPS: Final = ("env", "launch", "experiment", "seed")


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return cli.run_cli(lambda: _run_command(_parse_arguments(sys.argv[1:] if argv is None else argv)))


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.offer", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="env=NAME, and settings of env and launch")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--sessions", type=int, default=128, help="maximum number of open sessions (default: 128)")
    parser.add_argument("--config-dir", help="folder of your own configs, which take precedence over conf/")
    arguments = parser.parse_intermixed_args(argv)
    for text in arguments.overrides:
        key = text.lstrip("+~").partition("=")[0]
        if "=" not in text or key.partition(".")[0] not in GROUPS:
            raise ConfigError("KEY=VALUE", text, f"has no effect on this command; use {', '.join(GROUPS)}")
    if not 1 <= arguments.port <= 65535:
        raise ConfigError("--port", arguments.port, "must be from 1 to 65535")
    if arguments.sessions < 1:
        raise ConfigError("--sessions", arguments.sessions, "must be at least 1")
    return arguments


def _run_command(arguments: argparse.Namespace) -> int:
    cli.add_user_modules(arguments.config_dir)
    from aem_exp import config
    from aem_exp.envs import opening
    from aem_exp.envs.workers import make_executor

    if missing := next((name for name in ("openenv", "uvicorn") if find_spec(name) is None), None):
        raise MissingResource("command", "offer", f"needs {missing}: {extras.install_command('openenv')}")
    experiment: Experiment = config.load(arguments.overrides, arguments.config_dir)
    config.check_machine(experiment)
    _check_address(arguments.host, arguments.port)
    world = opening.open_world(experiment)
    import uvicorn

    with closing(make_executor(world, experiment.env.make, experiment.launch)) as executor:
        app = make_app(world, experiment.env.name, executor, arguments.sessions)
        print(f"offer   {experiment.env.name} at http://{arguments.host}:{arguments.port}  (Ctrl-C ends it)")
        sizes = ", ".join(f"{len(world.tasks(split)):,} {split}" for split in world.splits)
        print(f"tasks   {sizes}; fingerprint {world.fingerprint}")
        print(
            f"play    python -m aem_exp env=openenv env.make.base_url=http://{arguments.host}:{arguments.port} ...",
            flush=True,
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn repeats the signal at its end
        uvicorn.run(app, host=arguments.host, port=arguments.port, log_level=logging.WARNING)
    return 0


def _check_address(host: str, port: int) -> None:
    try:
        with closing(socket.create_server((host, port))):
            pass
    except OSError as error:
        raise ConfigError("--port", port, f"cannot listen on {host}: {error.strerror}") from error


def make_app(world: "World", name: str, executor: "EnvExecutor", sessions: int) -> Any:
    """The web application of OpenEnv for this world.

    Args:
        executor: plays the episodes; each session has a slot of it.
        sessions: maximum number of open sessions.
    """
    from openenv.core.env_server.http_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State

    numbers, free, lock = itertools.count(), list[int](), threading.Lock()

    class Response(Action):
        text: str

    class Reading(Observation):
        text: str
        goal: str
        actions: list[str] | None
        valid: bool
        truncated: bool
        metrics: dict[str, float]

    class Session(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._slot: int | None = None  # Task API requests make a session, too, and need no environment
            self._state = State()
            self._can_step = False

        def reset(
            self,
            seed: int | None = None,
            episode_id: str | None = None,
            split: str = "train",
            index: int | None = None,
            **_: Any,
        ) -> Reading:
            self._can_step = False
            tasks = self._tasks(split)
            task = tasks[(seed or 0) % len(tasks)] if index is None else tasks[self._check_index(tasks, index)]
            if self._slot is None:
                with lock:
                    self._slot = free.pop() if free else next(numbers)
            self._state = State(episode_id=episode_id, step_count=0)
            return self._read(executor.reset({self._slot: task})[self._slot])

        def step(self, action: Response, timeout_s: float | None = None, **_: Any) -> Reading:
            if self._slot is None or not self._can_step:
                raise RuntimeError("the episode is over or was never started; reset first")
            self._state.step_count += 1
            return self._read(executor.step({self._slot: action.text})[self._slot])

        @property
        def state(self) -> State:
            return self._state

        def close(self) -> None:
            if self._slot is not None:
                with lock:
                    free.append(self._slot)
                self._slot = None

        def get_metadata(self) -> EnvironmentMetadata:
            return EnvironmentMetadata(name=name, description=f"{name}, served by aem_exp", version=world.fingerprint)

        def list_splits(self) -> list[dict[str, str]]:
            return [{"name": split, "type": SPLIT_TYPES.get(split, "validation")} for split in world.splits]

        def num_tasks(self, split: str) -> int:
            return len(self._tasks(split))

        def get_task(self, split: str, index: int) -> dict[str, Any]:
            tasks = self._tasks(split)
            return self._describe(tasks, self._check_index(tasks, index))

        def list_tasks(self, split: str) -> list[dict[str, Any]]:
            return self.get_task_range(split)

        def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[dict[str, Any]]:
            tasks = self._tasks(split)
            return [self._describe(tasks, i) for i in range(*slice(start, stop).indices(len(tasks)))[:TASK_PREVIEW]]

        def _read(self, reply: "Reply") -> Reading:
            turn = reply.turn
            self._can_step = turn is not None and not turn.done
            if turn is None:
                raise RuntimeError(reply.error)
            return Reading(
                text=turn.observation,
                goal=reply.goal,
                actions=None if turn.actions is None else list(turn.actions),
                valid=turn.valid,
                truncated=turn.truncated,
                metrics=turn.metrics,
                reward=turn.reward,
                done=turn.done,
            )

        def _tasks(self, split: str) -> "Sequence[Task]":
            if split not in world.splits:
                raise IndexError(f"there is no split {split!r}; the splits are {', '.join(world.splits)}")
            return world.tasks(split)

        @staticmethod
        def _check_index(tasks: "Sequence[Task]", index: int) -> int:
            if not 0 <= index < len(tasks):
                raise IndexError(f"there is no task {index}; the split has {len(tasks)}")
            return index

        @staticmethod
        def _describe(tasks: "Sequence[Task]", index: int) -> dict[str, Any]:
            return {"id": tasks[index].id, "index": index, "kind": tasks[index].kind}

    return create_fastapi_app(Session, Response, Reading, max_concurrent_envs=sessions, env_name=name)


if __name__ == "__main__":
    sys.exit(main())
