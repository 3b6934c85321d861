"""Software-repair environments: an agent with tools works on a repository in a sandbox, and its patch is graded in a fresh
one.

Decided here: what an episode is, when it is graded, its reward, and a world of generated repositories that needs no image
and no download.
"""

import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingOnThisMachine, unknown_key_error
from aem_exp.envs import LazyTasks, Task, Turn, split_sizes
from aem_exp.envs.swe import generated, grading, tools
from aem_exp.envs.swe.rows import Instance, parse_instance
from aem_exp.envs.swe.tools import InvalidCall, ToolCall, Tools
from aem_exp.sandboxes import HOST, Backend, Image, Limits, Sandbox, SandboxBroken, SandboxLost

RULES_VERSION: Final = 1  # raise when the same task would play differently
SETUP_SECONDS: Final = 120.0  # seconds to make a sandbox the agent's
MAX_QUOTED_CHARACTERS: Final = 4000  # characters of a response that later prompts quote
# What the agent has configured, or left in the way, is not asked.
GIT: Final = "git -c core.fsmonitor=false -c diff.noprefix=false -c diff.mnemonicPrefix=false"
# A tree of all that lies there at first, whatever is committed; the agent's own index stays as it is.
STAGE_COMMAND: Final = (
    "export GIT_INDEX_FILE=/tmp/.index.$RANDOM$RANDOM$RANDOM; test -f .git/index && cp -p .git/index $GIT_INDEX_FILE;"
    f" {GIT} add -A --ignore-errors 2>/dev/null"
)
SNAPSHOT_COMMAND: Final = f"{STAGE_COMMAND}; git write-tree"
DIFF_OPTIONS: Final = "--binary --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/"
DIFF_COMMAND: Final = f"{STAGE_COMMAND}; {GIT} diff --cached {DIFF_OPTIONS} {{tree}} 2>/dev/null"
PATCH_SECONDS: Final = 30.0  # seconds for it: a filter of the agent's may take for ever


class RepositoryEnv:
    """One repository at a time, in a sandbox. `graded`: what is done is worth something; demonstrations need no verdict."""

    def __init__(self, world: "Repositories", graded: bool = True):
        self._world, self._is_graded = world, graded
        self._sandbox: Sandbox | None = None
        self.goal = ""

    def parse(self, response: str) -> str:
        try:
            return str(tools.parse_call(response))
        except InvalidCall:
            return response.strip()[:MAX_QUOTED_CHARACTERS]

    def reset(self, task: Task) -> Turn:
        self.close()
        self.task, self.instance = task, self._world.instance(task)
        self.goal, self.turns_taken, self.last_observation = self.instance.statement, 0, ""
        self._started_at, self._is_over = time.monotonic(), False
        self._sandbox = self._world.open(self.instance.image)
        self._sandbox.start()
        self._set_up()
        self._tools = Tools(self._sandbox, self._world.command_seconds)
        return self._turn(self._tools.execute(ToolCall("file_editor", {"command": "view", "path": "."}), SETUP_SECONDS))

    def step(self, response: str) -> Turn:
        left = self._world.episode_seconds - (time.monotonic() - self._started_at)
        if self._is_over:
            return Turn("", terminated=True, valid=False, metrics={"won": 0.0})
        self.turns_taken += 1
        try:
            call = tools.parse_call(response)
        except InvalidCall as mistake:
            return self._grade_last_turn(self._turn(f"ERROR: {mistake}", valid=False))
        if left <= 0:
            self._is_over = True
            return self._turn("The time is up.", truncated=True)
        if call.tool == "finish":
            return self._grade(self._turn("", terminated=True))
        try:
            return self._grade_last_turn(self._turn(self._tools.execute(call, left)))
        except SandboxBroken:
            return self._grade(self._turn("No command can begin in your working directory any more.", terminated=True))

    def close(self) -> None:
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()

    def _turn(self, observation: str, terminated: bool = False, truncated: bool = False, valid: bool = True) -> Turn:
        self.last_observation = observation
        metrics = {"won": 0.0, "format_valid": float(valid)} if self.turns_taken else {"won": 0.0}
        return Turn(observation, 0.0, terminated, truncated, valid, metrics=metrics)

    def _grade_last_turn(self, turn: Turn) -> Turn:
        """The turn, graded where it was the last one that there is."""
        return self._grade(turn) if self.turns_taken >= self._world.turns else turn

    def _grade(self, turn: Turn) -> Turn:
        """Grade what the agent leaves behind, in a fresh sandbox."""
        self._is_over = True
        if not self._is_graded:
            return replace(turn, terminated=True)
        patch = self._extract_patch()
        self.close()  # before the next one is opened: both would take memory
        with self._world.open(self.instance.image) as fresh:
            verdict, _ = grading.grade(fresh, self.instance, patch, self._world.tests_seconds)
        won = float(verdict == "resolved")
        shares = {f"end_{name}": float(name == verdict) for name in grading.VERDICTS}
        return replace(turn, reward=won * self._world.reward, metrics={**turn.metrics, "won": won, **shares})

    def _set_up(self) -> None:
        assert self._sandbox is not None
        ran = self._sandbox.run(
            f"{self.instance.setup_script}\n{SNAPSHOT_COMMAND}", SETUP_SECONDS, self.instance.setup_input
        )
        self._tree = (ran.text.strip().splitlines() or [""])[-1]
        if ran.code or not re.fullmatch(r"[0-9a-f]{40,64}", self._tree):
            raise SandboxLost(f"{self.instance.id} could not be laid out: {ran.text.strip()[-300:]}")

    def _extract_patch(self) -> bytes:
        """What was changed, new files included. Without a repository any more, or a way into it, there is nothing."""
        assert self._sandbox is not None
        try:
            ran = self._sandbox.run(DIFF_COMMAND.format(tree=self._tree), PATCH_SECONDS)
        except SandboxBroken:
            return b""
        return b"" if ran.code or ran.stop_reason else ran.output


class Repositories:
    """What worlds of repositories share.

    Args:
        sandbox: where commands run; see `aem_exp.sandboxes`.
        limits: of each sandbox, as `sandboxes.Limits` names them; what is left out is as it says.
        turns: of an episode: `env.max_turns`; the last one is graded, finished or not.
        command_seconds, tests_seconds, episode_seconds: the longest that a command, grading and all of it may take.
        reward: for a patch that resolves.
    """

    splits = ("train", "dev", "test")
    external = True  # a sandbox for each environment

    def __init__(
        self,
        sandbox: Backend,
        limits: Mapping[str, int] | None,
        turns: int,
        command_seconds: float,
        tests_seconds: float,
        episode_seconds: float,
        reward: float,
    ):
        known = vars(Limits())
        for name, value in (limits or {}).items():
            if name not in known:
                raise unknown_key_error(f"env.make.limits.{name}", value, known)
            if value < 1:
                raise ConfigError(f"env.make.limits.{name}", value, "must be a whole number above 0")
        for name, number in (("turns", turns), ("command_seconds", command_seconds), ("tests_seconds", tests_seconds)):
            if number <= 0:
                raise ConfigError(f"env.make.{name}", number, "must be above 0")
        grading.check_installed()
        if why := sandbox.missing():
            raise MissingOnThisMachine("env.make.sandbox", type(sandbox).__name__.lower(), why)
        self.sandbox, self.limits, self.turns, self.reward = sandbox, Limits(**(limits or {})), turns, reward
        self.command_seconds, self.tests_seconds, self.episode_seconds = command_seconds, tests_seconds, episode_seconds

    def env(self) -> RepositoryEnv:
        return RepositoryEnv(self)

    def open(self, image: Image) -> Sandbox:
        if why := self.sandbox.lacks(image.name):
            raise SandboxLost(why)
        return self.sandbox.open(image, self.limits)

    def tasks(self, split: str) -> Sequence[Task]:
        raise NotImplementedError

    def instance(self, task: Task) -> Instance:
        raise NotImplementedError

    def oracle(self, env: RepositoryEnv) -> str:
        """The response of a player who has the gold patch."""
        gold = env.instance.gold_patch
        if env.turns_taken or not gold:
            return str(ToolCall("finish", {}))
        return str(ToolCall("execute_bash", {"command": f"git apply - <<'GOLD'\n{gold.rstrip(chr(10))}\nGOLD"}))

    def _digest(self, *things: Any) -> str:
        played = [
            vars(self.limits),
            self.turns,
            self.command_seconds,
            self.tests_seconds,
            self.episode_seconds,
            self.reward,
        ]
        how = json.dumps(
            [RULES_VERSION, played, importlib.metadata.version("swebench"), *things], sort_keys=True, default=list
        )
        return hashlib.sha256(how.encode()).hexdigest()[:12]


# Repositories made here.


class Made(Repositories):
    """Small repositories with a bug each; the machine's own Python and git, read-only, serve as their image.

    Args:
        modules, functions: of a package: how much there is to look at.
        sizes: tasks per split.
    """

    def __init__(
        self,
        sandbox: Backend,
        limits: dict[str, int] | None = None,
        modules: int = 3,
        functions: int = 3,
        turns: int = 8,
        command_seconds: float = 20.0,
        tests_seconds: float = 30.0,
        episode_seconds: float = 300.0,
        reward: float = 1.0,
        sizes: dict[str, int] | None = None,
    ):
        for field, number, most in (("modules", modules, len(generated.MODULES)), ("functions", functions, 4)):
            if not 1 <= number <= most:
                raise ConfigError(f"env.make.{field}", number, f"choose 1 to {most}")
        self.sizes = split_sizes({"train": 4096, "dev": 32, "test": 32}, sizes)
        super().__init__(sandbox, limits, turns, command_seconds, tests_seconds, episode_seconds, reward)
        self.modules, self.functions = modules, functions
        versions = [sys.version_info[:2], importlib.metadata.version("pytest")]
        self.fingerprint = f"swe-{self._digest(modules, functions, generated.fingerprint_parts(), versions)}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        return LazyTasks(self.sizes[split], lambda index: self._task(f"{split}-{index}"))

    def instance(self, task: Task) -> Instance:
        made = self._generate(task.id)
        return replace(
            parse_instance(made.row, task.id),
            image=host_image(),
            setup_script=generated.SETUP_SCRIPT,
            setup_input=made.stream,
        )

    def rehearse(self) -> RepositoryEnv:
        """An environment for demonstrations, which nobody grades."""
        return RepositoryEnv(self, graded=False)

    def words(self) -> Iterable[str]:
        """Everything a policy of this world reads or writes: words, and fixed wordings that may be one token."""
        return generated.words()

    def expert(self, env: RepositoryEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of a player who looks where the issue points, and knows each wrong line: with probability `noise` it
        looks or writes anywhere; and with probability `shyness` it repairs the line with another one that is wrong too."""
        path, found = generated.find_path(env.goal), generated.find_wrong_line(env.last_observation)
        if random.random() < noise:
            path, found = generated.choose_path(random), None
        if env.turns_taken and " is changed:" in env.last_observation:
            return str(ToolCall("finish", {}))
        if found is None:
            return generated.format_call(ToolCall("file_editor", {"command": "view", "path": path}))
        wrong, right = found
        new = generated.choose_wrong_line(wrong, random) if random.random() < shyness else right
        return generated.format_call(
            ToolCall("file_editor", {"command": "str_replace", "path": path, "old_str": wrong, "new_str": new})
        )

    def _task(self, name: str) -> Task:
        return Task(name, kind=self._generate(name).family)

    def _generate(self, name: str) -> generated.GeneratedInstance:
        return generated.generate(name, self.modules, self.functions)


@cache
def host_image() -> Image:
    """This machine's system with this Python, of whose packages only pytest can be imported."""
    base, site = Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))
    own = [] if base == Path("/usr") else [str(base)]
    hidden = [*base.glob("lib/python3*/site-packages"), *Path("/usr/lib").glob("python3*/dist-packages")]
    hidden += Path("/usr/local/lib").glob("python3*/*-packages")
    env = {
        "PATH": f"{base}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    shown = [*own, *(str(site / name) for name in _package_files("pytest"))]
    return Image(HOST, tuple(shown), tuple(str(path) for path in hidden if path != site and path.is_dir()), env)


def _package_files(name: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """Files and folders in site-packages of a package and of what it needs."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # needed elsewhere: on Windows, by an older Python
        return []
    tops = {file.parts[0] for file in found.files or () if not file.parts[0].startswith(("..", "__pycache__"))}
    wanted = [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in found.requires or () if "extra ==" not in need]
    below = [path for need in wanted if need not in seen for path in _package_files(need, seen | {name})]
    return sorted({*tops, *below})
