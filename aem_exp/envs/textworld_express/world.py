"""The games of TextWorldExpress: their tasks, and episodes in a JVM."""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, get_args

from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs import LazyTasks, Task, Turn, fingerprint_of, parsing, split_sizes
from aem_exp.envs.jvm import Jvm
from aem_exp.envs.textworld_express import scripted

RULES_VERSION: Final = 1  # raise when the same task would read or play differently
Game = Literal["arithmetic", "coin", "cookingworld", "mapreader", "peckingorder", "simonsays", "sorting", "twc"]
FIRST_SEEDS: Final = {"train": 0, "dev": 10_000, "test": 20_000}  # the package's own splits, of 1,000 seeds each
SEEDS: Final = 1000
JVM_OPTIONS: Final = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
MAX_ACTION_CHARACTERS: Final = 200  # longest action
NOT_POSSIBLE: Final = "That is not possible."
SHARES_OBJECTS: Final = ("sorting",)  # two open episodes of one task in one JVM change each other's objects
WORD_TASKS, WORD_TURNS = 200, 50  # tasks of each split that `words` plays, and turns of each


class TextWorldExpressEnv:
    """One environment. An action that the game does not list as admissible changes nothing."""

    def __init__(self, world: "TextWorldExpress"):
        self._world, self.goal = world, ""
        self._jvm = world.start_jvm() if world.game in SHARES_OBJECTS else None
        self._game = world.open_game(self._jvm)

    def parse(self, response: str) -> str:
        return self._parse_action(response)[0]

    def reset(self, task: Task) -> Turn:
        self.task, self.memory = task, scripted.Memory()
        self._show(self._game.generateNewGameJSON(task.seed, task.payload["split"], False))
        self.goal = str(self._game.getTaskDescription())
        return self._turn(self.observation)

    def step(self, response: str) -> Turn:
        action, well_formed = self._parse_action(response)
        admissible = well_formed and not (self.won or self.lost) and action in self._commands
        observation, before = NOT_POSSIBLE, self._paid()
        if admissible:
            self._show(self._game.stepJSON(self._commands[action]))
            self.memory.taken.append(action)
            observation = self.observation
        reward = self._world.reward * (self._paid() - before)
        metrics = {"format_valid": float(well_formed), "admissible": float(admissible)}
        return self._turn(observation, reward, self.won or self.lost, admissible, metrics)

    def close(self) -> None:
        if self._jvm is not None:
            self._jvm.close()

    def solve(self) -> list[str]:
        """The package's solution of the current task, from its start."""
        game = self._world.open_game()  # computing it starts the game again, so another one is used
        game.generateNewGameJSON(self.task.seed, self.task.payload["split"], True)
        return [str(action).lower() for action in game.getGoldActionSequence()]

    def _paid(self) -> float:
        return self.score if self._world.pays == "score" else float(self.won)

    def _show(self, answer: str) -> None:
        shown = json.loads(answer)
        self.observation, self.look = (_squeeze(shown[key]) for key in ("observation", "look"))
        self.inventory = str(shown["inventory"])
        self._commands = {command.lower(): command for command in sorted(shown["validActions"])}
        self.actions = tuple(self._commands)
        self.won, self.lost = bool(shown["tasksuccess"]), bool(shown["taskfailure"])
        self.score = max(0.0, float(shown["score"]))  # -1 after a failure
        self.memory.add(self.observation, self.look)

    def _parse_action(self, response: str) -> tuple[str, bool]:
        return parsing.parse_response(response, MAX_ACTION_CHARACTERS, self._world.tags)

    def _turn(
        self,
        observation: str,
        reward: float = 0.0,
        over: bool = False,
        valid: bool = True,
        metrics: Mapping[str, float] | None = None,
    ) -> Turn:
        outcome = {"won": float(self.won and not self.lost), "score": self.score}
        return Turn(observation, reward, over, False, valid, self.actions, {**outcome, **(metrics or {})})


def _squeeze(text: str) -> str:
    """A text without empty lines, and without white space at the ends of its lines."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


class TextWorldExpress:
    """One of the eight games, with the package's own splits: other seeds, and in four games also other objects.

    Args:
        game: name of the game.
        params: parameters of the game, such as `{numLocations: 5}`; others keep the package's defaults.
        tags: responses must be `<think>..</think><action>..</action>`.
        pays: `success` pays once; `score` pays each rise of the game's score, which ends at 1.
        reward: factor for what is paid.
        sizes: tasks per split, at most 1,000 each.

    Raises:
        ConfigError: the game refuses its parameters.
        MissingResource: the package or Java is missing.
    """

    own_process = True  # a JVM that hangs is killed together with its worker process
    episodes_at_once = 64  # an open game needs 0.2 MB of the JVM
    splits = tuple(FIRST_SEEDS)

    def __init__(
        self,
        game: Game = "mapreader",
        params: dict[str, int] | None = None,
        tags: bool = True,
        pays: Literal["success", "score"] = "success",
        reward: float = 1.0,
        sizes: dict[str, int] | None = None,
    ):
        if find_spec("textworld_express") is None:
            raise MissingResource("env.make.game", game, f"needs its package: {install_command('textworld-express')}")
        if game not in get_args(Game):
            raise ConfigError("env.make.game", game, choices=get_args(Game))
        self.game, self.params, self.tags, self.pays, self.reward = game, dict(params or {}), tags, pays, reward
        self.sizes = split_sizes({"train": SEEDS, "dev": 128, "test": 128}, sizes, SEEDS)
        self._jvm: Jvm | None = None
        self._lock = threading.Lock()
        self.open_game()
        settings = [RULES_VERSION, game, sorted(self._settings()), tags, pays, reward, version("textworld-express")]
        self.fingerprint = fingerprint_of("textworld_express", settings)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in FIRST_SEEDS:
            raise ConfigError("split", split, choices=FIRST_SEEDS)

        def draw(index: int) -> Task:
            return Task(f"{split}-{index}", FIRST_SEEDS[split] + index, self.game, {"split": split})

        return LazyTasks(self.sizes[split], draw)

    def env(self) -> TextWorldExpressEnv:
        return TextWorldExpressEnv(self)

    def open_game(self, jvm: Jvm | None = None) -> Any:
        """Open a game in this JVM.

        Args:
            jvm: None: the one of this process, which is started again if it has died.

        Raises:
            ConfigError: the game refuses its parameters.
        """
        game = (jvm or self._shared_jvm()).gateway.jvm.textworldexpress.runtime.PythonInterface()
        if refusal := str(game.load(self.game, ",".join(self._settings())) or "").strip():
            raise ConfigError("env.make.params", ",".join(self._settings()) or None, f"{self.game} says: {refusal}")
        return game

    def _shared_jvm(self) -> Jvm:
        with self._lock:
            if self._jvm is None or not self._jvm.running:
                self._jvm = self.start_jvm()
            return self._jvm

    def start_jvm(self) -> Jvm:
        """Start a JVM with the package's program."""
        import textworld_express

        folder = Path(textworld_express.__file__).parent  # the program reads data files of this folder
        return Jvm("env.make.game", self.game, folder / "textworld-express.jar", JVM_OPTIONS, folder)

    def expert(self, env: TextWorldExpressEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted player, see `scripted`.

        With probability `noise` it acts at random. With probability `shyness` it looks around instead of an action that takes,
        puts or uses something.
        """
        return parsing.write_response(scripted.next_action(env, random, noise, shyness), self.tags)

    def words(self) -> list[str]:
        """The words of what is read and written when the player plays tasks of each split."""
        found, env, random = dict[str, None](), self.env(), Random(0)
        tags = ["<think>", "</think>", "<action>", "</action>"] if self.tags else []
        for split in self.splits:
            for task in self.tasks(split)[:WORD_TASKS]:
                turn = env.reset(task)
                for _ in range(WORD_TURNS):
                    texts = " ".join([env.goal, turn.observation, env.look, env.inventory, *env.actions])
                    found |= dict.fromkeys(re.findall(r"[^\W\d_]+|\d+|[^\w\s]", texts))
                    if turn.done:
                        break
                    turn = env.step(self.expert(env, random))
        return [*found, *re.findall(r"\w+", NOT_POSSIBLE), *tags]

    def _settings(self) -> list[str]:
        return [f"{name}={int(value)}" for name, value in self.params.items()]
