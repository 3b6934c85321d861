"""The ALFWorld worlds, with generated games and with the official ones: their games, splits and rewards."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from random import Random
from typing import Any, Final, Literal

from aem_exp.core.errors import ConfigError
from aem_exp.envs import LazyTasks, Task, parsing, split_sizes
from aem_exp.envs.alfworld import games, official_games, vocabulary
from aem_exp.envs.alfworld.env import AlfWorldEnv
from aem_exp.envs.alfworld.expert import EpisodeMemory, next_command
from aem_exp.envs.alfworld.games import GameErrand
from aem_exp.envs.alfworld.library import check_installed
from aem_exp.envs.alfworld.official_games import COUNTS

RULES_VERSION: Final = 1  # raise when the same task would play differently
SPLITS: Final = {"train": "train", "test_seen": "valid_seen", "test_unseen": "valid_unseen"}
HELD_OUT: Final = 140  # training games that are held out as the dev panel
VERL_AGENT_DEV_GAMES: Final = 128  # verl-agent's validation: draws from valid_seen, with replacement


class _EngineWorld:
    """Base class of the worlds of this engine."""

    own_process = True  # a crash of the engine must not crash the trainer
    tags: bool
    reward: float

    def env(self) -> AlfWorldEnv:
        return AlfWorldEnv(self.game, self.tags, self.reward)

    def game(self, task: Task) -> Mapping[str, Any]:
        raise NotImplementedError

    def expert(self, env: AlfWorldEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted expert.

        With probability `noise` it takes a random command. With probability `shyness` it goes elsewhere instead of opening a
        receptacle.
        """
        errand = GameErrand(env.task.kind, env.task.payload["object"], env.task.payload["target"])
        memory = EpisodeMemory(env.observations, env.places)
        command = next_command(memory, env.commands, errand, random)
        if random.random() < noise:
            command = random.choice(env.commands)
        elif command.startswith("open") and random.random() < shyness:
            command = random.choice([one for one in env.commands if one.startswith("go to")])
        return self._format_response(command)

    def oracle(self, env: AlfWorldEnv) -> str:
        """The response of an expert that follows the walkthrough of the game."""
        steps = self.game(env.task)["walkthrough"]
        done = len(env.observations) - 1
        return self._format_response(steps[done] if done < len(steps) else "look")

    def _format_response(self, command: str) -> str:
        return parsing.write_response(command, self.tags)


def _digest(*things: Any) -> str:
    return hashlib.sha256(json.dumps([RULES_VERSION, *things], sort_keys=True).encode()).hexdigest()[:12]


def _engine_version() -> list[str]:
    return [version(name) for name in ("textworld", "fast-downward-textworld")]


class Generated(_EngineWorld):
    """Generated games, in any number. They need no download.

    Args:
        kinds: the kinds of task; all are equally frequent.
        receptacles: number of receptacles in a room; an official game has up to 28.
        objects: number of objects in a room; an official game has up to 45.
        tags: responses must be `<think>..</think><action>..</action>`; otherwise the whole response is the command.
        reward: paid once, on success.
        sizes: tasks per split.
    """

    splits = ("train", "dev", "test")

    def __init__(
        self,
        kinds: Sequence[str] = tuple(games.KINDS),
        receptacles: int = 11,
        objects: int = 8,
        tags: bool = True,
        reward: float = 10.0,
        sizes: dict[str, int] | None = None,
    ):
        check_installed()
        self.kinds, self.receptacles, self.objects = list(kinds), receptacles, objects
        self.tags, self.reward = tags, reward
        self.sizes = split_sizes({"train": 4096, "dev": 128, "test": 128}, sizes)
        self._check_settings()
        settings = {key: value for key, value in vars(self).items() if key != "sizes"}
        self.fingerprint = f"alfworld-{_digest(settings, games.load_facts().fingerprint, _engine_version())}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        return LazyTasks(self.sizes[split], lambda index: self._task(split, index))

    def game(self, task: Task) -> Mapping[str, Any]:
        return self._generate(task.id, task.kind)[0]

    def words(self) -> tuple[str, ...]:
        """Everything that a policy reads or writes in this world: words, and fixed phrases that may be one token each."""
        return vocabulary.words(self.receptacles)

    def _task(self, split: str, index: int) -> Task:
        name = f"{split}-{index}"
        kind = Random(f"kind {name}").choice(self.kinds)
        errand = self._generate(name, kind)[1]
        return Task(name, kind=kind, payload={"object": errand.object, "target": errand.target})

    def _generate(self, name: str, kind: str) -> tuple[dict[str, Any], GameErrand]:
        return games.generate_game(kind, name, self.receptacles, self.objects)

    def _check_settings(self) -> None:
        for kind in self.kinds or [""]:
            if kind not in games.KINDS:
                raise ConfigError("env.make.kinds", kind, choices=list(games.KINDS))
        for field, number, least, most in (
            ("receptacles", self.receptacles, 4, games.MAX_RECEPTACLES),
            ("objects", self.objects, 2, 99),
        ):
            if not least <= number <= most:
                raise ConfigError(f"env.make.{field}", number, f"choose {least} to {most}")


class AlfWorld(_EngineWorld):
    """The official games, in TextWorld's engine.

    Args:
        data: the folder that contains json_2.1.1/; null: $ALFWORLD_DATA, else the folder that `prepare` uses.
        split: `original`: dev has 140 games held out of train. `verl_agent`: train has all training games, and dev has 128 random
            draws from valid_seen; only to compare with published numbers.
        tags: responses must be `<think>..</think><action>..</action>`; otherwise the whole response is the command.
        reward: paid once, on success.
        games: required number of games in each folder; null: any number.
    """

    splits = ("train", "dev", "test_seen", "test_unseen")

    def __init__(
        self,
        data: str | None = None,
        split: Literal["original", "verl_agent"] = "original",
        tags: bool = True,
        reward: float = 10.0,
        games: dict[str, int] | None = COUNTS,
    ):
        check_installed()
        self.root = official_games.find_root(data)
        self.tags, self.reward, self.split = tags, reward, split
        index = official_games.load_index(self.root, games)
        self._games = {name: index[folder] for name, folder in SPLITS.items()}
        if split == "original":
            by_hash = sorted(self._games["train"], key=lambda game: hashlib.sha256(game["file"].encode()).digest())
            held_out = {game["file"] for game in by_hash[: min(HELD_OUT, len(by_hash) // 2)]}
            self._games["dev"] = [game for game in self._games["train"] if game["file"] in held_out]
            self._games["train"] = [game for game in self._games["train"] if game["file"] not in held_out]
        else:
            random, seen = Random("verl_agent"), self._games["test_seen"]
            self._games["dev"] = (
                [{**random.choice(seen), "draw": i} for i in range(VERL_AGENT_DEV_GAMES)] if seen else []
            )
        self.fingerprint = f"alfworld-{_digest(tags, reward, split, self._games, _engine_version())}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        return [_task(game) for game in self._games[split]]

    def game(self, task: Task) -> Mapping[str, Any]:
        return official_games.read_game(self.root, task.payload["file"], task.payload["sha256"])

    @classmethod
    def prepare(
        cls, say: Callable[[str], None], data: str | None = None, games: dict[str, int] | None = COUNTS, **_: Any
    ) -> None:
        """Download missing games and index all games. Resumes after an interruption."""
        official_games.fetch_games(data, games, say)


def _task(game: Mapping[str, Any]) -> Task:
    draw = f"#{game['draw']}" if "draw" in game else ""
    return Task(
        game["file"] + draw, kind=game["kind"], payload={k: game[k] for k in ("file", "sha256", "object", "target")}
    )
