"""The worlds of repositories: the base class of real and generated ones, and the generated world.

Generated repositories need no image and no download, and are handled like the real ones of `swebench`.
"""

import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingOnThisMachine, unknown_key_error
from aem_exp.envs import LazyTasks, Task, split_sizes
from aem_exp.envs.audit import Forgery
from aem_exp.envs.swe import expert, generated, official, vocabulary
from aem_exp.envs.swe.bugs import MODULES
from aem_exp.envs.swe.env import RepositoryEnv
from aem_exp.envs.swe.forgeries import list_forgeries
from aem_exp.envs.swe.grade import GRADERS, Grader
from aem_exp.envs.swe.rows import Instance, parse_instance
from aem_exp.envs.swe.tools import ToolCall
from aem_exp.sandboxes import HOST, Backend, Image, Limits, Sandbox, SandboxLost

RULES_VERSION: Final = 1  # raise when the same task would play differently
AUDIT_VERSION: Final = 1  # raise when the audited grade changes


class Repositories:
    """Base class of worlds of repositories.

    Args:
        sandbox: the backend in which commands run; see `aem_exp.sandboxes`.
        limits: limits of each sandbox, with the names and defaults of `sandboxes.Limits`.
        turns: turns of an episode, equal to `env.max_turns`. After the last turn the patch is graded, even without `finish`.
        command_seconds: time limit of a command.
        tests_seconds: time limit of the tests in grading.
        episode_seconds: time limit of an episode.
        reward: paid for a patch that resolves the issue.
        grader: `official`, the benchmark's own rule, or `audited`, a run that a patch can hardly forge (see `grade`).
        review: run the tests of a resolved patch once more, to look for signs of forgery (metric `end_flagged`, see `review`).
    """

    splits = ("train", "dev", "test")
    external = True  # each environment starts a sandbox

    def __init__(
        self,
        sandbox: Backend,
        limits: Mapping[str, int] | None,
        turns: int,
        command_seconds: float,
        tests_seconds: float,
        episode_seconds: float,
        reward: float,
        grader: Grader = "official",
        review: bool = False,
    ):
        if grader not in GRADERS:
            raise ConfigError("env.make.grader", grader, choices=GRADERS)
        defaults = vars(Limits())
        for name, value in (limits or {}).items():
            if name not in defaults:
                raise unknown_key_error(f"env.make.limits.{name}", value, defaults)
            if value < 1:
                raise ConfigError(f"env.make.limits.{name}", value, "must be a whole number above 0")
        for name, number in (("turns", turns), ("command_seconds", command_seconds), ("tests_seconds", tests_seconds)):
            if number <= 0:
                raise ConfigError(f"env.make.{name}", number, "must be above 0")
        official.check_installed()
        if reason := sandbox.missing():
            raise MissingOnThisMachine("env.make.sandbox", type(sandbox).__name__.lower(), reason)
        self.sandbox, self.limits, self.turns, self.reward = sandbox, Limits(**(limits or {})), turns, reward
        self.grader: Grader = grader
        self.review = review
        self.command_seconds, self.tests_seconds, self.episode_seconds = command_seconds, tests_seconds, episode_seconds

    def env(self) -> RepositoryEnv:
        return RepositoryEnv(self)

    def open(self, image: Image) -> Sandbox:
        if reason := self.sandbox.lacks(image.name):
            raise SandboxLost(reason)
        return self.sandbox.open(image, self.limits)

    def tasks(self, split: str) -> Sequence[Task]:
        raise NotImplementedError

    def instance(self, task: Task) -> Instance:
        raise NotImplementedError

    def oracle(self, env: RepositoryEnv) -> str:
        """The response of an expert that has the gold patch."""
        gold = env.instance.gold_patch
        if env.turns_taken or not gold:
            return str(ToolCall("finish", {}))
        return str(ToolCall("execute_bash", {"command": f"git apply - <<'GOLD'\n{gold.rstrip(chr(10))}\nGOLD"}))

    def forgeries(self, task: Task) -> list[Forgery]:
        """Episodes with a known result, for the audit of the grader."""
        return list_forgeries(self.instance(task))

    def _digest(self, *things: Any) -> str:
        seconds = [self.command_seconds, self.tests_seconds, self.episode_seconds]
        rules = [vars(self.limits), self.turns, *seconds, self.reward]
        versions = importlib.metadata.version("swebench")
        if self.grader != "official":  # runs from before there was another grader keep their fingerprint
            things = (*things, self.grader, AUDIT_VERSION)
        text = json.dumps([RULES_VERSION, rules, versions, *things], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Made(Repositories):
    """Small generated repositories with one bug each. They use the machine's own Python and git, read-only, instead of an image.

    Args:
        modules: number of modules in a package.
        functions: largest number of functions in a module.
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
        grader: Grader = "official",
        review: bool = False,
    ):
        for field, number, most in (("modules", modules, len(MODULES)), ("functions", functions, 4)):
            if not 1 <= number <= most:
                raise ConfigError(f"env.make.{field}", number, f"choose 1 to {most}")
        self.sizes = split_sizes({"train": 4096, "dev": 32, "test": 32}, sizes)
        super().__init__(
            sandbox, limits, turns, command_seconds, tests_seconds, episode_seconds, reward, grader, review
        )
        self.modules, self.functions = modules, functions
        versions = [sys.version_info[:2], importlib.metadata.version("pytest")]
        self.fingerprint = f"swe-{self._digest(modules, functions, generated.fingerprint_parts(), versions)}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        return LazyTasks(self.sizes[split], lambda index: self._task(f"{split}-{index}"))

    def instance(self, task: Task) -> Instance:
        generated_instance = self._generate(task.id)
        return replace(
            parse_instance(generated_instance.row, task.id),
            image=host_image(),
            setup_script=generated.SETUP_SCRIPT,
            setup_input=generated_instance.stream,
        )

    def rehearse(self) -> RepositoryEnv:
        """An environment for demonstrations. It does not grade patches."""
        return RepositoryEnv(self, graded=False)

    def words(self) -> Iterable[str]:
        """Everything that a policy reads or writes in this world: words, and lines that are one token each."""
        return vocabulary.words()

    def expert(self, env: RepositoryEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted expert.

        With probability `noise` it views a random file. With probability `shyness` it replaces the wrong line with another wrong
        line.
        """
        return expert.next_response(env.goal, env.last_observation, env.turns_taken, random, noise, shyness)

    def _task(self, name: str) -> Task:
        return Task(name, kind=self._generate(name).family)

    def _generate(self, name: str) -> generated.GeneratedInstance:
        return generated.generate_repository(name, self.modules, self.functions)


@cache
def host_image() -> Image:
    """This machine's own system and Python. Of Python's packages, only pytest can be imported."""
    base, site = Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))
    interpreter = [] if base == Path("/usr") else [str(base)]
    hidden = [*base.glob("lib/python3*/site-packages"), *Path("/usr/lib").glob("python3*/dist-packages")]
    hidden += Path("/usr/local/lib").glob("python3*/*-packages")
    env = {
        "PATH": f"{base}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    visible = [*interpreter, *(str(site / name) for name in _package_files("pytest"))]
    return Image(HOST, tuple(visible), tuple(str(path) for path in hidden if path != site and path.is_dir()), env)


def _package_files(name: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """Files and folders in site-packages of a package and of its dependencies."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # needed only on other systems or Python versions
        return []
    top_level = {
        file.parts[0] for file in distribution.files or () if not file.parts[0].startswith(("..", "__pycache__"))
    }
    requirements = [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        for requirement in distribution.requires or ()
        if "extra ==" not in requirement
    ]
    dependencies = [
        path
        for requirement in requirements
        if requirement not in seen
        for path in _package_files(requirement, seen | {name})
    ]
    return sorted({*top_level, *dependencies})
