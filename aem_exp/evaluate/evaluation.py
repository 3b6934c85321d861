"""Evaluates an agent on a panel: a fixed, hashed list of held-out tasks, each played exactly `repeats` times.

Sampling depends only on (panel, task, repeat), so an interrupted evaluation resumes with the same numbers.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.config import Env, Experiment
from aem_exp.core import disk
from aem_exp.core.errors import RunError
from aem_exp.envs import World
from aem_exp.envs.panel import Panel
from aem_exp.evaluate.panels import build_outcome, check_results, list_episodes
from aem_exp.rundir import EVALUATIONS, RESULT
from aem_exp.stats import scores

if TYPE_CHECKING:
    from aem_exp.evaluate.agents import Agent
    from aem_exp.evaluate.display import ProgressLine
    from aem_exp.rollout.types import Trajectory

log = logging.getLogger("aem_exp")


@dataclass(frozen=True)
class EvaluationSetup:
    """The settings that all agents of an evaluation share."""

    experiment: Experiment
    world: World
    panel: Panel
    repeats: int
    """Number of episodes per task."""
    temperature: float
    """Sampling temperature of models."""
    at_once: int
    """Maximum number of parallel episodes."""
    out: Path
    """Folder that contains `evaluations/`."""


def evaluate_agent(setup: EvaluationSetup, agent: "Agent", line: "ProgressLine") -> tuple[Path, dict[str, Any]]:
    """Evaluate an agent; return the folder of its evaluation and the content of `result.json`. Finished episodes are reused."""
    identity = {
        "player": agent.name,
        "env": env_rules(setup.experiment),
        "world": setup.world.fingerprint,
        "panel": [setup.panel.name, setup.panel.hash],
        "repeats": setup.repeats,
        **agent.identity(),
        **({"temperature": setup.temperature} if agent.model else {}),
        **({"sampler": "served"} if agent.model and setup.experiment.launch.sampler == "served" else {}),
        **({"bf16": True} if agent.model and setup.experiment.trainer.bf16 else {}),
    }
    folder = setup.out / EVALUATIONS / _folder_name(setup, agent, identity)
    if not (folder / RESULT).exists():
        disk.check_writable(folder, "outputs")
        with lock_folder(folder, line):
            if not (folder / RESULT).exists():
                _play_remaining(setup, agent, folder, identity, line)
    return folder, disk.read_json(folder / RESULT, "success")


def _folder_name(setup: EvaluationSetup, agent: "Agent", identity: dict[str, Any]) -> str:
    panel = setup.panel.name.replace("[:", "-").rstrip("]")
    temperature = f"-T{setup.temperature:g}" if agent.model else ""
    return f"{panel}-{hash_identity(identity)}-k{setup.repeats}{temperature}-{agent.name}"


def env_rules(experiment: Experiment) -> dict[str, Any]:
    """Return the env settings that decide how episodes are played. Neutral settings are left out, so new ones change no hash."""
    neutral = asdict(Env())
    return {key: value for key, value in asdict(experiment.env).items() if key != "name" and value != neutral[key]}


def hash_identity(identity: dict[str, Any]) -> str:
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def lock_folder(folder: Path, line: "ProgressLine") -> Iterator[None]:
    """Lock the folder of an evaluation; a second process waits, and then finds the result."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        line.show_stage(f"waiting for another process that evaluates {folder.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _play_remaining(
    setup: EvaluationSetup, agent: "Agent", folder: Path, identity: dict[str, Any], line: "ProgressLine"
) -> None:
    """Play the missing episodes in parts. Then join the parts, write the result and remove the parts, in this order."""
    import pyarrow.parquet

    from aem_exp.evaluate import agents
    from aem_exp.rundir.episodes import EpisodeWriter, build_record

    def record(part: Sequence["Trajectory"]) -> None:
        check_results(setup.panel, part)
        writer.add([_clear_model_fields(build_record(agent.steps, setup.panel.name, t, True), agent) for t in part])
        writer.write(done)

    wanted = list_episodes(setup.panel, setup.repeats)
    writer = EpisodeWriter(folder, len(wanted))  # the name of a part is the number of episodes before it
    if damaged := writer.drop_damaged():
        log.warning("%s of %s is damaged; its episodes and all later ones are played again", damaged.name, folder)
    done = sum(pyarrow.parquet.read_metadata(part).num_rows for part in (folder / "episodes").glob("*.parquet"))
    if done < len(wanted):
        line.show_stage(f"{agent.name}: loading {'the weights' if agent.model else 'the env'}")
        with (
            agents.open_agent(agent, setup.experiment, setup.world, setup.temperature, setup.at_once, line) as play,
            closing(play(wanted[done:])) as played,
        ):
            line.start_agent(agent.name, done, len(wanted), setup.experiment.env.max_turns)
            while done < len(wanted):
                line.start_chunk(done, min(setup.at_once, len(wanted) - done))
                part: list[Trajectory] = []
                try:
                    for trajectory in islice(played, setup.at_once):
                        part.append(trajectory)
                except BaseException:  # record the finished episodes of this part
                    if part:
                        with suppress(RunError):
                            record(part)
                    raise
                record(part)
                done += len(part)
            line.start_chunk(len(wanted), 0)
    result = _build_result(setup, agent, writer.finish()) | {"identity": identity}
    disk.write_atomically(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    writer.remove_parts()


def _clear_model_fields(record: dict[str, Any], agent: "Agent") -> dict[str, Any]:
    """Clear tokens and entropy in the record of an agent without a model."""
    return record if agent.model else record | {"tokens": None, "response_entropy": None}


def _build_result(setup: EvaluationSetup, agent: "Agent", file: Path) -> dict[str, Any]:
    """Build the content of `result.json` from the episodes of an agent."""
    import pyarrow.parquet

    from aem_exp import provenance

    columns = ["draw", "kind", "won", "score", "return", "ended", "error", "tokens", "habits"]
    of_responses = ["responses.list.element.valid", "responses.list.element.entropy"]
    rows = pyarrow.parquet.ParquetFile(file).read([*columns, *of_responses]).to_pylist()
    outcomes = [build_outcome(row) for row in rows]
    statistics = scores.statistics(outcomes, setup.repeats)
    total = scores.summarize_outcomes(setup.panel.name, setup.panel.hash, outcomes)
    return {
        "player": agent.name,
        **asdict(total),
        "interval": scores.wilson_interval(total.success, statistics["effective_episodes"]),
        **statistics,
        "errors": sorted({row["error"] for row in rows if row["error"]})[:10],
        "temperature": setup.temperature if agent.model else None,
        "steps": agent.steps,
        "weights": agent.folder or None,
        "fingerprint": setup.world.fingerprint,
        "packages": provenance.package_versions(),
    }
