"""Downloads, checks and indexes the official games.

The index is a file in the cache with the data that tasks need. A game that was changed after indexing is refused when it is
played.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aem_exp.core import console, disk
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs import download
from aem_exp.envs.alfworld import games, grammar

log = logging.getLogger("aem_exp")
INDEX_VERSION: Final = 1  # raise when the same games would give another index
FOLDER: Final = "json_2.1.1"
COUNTS: Final = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}  # playable games; all papers use these counts
ARCHIVES: Final = (  # url, size in bytes
    ("https://github.com/alfworld/alfworld/releases/download/0.2.2/json_2.1.1_json.zip", 72_018_818),
    ("https://github.com/alfworld/alfworld/releases/download/0.4.0/json_2.1.2_tw-pddl.zip", 36_493_542),
)
Progress = Callable[[int, int], None]  # called with the number of items that are done, and the total


def find_root(data: str | None, must_exist: bool = True) -> Path:
    """The folder of the official games."""
    configured = data or os.environ.get("ALFWORLD_DATA")
    root = Path(configured or disk.cache_dir() / "alfworld").expanduser().absolute() / FOLDER
    if must_exist and not root.is_dir():
        files = " and ".join(url for url, _ in ARCHIVES)
        remedy = "" if configured else f"$ALFWORLD_DATA is not set, and {root.parent} "
        remedy += f"has no {FOLDER}/; run python -m aem_exp.prepare +experiment=alfworld_1_5b, or unzip {files} there"
        field = "ALFWORLD_DATA" if configured and not data else "env.make.data"
        raise MissingResource(field, str(root.parent) if configured else None, remedy)
    return root


def fetch_games(data: str | None, counts: Mapping[str, int] | None, say: Callable[[str], None]) -> None:
    """Download the archives unless all games exist, and index the games.

    Resumes after an interruption, and indexes changed games again.
    """
    from filelock import FileLock

    root = find_root(data, must_exist=False)
    disk.check_writable(root.parent, "env.make.data" if data else "ALFWORLD_DATA")
    with FileLock(root.parent / f".{FOLDER}.lock"), console.progress_bar("indexing games") as progress:
        if not _is_complete(root, counts, progress):
            for url, size in ARCHIVES:
                archive = download.fetch(url, root.parent / Path(url).name, size, say)
                download.unzip(archive, root.parent, say)
        load_index(root, counts, progress, thorough=True)


def read_game(root: Path, file: str, sha256: str) -> Mapping[str, Any]:
    """Read a game of the index.

    Raises:
        ValueError: the file was changed after it was indexed.
    """
    path = root / file / "game.tw-pddl"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != sha256:
        raise ValueError(f"{path} was changed after it was indexed; run aem_exp.prepare to index it again")
    return json.loads(data)


def _is_complete(root: Path, counts: Mapping[str, int] | None, progress: Progress) -> bool:
    try:
        load_index(root, counts, progress, thorough=True)
    except ConfigError:
        return False
    return True


def _check_counts(root: Path, index: Mapping[str, Sequence[Any]], counts: Mapping[str, int] | None) -> None:
    for folder in counts or ():
        if folder not in index:
            raise ConfigError(f"env.make.games.{folder}", (counts or {})[folder], choices=list(index))
    for folder, games_there in index.items():
        count = (counts or {}).get(folder)
        if not games_there or (count is not None and len(games_there) != count):
            problem = f"{root / folder} has {len(games_there)} playable games instead of {count or 'at least one'}"
            remedy = "run aem_exp.prepare to unzip it again, or set env.make.games=null to use the existing games"
            raise ConfigError("env.make.data", str(root.parent), f"{problem}; {remedy}")


def load_index(
    root: Path,
    counts: Mapping[str, int] | None,
    progress: Progress = lambda *_: None,
    thorough: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """The playable games of each folder, from the index in the cache. The index is rebuilt if a folder has changed.

    Args:
        thorough: compare the size and time of every game, which takes seconds on a slow disk. Otherwise only the folders of
            tasks are counted, and every game is compared only if games are missing.
    """
    for name in COUNTS:
        if not (root / name).is_dir():
            raise ConfigError("env.make.data", str(root.parent), f"has no {FOLDER}/{name}; unzip the archives again")
    file = disk.cache_dir() / f"alfworld-index-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}.json"
    stamp = [
        INDEX_VERSION,
        *([name, (root / name).stat().st_mtime_ns, len(os.listdir(root / name))] for name in COUNTS),
    ]
    with suppress(OSError, ValueError, KeyError, ConfigError):
        saved = json.loads(file.read_text())
        if saved["stamp"] == stamp and (not thorough or saved["files"] == _digest_files(root)):
            _check_counts(root, saved["games"], counts)
            return saved["games"]
    return _build_index(root, file, stamp, counts, progress)


def _build_index(
    root: Path, file: Path, stamp: Any, counts: Mapping[str, int] | None, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Read all games and write their index to a file in the cache."""
    from filelock import FileLock

    disk.check_writable(file.parent, "AEM_CACHE")
    with FileLock(f"{file}.lock"):
        files = _digest_files(root)
        with suppress(OSError, ValueError, KeyError):  # another process may have built it in the meantime
            saved = json.loads(file.read_text())
            if (saved["stamp"], saved["files"]) == (stamp, files):
                _check_counts(root, saved["games"], counts)
                return saved["games"]
        log.info("indexing the games in %s (once)", root)
        games = _read_all(root, {name: root / name for name in COUNTS}, progress)
        _check_counts(root, games, counts)
        disk.write_atomically(file, json.dumps({"stamp": stamp, "files": files, "games": games}))
    return games


def _digest_files(root: Path) -> str:
    """A digest of the name, size and time of every game."""
    digest = hashlib.sha256()
    for file in sorted(root.glob("*/*/*/game.tw-pddl")):
        stat = file.stat()
        digest.update(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_all(root: Path, folders: Mapping[str, Path], progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """The playable games of each folder."""
    index: dict[str, list[dict[str, Any]]] = {}
    trials = {
        name: sorted(file.parent for file in folder.glob("*/*/traj_data.json")) for name, folder in folders.items()
    }
    total, done, without_game = sum(map(len, trials.values())), 0, 0
    for name, folders_of_trials in trials.items():
        index[name] = []
        for trial in folders_of_trials:
            done += 1
            progress(done, total)
            if any(word in str(trial.relative_to(root)) for word in ("movable", "Sliced")):
                continue
            without_game += not (trial / "game.tw-pddl").exists()
            game = _index_game(root, trial)
            index[name] += [game] if game else []
    if not any(index.values()):
        problem = "none of its games has a game.tw-pddl" if without_game else "none of its games can be played"
        remedy = f"json_2.1.2_tw-pddl.zip is missing, or older than version 0.4.0; unzip {ARCHIVES[1][0]} there"
        remedy = f"{problem}: {remedy}"
        raise ConfigError("env.make.data", str(root.parent), remedy)
    return index


def _index_game(root: Path, trial: Path) -> dict[str, Any] | None:
    """The entry of a game in the index; None if the game is not playable by ALFWorld's own rules."""
    file = trial / "game.tw-pddl"
    try:
        trajectory = json.loads((trial / "traj_data.json").read_text())
        if trajectory["task_type"] not in games.KINDS or not file.exists():
            return None
        data = file.read_bytes()
        game, params = json.loads(data), trajectory["pddl_params"]
        if not game.get("solvable"):
            return None
        rules = grammar.fingerprint(game["pddl_domain"], game["grammar"])
        target = params["toggle_target"] or params["parent_target"]
        kind, wanted = trajectory["task_type"], params["object_target"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = f"{file} is not a valid game ({type(error).__name__}: {error}); unzip it again"
        raise ConfigError("env.make.data", str(root.parent), remedy) from error
    return {
        "file": str(trial.relative_to(root)),
        "kind": kind,
        "object": wanted,
        "target": target,
        "sha256": hashlib.sha256(data).hexdigest()[:16],
        "rules": rules,
    }
