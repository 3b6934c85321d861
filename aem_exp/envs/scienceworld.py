"""ScienceWorld: experiments of primary school in a simulated house (Wang et al., EMNLP 2022, arXiv 2203.07540), from its own
package.

Each open episode has its own JVM, because two games in one JVM change each other. A JVM is reused for later episodes.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, get_args

from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs import Task, Turn, fingerprint_of, parsing
from aem_exp.envs.jvm import Jvm

RULES_VERSION: Final = 1  # raise when the same task would read or play differently
# Number of variations of each task. Of n variations, the package uses the first 2 * (n // 4) for training and the next n // 4
# for dev. Test is the rest.
VARIATIONS: Final = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
_SHORT: Final = ("find-", "lifespan-", "power-", "chemistry-mix-paint", "identify-life-stages-2", "use-thermometer")
Tasks = Literal["all", "beacon", "short"]
PANEL_TASKS: Final = {"dev": 5, "test": 10}  # variations of each task in a panel
# In a JVM that has played other games, the order of objects, animals and actions would change without `hashCode`.
JVM_OPTIONS: Final = (
    *("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    *("-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"),
)
MAX_ACTION_CHARACTERS: Final = 500  # longest action
BEACON_MOVES: Final = 30  # moves of the game after which an episode ends under `success: beacon`
NOT_UNDERSTOOD: Final = ("No known action matches that input.", "Unknown action")  # beginnings of answers
RESET: Final = "reset task"  # an action of the package that would undo a failure


class ScienceWorldEnv:
    """One environment with its own JVM, which it starts at the first reset."""

    def __init__(self, world: "ScienceWorld"):
        self._world, self.goal = world, ""
        self._jvm: Jvm | None = None

    def parse(self, response: str) -> str:
        return self._parse_action(response)[0]

    def reset(self, task: Task) -> Turn:
        self.task = task
        if self._jvm is None:
            self._jvm = self._world.start_jvm()
            self._game = open_game(self._jvm)
        self._game.load(task.payload["task"], task.payload["variation"], self._world.simplifications, False)
        self._game.reset()
        self.goal = str(self._game.getTaskDescription()).removeprefix("Your task is to ").strip()
        self._score, self._is_over, self.turns = 0.0, False, 0
        return self._turn(str(self._game.step("look around")))

    def step(self, response: str) -> Turn:
        action, well_formed = self._parse_action(response)
        answer, understood, before = NOT_UNDERSTOOD[0], False, self._paid()
        if well_formed and not self._is_over and action != RESET:
            answer = str(self._game.step(action))
            understood = not answer.startswith(NOT_UNDERSTOOD)
            self._score = float(self._game.getScore())
            over = self._score < 0 or bool(self._game.getCompleted())
            self._is_over = over or (self._world.success == "beacon" and self._game.getNumMoves() > BEACON_MOVES)
        self.turns += 1
        metrics = {"format_valid": float(well_formed), "admissible": float(understood)}
        reward = self._world.reward * (self._paid() - before)
        return self._turn(answer, reward, well_formed, metrics)

    def list_actions(self) -> list[str]:
        """All actions that the game accepts in its current state, often thousands; takes up to 0.5 s."""
        combinations = json.loads(self._game.getValidActionObjectCombinationsJSON())["validActions"]
        return [str(entry["action"]) for entry in combinations if entry["action"] != RESET]

    def close(self) -> None:
        if self._jvm is not None:
            self._jvm.close()
            self._jvm = None

    @property
    def won(self) -> bool:
        """Whether the task is complete; under `success: beacon`, whether the episode ended with a positive score."""
        return self._is_over and (self._score > 0 if self._world.success == "beacon" else self._score >= 1)

    def _paid(self) -> float:
        """What the episode has paid so far, without the factor."""
        return max(0.0, self._score) if self._world.pays == "score" else float(self.won)

    def _parse_action(self, response: str) -> tuple[str, bool]:
        action, well_formed = parsing.parse_response(response, MAX_ACTION_CHARACTERS, self._world.tags)
        return action, well_formed and bool(action)

    def _turn(
        self, answer: str, reward: float = 0.0, valid: bool = True, metrics: Mapping[str, float] | None = None
    ) -> Turn:
        if self._world.objects and not self._is_over:
            answer = f"{answer.strip()}\nObjects: {', '.join(self._game.getPossibleObjects())}"
        outcome = {"won": float(self.won), "score": max(0.0, self._score)}
        return Turn(answer.strip(), reward, self._is_over, False, valid, None, {**outcome, **(metrics or {})})


class ScienceWorld:
    """The 30 tasks with the package's own splits. A panel has the same number of variations of each task.

    Args:
        tasks: `all`; `beacon`: all but use-thermometer, as BEACON uses; `short`: tasks that the package solves in at most 26
            actions.
        simplifications: comma-separated, as the package names them; `easy` is all but openContainers.
        objects: list the visible objects after each observation.
        tags: responses must be `<think>..</think><action>..</action>`.
        success: `complete`: the score is 1, the whole task. `beacon`: an episode that ends with a positive score, where 30
            moves end an episode, too; so waiting after a first subgoal counts as success.
        pays: `success` pays once; `score` pays each rise of the score.
        reward: factor for what is paid.

    Raises:
        ConfigError: a simplification does not exist.
        MissingResource: the package or Java is missing.
    """

    own_process = True  # a JVM that hangs is killed together with its worker process
    episodes_at_once = 16  # the JVM of an episode needs 230 MB
    splits = ("train", "dev", "test")

    def __init__(
        self,
        tasks: Tasks = "all",
        simplifications: str = "easy",
        objects: bool = True,
        tags: bool = True,
        success: Literal["complete", "beacon"] = "complete",
        pays: Literal["success", "score"] = "success",
        reward: float = 10.0,
    ):
        if find_spec("scienceworld") is None:
            raise MissingResource("env.make.tasks", tasks, f"needs its package: {install_command('scienceworld')}")
        if tasks not in get_args(Tasks):
            raise ConfigError("env.make.tasks", tasks, choices=get_args(Tasks))
        self.simplifications, self.objects, self.tags = simplifications, objects, tags
        self.success, self.pays, self.reward = success, pays, reward
        self.names = [name for name in VARIATIONS if _is_in(name, tasks)]
        self._lock = threading.Lock()
        self._spare: Jvm | None = None  # for the first environment
        self._solver: Jvm | None = None
        self._solutions: dict[str, list[str]] = {}
        self._check_simplifications()
        settings = [RULES_VERSION, tasks, simplifications, objects, tags, success, pays, reward, JVM_OPTIONS]
        settings += [version("scienceworld")]
        self.fingerprint = fingerprint_of("scienceworld", settings)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        tasks = []
        for name in self.names:
            quarter = VARIATIONS[name] // 4
            first, end = {"train": (0, 2 * quarter), "dev": (2 * quarter, 3 * quarter)}.get(
                split, (3 * quarter, VARIATIONS[name])
            )
            end = min(end, first + PANEL_TASKS.get(split, end))
            tasks += [
                Task(f"{name}/{number}", number, name, {"task": name, "variation": number})
                for number in range(first, end)
            ]
        return tasks

    def env(self) -> ScienceWorldEnv:
        return ScienceWorldEnv(self)

    def oracle(self, env: ScienceWorldEnv) -> str:
        """The response of the package's solution, which is valid from the start of the game."""
        if env.task.id not in self._solutions:
            self._solutions[env.task.id] = self._solve(env.task)
        solution = self._solutions[env.task.id]
        action = solution[env.turns] if env.turns < len(solution) else "look around"
        return parsing.write_response(action, self.tags)

    def random_action(self, env: ScienceWorldEnv, random: Random) -> str:
        """The response of the random agent: one of all actions that the game would accept."""
        action = random.choice(sorted(env.list_actions()))
        return parsing.write_response(action, self.tags)

    def start_jvm(self) -> Jvm:
        """A JVM with the package's program, for one environment."""
        import scienceworld

        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and spare.running:
            return spare
        folder = Path(scienceworld.__file__).parent
        return Jvm("env.make.tasks", len(self.names), folder / "scienceworld.jar", JVM_OPTIONS, folder)

    def _solve(self, task: Task) -> list[str]:
        """The package's solution, computed in a JVM of its own, because computing it would change an open game."""
        if self._solver is None or not self._solver.running:
            self._solver = self.start_jvm()
        game = open_game(self._solver)
        game.load(task.payload["task"], task.payload["variation"], self.simplifications, True)
        return [str(action).lower() for action in game.getGoldActionSequence()]

    def _check_simplifications(self) -> None:
        self._spare = self.start_jvm()  # also shows whether Java runs the program
        choices = ["easy", *str(open_game(self._spare).getPossibleSimplifications()).split(", ")]
        for name in filter(None, self.simplifications.split(",")):
            if name not in choices:
                raise ConfigError("env.make.simplifications", name, choices=choices)
        if "noElectricalAction" in self.simplifications and any("power" in n or "conduct" in n for n in self.names):
            remedy = (
                "makes the tasks power-* and test-conductivity-* impossible; easy leaves it out for these tasks only"
            )
            raise ConfigError("env.make.simplifications", self.simplifications, remedy)


def open_game(jvm: Jvm) -> Any:
    """The package's interface to a game."""
    return jvm.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()


def _is_in(name: str, tasks: str) -> bool:
    if tasks == "beacon":
        return name != "use-thermometer"
    return tasks == "all" or name.startswith(_SHORT)
