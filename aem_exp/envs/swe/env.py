"""The environment of repositories: an agent works with tools in a sandbox, and its patch is graded in another sandbox.

An episode is graded when the agent calls `finish` or has used its last turn. An episode that takes longer than `episode_seconds`
is stopped and not graded. If an agent makes its own sandbox unusable, its episode ends as a failure without a patch.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aem_exp.envs import Task, Turn
from aem_exp.envs.swe import patch, tools
from aem_exp.envs.swe.grade import grade_changes
from aem_exp.envs.swe.tools import InvalidCall, ToolCall, Tools
from aem_exp.sandboxes import Sandbox, SandboxBroken, SandboxLost

if TYPE_CHECKING:
    from aem_exp.envs.swe.world import Repositories

SETUP_SECONDS: Final = 120.0  # to prepare the repository in a sandbox
MAX_QUOTED_CHARACTERS: Final = 4000  # later prompts quote at most this much of an invalid response


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
        assert self._sandbox is not None
        try:
            changes = patch.read_changes(self._sandbox, self._listing)
        except patch.UnreadableChanges:  # the agent made its own repository unusable
            changes = patch.Changes({})
        self.close()  # two open sandboxes would need twice the memory
        grade = grade_changes(self._world, self.instance, changes)
        won = float(grade.resolved)
        metrics = {**turn.metrics, "won": won, **grade.metrics()}
        notes = [f"Not believed: {grade.reason}"] * bool(grade.reason) + [
            f"Flagged: it {one}" for one in grade.findings or ()
        ]
        observation = "\n".join(filter(None, [turn.observation, *notes]))
        return replace(turn, observation=observation, reward=won * self._world.reward, metrics=metrics)

    def _set_up(self) -> None:
        assert self._sandbox is not None
        script, stdin = self.instance.setup_script, self.instance.setup_input
        try:
            self._listing = patch.set_up(self._sandbox, script, stdin, SETUP_SECONDS)
        except patch.UnreadableChanges as error:
            raise SandboxLost(f"the repository of {self.instance.id} could not be set up: {error}") from error
