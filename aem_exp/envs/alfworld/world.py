"""ALFWorld: household errands in TextWorld's engine, from the official games, or from games that are made here.

Decided here: which games there are and which panel they belong to, how a response becomes a command, what is rewarded. The
engine is `alfworld_engine`, the makers of games and of a scripted player stand beside it. The official files are read once into
an index; a game that was changed since is refused when it is played.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from aem_exp.core import console, disk, download
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs import LazyTasks, Task, Turn, parsing, split_sizes
from aem_exp.envs.alfworld import engine, games, player
from aem_exp.envs.alfworld.games import GameErrand
from aem_exp.envs.household import rules as household_rules

log = logging.getLogger("aem_exp")
RULES_VERSION: Final = 1  # raise when the same task would play differently
FOLDER: Final = "json_2.1.1"
SPLITS: Final = {"train": "train", "test_seen": "valid_seen", "test_unseen": "valid_unseen"}
COUNTS: Final = {
    "train": 3553,
    "valid_seen": 140,
    "valid_unseen": 134,
}  # games that can be played, as all papers count them
HELD_OUT: Final = 140  # games of train that are the dev panel
VERL_AGENT_DEV_GAMES: Final = 128  # verl-agent's validation: so many draws of valid_seen, with repeats
ARCHIVES: Final = (  # url, bytes
    ("https://github.com/alfworld/alfworld/releases/download/0.2.2/json_2.1.1_json.zip", 72_018_818),
    ("https://github.com/alfworld/alfworld/releases/download/0.4.0/json_2.1.2_tw-pddl.zip", 36_493_542),
)
MAX_COMMAND_CHARACTERS: Final = 100  # characters; what later prompts quote of a response stays this short
HIDDEN_COMMAND: Final = "help"  # admissible, and of no use to a policy


class AlfWorldEnv:
    """One game at a time; `read` finds what a task's game file holds."""

    def __init__(self, read: Callable[[Task], Mapping[str, Any]], tags: bool, reward: float):
        self._load_game, self._tags, self._reward = read, tags, reward
        self._engine = engine.Engine()
        self.goal = ""

    def parse(self, response: str) -> str:
        return self._parse_command(response)[0]

    def reset(self, task: Task) -> Turn:
        self.task = task
        self._state = self._engine.start(self._load_game(task))
        self.observations = [self._state.text]
        self.places = [
            command.removeprefix("go to ") for command in self._state.commands if command.startswith("go to ")
        ]
        self.goal = self._state.text.partition("Your task is to: ")[2].strip()
        return self._turn(metrics={"won": float(self._state.won)})

    def step(self, response: str) -> Turn:
        (command, valid), before = self._parse_command(response), self._state
        valid = valid and (self._tags or self._engine.matches_grammar(command))
        admissible = command in before.commands and not before.won
        if not before.won:
            self._state = self._engine.step(command)
            self.observations.append(self._state.text)
        won = self._state.won
        metrics = {"won": float(won), "format_valid": float(valid), "admissible": float(admissible)}
        return self._turn(self._reward if won and not before.won else 0.0, valid, metrics)

    def close(self) -> None:
        self._engine.close()

    @property
    def commands(self) -> tuple[str, ...]:
        """What a policy is told that it can do."""
        return tuple(command for command in self._state.commands if command != HIDDEN_COMMAND)

    def _turn(self, reward: float = 0.0, valid: bool = True, metrics: Mapping[str, float] | None = None) -> Turn:
        scene = self._state
        return Turn(scene.text, reward, scene.won, valid=valid, actions=self.commands, metrics=dict(metrics or {}))

    def _parse_command(self, response: str) -> tuple[str, bool]:
        read = parsing.parse_tagged if self._tags else parsing.parse_bare
        return read(response, MAX_COMMAND_CHARACTERS)


class _EngineWorld:
    """What worlds of this engine share."""

    own_process = True  # the engine may crash, and is no thing to have in a trainer
    tags: bool
    reward: float

    def env(self) -> AlfWorldEnv:
        return AlfWorldEnv(self.game, self.tags, self.reward)

    def game(self, task: Task) -> Mapping[str, Any]:
        raise NotImplementedError

    def expert(self, env: AlfWorldEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted player: with probability `noise` it does anything; and what it ought to open it walks
        past with probability `shyness`, to anywhere else."""
        errand = GameErrand(env.task.kind, env.task.payload["object"], env.task.payload["target"])
        memory = player.EpisodeMemory(env.observations, env.places)
        command = player.next_command(memory, env.commands, errand, random)
        if random.random() < noise:
            command = random.choice(env.commands)
        elif command.startswith("open") and random.random() < shyness:
            command = random.choice([one for one in env.commands if one.startswith("go to")])
        return self._format_response(command)

    def oracle(self, env: AlfWorldEnv) -> str:
        """The response of a player who has read the game's walkthrough."""
        steps = self.game(env.task)["walkthrough"]
        done = len(env.observations) - 1
        return self._format_response(steps[done] if done < len(steps) else "look")

    def _format_response(self, command: str) -> str:
        return f"<think></think><action>{command}</action>" if self.tags else command


def _digest(*things: Any) -> str:
    return hashlib.sha256(json.dumps([RULES_VERSION, *things], sort_keys=True).encode()).hexdigest()[:12]


def _engine_version() -> list[str]:
    return [version(name) for name in ("textworld", "fast-downward-textworld")]


# Games made here.


class Generated(_EngineWorld):
    """Games that are made here, as many as are asked for; nothing is downloaded.

    Args:
        kinds: of task, each as often as any other.
        receptacles, objects: in a room; an official game has up to 28 and 45.
        tags: responses are `<think>..</think><action>..</action>`; otherwise the whole response is the command.
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
        engine.check_installed()
        self.kinds, self.receptacles, self.objects = list(kinds), receptacles, objects
        self.tags, self.reward = tags, reward
        self.sizes = split_sizes({"train": 4096, "dev": 128, "test": 128}, sizes)
        self._check_settings()
        how = {key: value for key, value in vars(self).items() if key != "sizes"}
        self.fingerprint = f"alfworld-{_digest(how, games.load_facts().fingerprint, _engine_version())}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        return LazyTasks(self.sizes[split], lambda index: self._task(split, index))

    def game(self, task: Task) -> Mapping[str, Any]:
        return self._generate(task.id, task.kind)[0]

    def words(self) -> tuple[str, ...]:
        """Everything a policy of this world reads or writes: words, and fixed wordings that may be one token."""
        facts = games.load_facts()
        places = [place.lower() for place in facts.holds]
        things = [one.lower() for one in sorted({o for found in facts.holds.values() for o in found})]
        numbers = [str(n) for n in range(self.receptacles + 1)]
        names = [f"{kind} {number}" for kind in (*places, *things, games.LAMP.lower()) for number in numbers[1:]]
        return (*PHRASES, *household_rules.PHRASES, *household_rules.WORDS, *places, *things, *names, *numbers)

    def _task(self, split: str, index: int) -> Task:
        name = f"{split}-{index}"
        kind = Random(f"kind {name}").choice(self.kinds)
        errand = self._generate(name, kind)[1]
        return Task(name, kind=kind, payload={"object": errand.object, "target": errand.target})

    def _generate(self, name: str, kind: str) -> tuple[dict[str, Any], GameErrand]:
        return games.generate(kind, name, self.receptacles, self.objects)

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


PHRASES: Final = (  # wordings of the engine that the household does not have
    "-= Welcome to TextWorld, ALFRED! =-",
    "Your task is to:",
    "You are facing the",
    ". Next to it, you see",
    "you see nothing.",
    "This is a normal",
    "put some",
    "put a clean",
    "put a hot",
    "put a cool",
    "and put it in",
    "and put them in",
    "find two",
    "clean some",
    "heat some",
    "cool some",
    "look at",
    "examine the",
    "with the",
    "some",
    "them",
    "put",
    "use",
    "slice",
    "Next",
    "some",
    "find",
)


# The official games.


class AlfWorld(_EngineWorld):
    """The official games, in TextWorld's engine.

    Args:
        data: the folder that holds json_2.1.1/; null: $ALFWORLD_DATA, else where `prepare` puts it.
        split: original: `dev` are 140 games held out of train | verl_agent: train is all of it, and `dev` 128 random draws of
            valid_seen; for the sake of published numbers alone.
        tags: responses are `<think>..</think><action>..</action>`; otherwise the whole response is the command.
        reward: paid once, on success.
        games: how many there must be in each folder; null: whatever is there.
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
        engine.check_installed()
        self.root = _root(data)
        self.tags, self.reward, self.split = tags, reward, split
        index = _load_index(self.root, games)
        self._games = {name: index[folder] for name, folder in SPLITS.items()}
        if split == "original":
            by_hash = sorted(self._games["train"], key=lambda game: hashlib.sha256(game["file"].encode()).digest())
            held = {game["file"] for game in by_hash[: min(HELD_OUT, len(by_hash) // 2)]}
            self._games["dev"] = [game for game in self._games["train"] if game["file"] in held]
            self._games["train"] = [game for game in self._games["train"] if game["file"] not in held]
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
        file = self.root / task.payload["file"] / "game.tw-pddl"
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != task.payload["sha256"]:
            raise ValueError(f"{file} was changed since it was indexed: aem_exp.prepare indexes anew")
        return json.loads(data)

    @classmethod
    def prepare(
        cls, say: Callable[[str], None], data: str | None = None, games: dict[str, int] | None = COUNTS, **_: Any
    ) -> None:
        """Download what is missing, and index it; asked again, go on, and look whether a game has changed."""
        from filelock import FileLock

        root = _root(data, there=False)
        disk.check_writable(root.parent, "env.make.data" if data else "ALFWORLD_DATA")
        with FileLock(root.parent / f".{FOLDER}.lock"), console.progress_bar("indexing games") as tell:
            if not _is_complete(root, games, tell):
                for url, size in ARCHIVES:
                    archive = download.fetch(url, root.parent / Path(url).name, size, say)
                    download.unzip(archive, root.parent, say)
            _load_index(root, games, tell, thorough=True)


def _task(game: Mapping[str, Any]) -> Task:
    draw = f"#{game['draw']}" if "draw" in game else ""
    return Task(
        game["file"] + draw, kind=game["kind"], payload={k: game[k] for k in ("file", "sha256", "object", "target")}
    )


def _root(data: str | None, there: bool = True) -> Path:
    """The folder of the official games."""
    asked = data or os.environ.get("ALFWORLD_DATA")
    root = Path(asked or disk.cache_dir() / "alfworld").expanduser().absolute() / FOLDER
    if there and not root.is_dir():
        files = " and ".join(url for url, _ in ARCHIVES)
        remedy = "" if asked else f"and $ALFWORLD_DATA is not set either; {root.parent} "
        remedy += (
            f"has no {FOLDER}/: python -m aem_exp.prepare +experiment=alfworld_1_5b fetches it; or unzip {files} there"
        )
        field = "ALFWORLD_DATA" if asked and not data else "env.make.data"
        raise MissingResource(field, str(root.parent) if asked else None, remedy)
    return root


def _is_complete(root: Path, wanted: Mapping[str, int] | None, tell: Callable[[int, int], None]) -> bool:
    try:
        _load_index(root, wanted, tell, thorough=True)
    except ConfigError:
        return False
    return True


def _check_counts(root: Path, index: Mapping[str, Sequence[Any]], wanted: Mapping[str, int] | None) -> None:
    for folder in wanted or ():
        if folder not in index:
            raise ConfigError(f"env.make.games.{folder}", (wanted or {})[folder], choices=list(index))
    for folder, listed in index.items():
        should = (wanted or {}).get(folder)
        if not listed or (should is not None and len(listed) != should):
            said = f"{root / folder} has {len(listed)} games that can be played, and should have {should or 'some'}"
            remedy = "unzip it again (aem_exp.prepare does); or say env.make.games=null to take what is there"
            raise ConfigError("env.make.data", str(root.parent), f"{said}: {remedy}")


def _load_index(
    root: Path,
    wanted: Mapping[str, int] | None,
    tell: Callable[[int, int], None] = lambda *_: None,
    thorough: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """The playable games by folder, read once and kept in the cache; anew where a folder has changed.

    `thorough` looks at the size and time of every game, which takes seconds on a slow disk; without it only the folders of tasks
    are counted, and all is looked at once games are missing.
    """
    for name in COUNTS:
        if not (root / name).is_dir():
            raise ConfigError("env.make.data", str(root.parent), f"has no {FOLDER}/{name}: unzip the archives again")
    file = disk.cache_dir() / f"alfworld-index-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}.json"
    stamp = [
        RULES_VERSION,
        *([name, (root / name).stat().st_mtime_ns, len(os.listdir(root / name))] for name in COUNTS),
    ]
    with suppress(OSError, ValueError, KeyError, ConfigError):
        known = json.loads(file.read_text())
        if known["stamp"] == stamp and (not thorough or known["files"] == _digest_files(root)):
            _check_counts(root, known["games"], wanted)
            return known["games"]
    return _build_index(root, file, stamp, wanted, tell)


def _build_index(
    root: Path, file: Path, stamp: Any, wanted: Mapping[str, int] | None, tell: Callable[[int, int], None]
) -> dict[str, list[dict[str, Any]]]:
    """Read all games, and keep the index of them in a file of the cache."""
    from filelock import FileLock

    disk.check_writable(file.parent, "AEM_CACHE")
    with FileLock(f"{file}.lock"):
        files = _digest_files(root)
        with suppress(OSError, ValueError, KeyError):  # another process has read them meanwhile
            known = json.loads(file.read_text())
            if (known["stamp"], known["files"]) == (stamp, files):
                _check_counts(root, known["games"], wanted)
                return known["games"]
        log.info("indexing the games in %s (once)", root)
        games = _read_all(root, {name: root / name for name in COUNTS}, tell)
        _check_counts(root, games, wanted)
        disk.write_atomically(file, json.dumps({"stamp": stamp, "files": files, "games": games}))
    return games


def _digest_files(root: Path) -> str:
    """A digest of the name, size and time of every game."""
    told = hashlib.sha256()
    for file in sorted(root.glob("*/*/*/game.tw-pddl")):
        about = file.stat()
        told.update(f"{file.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return told.hexdigest()


def _read_all(
    root: Path, folders: Mapping[str, Path], tell: Callable[[int, int], None]
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    trials = {
        name: sorted(file.parent for file in folder.glob("*/*/traj_data.json")) for name, folder in folders.items()
    }
    everything, done, bare = sum(map(len, trials.values())), 0, 0
    for name, listed in trials.items():
        found[name] = []
        for trial in listed:
            done += 1
            tell(done, everything)
            if any(word in str(trial.relative_to(root)) for word in ("movable", "Sliced")):
                continue
            bare += not (trial / "game.tw-pddl").exists()
            game = _read_game(root, trial)
            found[name] += [game] if game else []
    if not any(found.values()):
        why = "none of its games has a game.tw-pddl" if bare else "none of its games can be played"
        remedy = f"{why}: json_2.1.2_tw-pddl.zip is missing, or from before version 0.4.0; unzip {ARCHIVES[1][0]} there"
        raise ConfigError("env.make.data", str(root.parent), remedy)
    return found


def _read_game(root: Path, trial: Path) -> dict[str, Any] | None:
    """A game for the index; None where it cannot be played, as ALFWorld decides."""
    file = trial / "game.tw-pddl"
    try:
        about = json.loads((trial / "traj_data.json").read_text())
        if about["task_type"] not in games.KINDS or not file.exists():
            return None
        data = file.read_bytes()
        game, params = json.loads(data), about["pddl_params"]
        if not game.get("solvable"):
            return None
        rules = engine.fingerprint(game["pddl_domain"], game["grammar"])
        target = params["toggle_target"] or params["parent_target"]
        kind, wanted = about["task_type"], params["object_target"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = f"{file} is no game: {type(error).__name__}: {error}; unzip it again"
        raise ConfigError("env.make.data", str(root.parent), remedy) from error
    return {
        "file": str(trial.relative_to(root)),
        "kind": kind,
        "object": wanted,
        "target": target,
        "sha256": hashlib.sha256(data).hexdigest()[:16],
        "rules": rules,
    }
