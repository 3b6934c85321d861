"""The environment of repositories: an agent works with tools in a sandbox, and its patch is graded in another sandbox.

An episode is graded when the agent calls `finish` or has used its last turn. An episode that takes longer than `episode_seconds`
is stopped and not graded. If an agent makes its own sandbox unusable, its episode ends as a failure without a patch.
"""

import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aem_exp.envs import Task, Turn
from aem_exp.envs.swe import grading, tools
from aem_exp.envs.swe.tools import InvalidCall, ToolCall, Tools
from aem_exp.sandboxes import Sandbox, SandboxBroken, SandboxLost

if TYPE_CHECKING:
    from aem_exp.envs.swe.world import Repositories

SETUP_SECONDS: Final = 120.0  # to prepare the repository in a sandbox
MAX_QUOTED_CHARACTERS: Final = 4000  # later prompts quote at most this much of an invalid response
# The agent's own git configuration must not change the patch.
GIT: Final = "git -c core.fsmonitor=false -c diff.noprefix=false -c diff.mnemonicPrefix=false"
# Adds all files, committed or not, to a temporary index; the agent's own index does not change.
STAGE_COMMAND: Final = (
    "export GIT_INDEX_FILE=/tmp/.index.$RANDOM$RANDOM$RANDOM; test -f .git/index && cp -p .git/index $GIT_INDEX_FILE;"
    f" {GIT} add -A --ignore-errors 2>/dev/null"
)
SNAPSHOT_COMMAND: Final = f"{STAGE_COMMAND}; git write-tree"
DIFF_OPTIONS: Final = "--binary --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/"
DIFF_COMMAND: Final = f"{STAGE_COMMAND}; {GIT} diff --cached {DIFF_OPTIONS} {{tree}} 2>/dev/null"
PATCH_SECONDS: Final = 30.0  # for the diff; a git filter that the agent configured may never end


class RepositoryEnv:
    """Plays one repository at a time, in a sandbox.

    Args:
        graded: grade patches. Demonstrations need no grading.
    """

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
        """Grade the patch if this is the last turn."""
        return self._grade(turn) if self.turns_taken >= self._world.turns else turn

    def _grade(self, turn: Turn) -> Turn:
        """End the episode and grade the agent's patch in a fresh sandbox."""
        self._is_over = True
        if not self._is_graded:
            return replace(turn, terminated=True)
        patch = self._extract_patch()
        self.close()  # two open sandboxes would need twice the memory
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
            raise SandboxLost(f"the repository of {self.instance.id} could not be set up: {ran.text.strip()[-300:]}")

    def _extract_patch(self) -> bytes:
        """The agent's changes with new files; empty if the repository or the sandbox is unusable."""
        assert self._sandbox is not None
        try:
            ran = self._sandbox.run(DIFF_COMMAND.format(tree=self._tree), PATCH_SECONDS)
        except SandboxBroken:
            return b""
        return b"" if ran.code or ran.stop_reason else ran.output
