"""Archives: one run as a file of a few kilobytes (`RUN.json.gz`), with everything that a comparison needs.

The same run always gives the same bytes.
"""

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import DIVERGED, EVALUATIONS, EXPERIMENT, PROVENANCE, RESULT, attempts, episodes, metrics

SUFFIX: Final = ".json.gz"
NAME: Final = re.compile(r"[A-Za-z0-9][\w.+=-]*", re.ASCII)  # name of a run
MAX_BYTES: Final = 5 << 20  # limit of the uncompressed size, because an archive may come from an untrusted source
DIGITS: Final = 5  # significant digits of a value in a curve
CURVE_PREFIXES: Final = ("train/", "aem/", "drift/", "eval/success", "eval/response_entropy")
# Keys of an experiment that do not change its results.
EXCLUDED_KEYS: Final = ("outputs", "tracking", "parent_dir", "resume", "launch")
RECORDED_LAUNCH_KEYS: Final = ("nodes", "gpus_per_node", "server_nodes")
DONE, NAN = "done", "nan"  # a run state, and a failure class


@dataclass(frozen=True)
class Archive:
    """One archived run. The fields are the keys of the file."""

    run: str
    """Name of the run directory."""
    experiment: dict[str, Any]
    """The experiment, without the keys that say where it ran."""
    what: str
    """Status of the run: `done`, or another status of `run_state`."""
    why: tuple[str, str] = ("", "")
    """Class of the failure, and a sentence that describes it."""
    result: dict[str, Any] = field(default_factory=dict)
    """Content of `result.json` or `diverged.json`; empty if the run has no score."""
    tasks: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of the final panel: `id`, `kind`, `success` (one list of repeats per task), and `score` if the env has scores."""
    endings: dict[str, int] = field(default_factory=dict)
    """Number of episodes of the final panel, by how they ended."""
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    """`step`, and one list of values per metric; None at steps where the metric was not measured."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Code version, packages, weights and machine."""
    spent: dict[str, float] = field(default_factory=dict)
    """`seconds`, `gpus`, `episodes`, `tokens` and `updates`, those that are known."""
    players: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of other agents on the same panel, by the name of the agent."""

    @property
    def done(self) -> bool:
        """Whether the run has a score: it is finished, or it diverged."""
        return bool(self.result)

    @property
    def seed(self) -> int:
        return int(self.experiment["seed"])

    @property
    def method(self) -> int | None:
        """Revision of the method; 0 if the run recorded none, None for a run of another framework."""
        return int(self.provenance.get("method", 0)) if self.provenance else None

    @property
    def success(self) -> list[float]:
        """Success of each task of the final panel, averaged over its repeats."""
        return [fmean(repeats) for repeats in self.tasks["success"]]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) pairs of a metric, at the steps where it was measured."""
        pairs = zip(self.curves.get("step", ()), self.curves.get(name, ()), strict=False)
        return [(int(step), value) for step, value in pairs if step is not None and value is not None]


def from_run_dir(folder: Path, what: str, why: tuple[str, str] = ("", "")) -> Archive:
    """Build the archive of a run directory.

    Args:
        what: status of the run.
        why: class and sentence of its failure.

    Raises:
        DamagedFileError: a file of the run directory is damaged.
    """
    experiment, rows = disk.read_json(folder / EXPERIMENT), metrics.read(folder)
    scored = RESULT if what == DONE else DIVERGED if why[0] == NAN else None
    result = _read_json_if_present(folder / scored) if scored else {}
    played = _read_final_episodes(folder, result) if result else []
    launch = experiment.get("launch", {})
    return Archive(
        run=folder.name,
        experiment={key: value for key, value in experiment.items() if key not in EXCLUDED_KEYS}
        | {"launch": {key: launch[key] for key in RECORDED_LAUNCH_KEYS if launch.get(key)}},
        what=what,
        why=why,
        result=result,
        tasks=_group_by_task(played),
        endings=dict(sorted(Counter(row["ended"] for row in played).items())),
        curves=_curves(rows),
        provenance=_read_json_if_present(folder / PROVENANCE),
        spent=_spent_resources(folder, launch, result, rows),
        players=_read_other_agents(folder, experiment, result),
    )


def _read_json_if_present(file: Path) -> dict[str, Any]:
    """Read a JSON file; return an empty mapping if there is none (the run failed before writing it)."""
    return disk.read_json(file) if file.exists() else {}


def _read_final_episodes(folder: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the episodes of the evaluations on the final panel whose mean is the result."""
    columns = ["split", "step", "task", "kind", "won", "score", "ended", "draw", "member"]
    chosen = [("split", "==", result["final"]["panel"]), ("step", "in", result.get("final_steps", [result["steps"]]))]
    rows = episodes.read(folder / episodes.FILE, columns=columns, filters=chosen).to_pylist()
    return rows[-int(result["final"]["episodes"]) :]


def _group_by_task(episodes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in episodes:
        by_task.setdefault(row["task"], []).append(row)

    def each(name: str) -> list[list[float]]:
        """Return a column as one list of episodes per task; a crashed episode counts as 0."""
        return [[0.0 if r["ended"] == "crashed" else r[name] or 0.0 for r in rows] for rows in by_task.values()]

    kinds = [rows[0]["kind"] for rows in by_task.values()]
    scored = any(row["score"] is not None for row in episodes)
    return {"id": list(by_task), "kind": kinds, "success": each("won")} | ({"score": each("score")} if scored else {})


def _curves(rows: Sequence[metrics.MetricRow]) -> dict[str, list[float | None]]:
    names = sorted({name for row in rows for name in row if name.startswith(CURVE_PREFIXES)})
    table = {name: [_round_finite(row.get(name)) for row in rows] for name in names}
    return {"step": [int(row["step"]) for row in rows], **table} if rows else {}


def _round_finite(value: float | None) -> float | None:
    return float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None


def _spent_resources(
    folder: Path, launch: Mapping[str, Any], result: Mapping[str, Any], rows: Sequence[metrics.MetricRow]
) -> dict[str, float]:
    nodes = launch.get("nodes", 1) + launch.get("server_nodes", 0)
    sums = {
        "episodes": sum(row.get("train/episodes", 0.0) for row in rows),
        "tokens": sum(row.get("train/tokens_generated", 0.0) for row in rows),
    }
    seconds = attempts.total_seconds(folder)
    return {
        **({"seconds": round(seconds, 1)} if seconds is not None else {}),
        "gpus": nodes * launch.get("gpus_per_node", 0),
        **sums,
        **({"updates": result["updates"]} if result else {}),
    }


def _read_other_agents(
    folder: Path, experiment: Mapping[str, Any], result: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Read the evaluations of other agents (such as the untrained policy) on the run's final panel and with its env settings."""
    keys = ("player", "success", "episodes", "repeats", "interval", "panel_hash", "temperature", "standard_error")
    final, settings = result.get("final") or {}, experiment.get("evaluation") or {}
    out: dict[str, dict[str, Any]] = {}
    for file in sorted((folder / EVALUATIONS).glob(f"*/{RESULT}")):
        try:
            other = disk.read_json(file)
        except disk.DamagedFileError:  # an evaluation can be repeated
            continue
        name, rules = other.get("player"), other.get("identity", {}).get("env", {})
        same_rules = all(rules[key] == experiment["env"].get(key) for key in rules)
        same_temperature = other.get("temperature") in (None, settings.get("temperature"))
        same_panel = final and other.get("panel_hash") == final.get("panel_hash")
        if name not in (None, "policy") and same_panel and same_rules and same_temperature:
            out[str(name)] = {key: other[key] for key in keys if key in other}
    return out


# Reading and writing.


def write(archive: Archive, folder: Path) -> Path:
    """Write `RUN.json.gz` to the folder and return its path."""
    text = json.dumps(asdict(archive), sort_keys=True, separators=(",", ":"), allow_nan=False)
    file = folder / f"{archive.run}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    disk.write_atomically(file, gzip.compress(text.encode(), mtime=0))
    return file


def read(file: Path) -> Archive:
    """Read an archive, which may come from another machine.

    Raises:
        ConfigError: the file is not an archive of a run.
    """
    try:
        with gzip.open(file) as content:
            text = content.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        data = json.loads(text, parse_constant=_refuse_constant)
        archive = Archive(**{**data, "why": tuple(data["why"])})
        _validate(archive, file)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError("archive", str(file), f"is not an archive of a run: {error}") from error
    return archive


def read_folder(folder: Path, runs: Iterable[Path]) -> dict[Path, Archive]:
    """Read the archives of these run directories from a folder; a run without an archive is left out.

    Raises:
        ConfigError: the folder does not exist, or one of its files is not an archive of a run.
    """
    if not folder.is_dir():
        raise ConfigError("--from", str(folder), "must be a folder with archives of runs")
    files = {run: folder / f"{run.name}{SUFFIX}" for run in runs}
    return {run: read(file) for run, file in files.items() if file.is_file()}


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number")


def _validate(archive: Archive, file: Path) -> None:
    """Raise an error for content that no run writes. An archive holds only text and numbers; nothing in it is executed."""
    for each in fields(Archive):
        wanted = {"run": str, "what": str, "why": tuple}.get(each.name, dict)
        if not isinstance(getattr(archive, each.name), wanted):
            raise ValueError(f"{each.name} is not a {wanted.__name__}")
    if archive.run != file.name.removesuffix(SUFFIX) or not NAME.fullmatch(archive.run):
        raise ValueError(f"the name of its run is {archive.run!r}")
    int(archive.experiment["seed"]), int(archive.provenance.get("method", 0))
    for part in ("trainer", "env", "model", "baseline", "modulation", "launch"):
        if not isinstance(archive.experiment.get(part, {}), dict):
            raise ValueError(f"experiment.{part} is not a mapping")
    tasks, curves = archive.tasks, archive.curves
    if archive.result and not (tasks["id"] and len({len(tasks[key]) for key in ("id", "kind", *tasks)}) == 1):
        raise ValueError("the columns of tasks are empty or differ in length")
    repeats = {len(values) for values in tasks.get("success", ())}
    if len(repeats) > 1 or 0 in repeats:
        raise ValueError("the tasks differ in their number of repeats")
    if not all(0 <= value <= 1 for values in tasks.get("success", ()) for value in values):
        raise ValueError("a success is not between 0 and 1")
    if any(len(values) != len(curves["step"]) for values in curves.values()):
        raise ValueError("the curves differ in length")
    numbers = [*archive.spent.values(), *archive.endings.values(), *(v for values in curves.values() for v in values)]
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise ValueError("a value that must be a number is a text")
    for name in ("final", "before", "packages"):
        if not isinstance(archive.result.get(name) or {}, dict):
            raise ValueError(f"result.{name} is not a mapping")
    if not all({"success", "repeats"} <= set(player) for player in archive.players.values()):
        raise ValueError("a player lacks success or repeats")
