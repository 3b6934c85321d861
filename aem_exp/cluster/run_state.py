"""The state of a run (done, running, queued, stopped, failed, new) and the cause of a failure, read from its run directory
and the scheduler without changing either.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from aem_exp.cluster import slurm
from aem_exp.cluster.slurm import Job
from aem_exp.core import disk
from aem_exp.rundir import EXPERIMENT, RESULT, attempts, episodes, lock, metrics

SUCCESS_METRICS: Final = ("test/success", "eval/success", "train/success")
JOB_FAILURES: Final = {  # a job's end, where the run itself could not tell -> class, and what helps
    "OUT_OF_MEMORY": ("oom", "the node ran out of memory: raise mem_gb in site.yaml or lower launch.device_episodes"),
    "NODE_FAIL": ("node", "its node failed"),
    "BOOT_FAIL": ("node", "its node did not come up"),
    "TIMEOUT": ("time", "its time limit came before it could save: raise launch.warn_seconds"),
    "CANCELLED": ("user", "its job was cancelled"),
    "PREEMPTED": ("node", "its job was preempted and not requeued"),
    "DEADLINE": ("time", "its job's deadline passed"),
}
NEVER_STARTED: Final = (
    "its job ended before the run began; if there is no log either, the node does not see the run dir"
)
RETRYABLE: Final = ("node", "time", "user", "killed", "unseen")  # they say nothing about the experiment: send it again


class RunStatus(StrEnum):
    """Whether a run is done, on its way, or neither."""

    DONE = "done"
    RUNNING = "running"
    QUEUED = "queued"
    STOPPED = "stopped"
    FAILED = "failed"
    NEW = "new"


@dataclass(frozen=True)
class RunState:
    """How far one run is, and what ails it."""

    what: RunStatus
    """Whether it is done, on its way, or neither."""
    step: int = 0
    """The last step that was measured."""
    steps: int = 0
    """The steps that the run shall have; 0 where that is unknown."""
    left: float = math.nan
    """Seconds to the last step; nan where unknown."""
    score: tuple[str, float] | None = None
    """The metric of the newest success, and its value."""
    starts: int = 0
    """How often the run was started."""
    kind: str = ""
    """The class of a failure."""
    sentence: str = ""
    """Why the run failed or stopped, what it waits for, or who runs it."""
    job: str = ""
    """The id of its last job."""
    log: str = ""
    """The log file of that job."""

    @property
    def missing(self) -> bool:
        """No process runs it, and nothing about the experiment says that it cannot be finished."""
        return self.what in (RunStatus.NEW, RunStatus.STOPPED) or (
            self.what == RunStatus.FAILED and self.kind in RETRYABLE
        )


def read(folders: Sequence[Path]) -> dict[Path, RunState]:
    """The state of each run; the scheduler is asked once."""
    records = {folder: _read_job_record(folder) for folder in folders}
    jobs = slurm.query_jobs(record["job"] for record in records.values() if "job" in record)
    return {folder: _read_or_damaged(folder, records[folder], jobs) for folder in folders}


def _read_job_record(folder: Path) -> dict[str, Any]:
    """Which job had a run last; nothing where that cannot be read."""
    with suppress(OSError, ValueError):
        return dict(slurm.read_job_record(folder))
    return {}


def _read_or_damaged(folder: Path, record: Mapping[str, Any], jobs: Mapping[str, Job]) -> RunState:
    """The state of a run; where its files are no longer what was written, that is its state, and no other run's affair."""
    try:
        return _read_state(folder, record, jobs)
    except disk.DamagedFileError as error:
        return RunState(RunStatus.FAILED, kind="disk", sentence=error.remedy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return RunState(
            RunStatus.FAILED, kind="disk", sentence=f"its run dir cannot be read: {attempts.describe_error(error)}"
        )


def _read_state(folder: Path, record: Mapping[str, Any], jobs: Mapping[str, Job]) -> RunState:
    events = attempts.read(folder)
    starts = [event for event in events if event["event"] == "start"]
    rows = metrics.read(folder)
    steps = _planned_steps(folder)
    facts: dict[str, Any] = {
        "step": int(rows[-1]["step"]) if rows else 0,
        "steps": steps,
        "score": _newest_success(rows),
        "starts": len(starts),
        "job": record.get("job", ""),
        "log": record.get("log", ""),
    }
    if (folder / RESULT).exists():
        disk.read_json(folder / RESULT)
        return RunState(RunStatus.DONE, sentence=episodes.describe_truncation(folder), **facts)
    if owner := lock.describe_owner(folder):
        return RunState(RunStatus.RUNNING, left=_seconds_left(rows, steps), sentence=owner, **facts)
    job = jobs.get(record.get("job", ""))
    if job is not None and job.is_live:
        words = "starting" if job.state == "RUNNING" else f"{job.state.lower()} {job.reason}".strip()
        return RunState(RunStatus.QUEUED, sentence=words, **facts)
    return _inactive_state(events, starts, job, record, facts)


def _inactive_state(
    events: Sequence[dict[str, Any]],
    starts: Sequence[dict[str, Any]],
    job: Job | None,
    record: Mapping[str, Any],
    facts: dict[str, Any],
) -> RunState:
    """A run that no process runs, and which is not done."""
    began = starts and starts[-1]["at"] >= record.get("at", 0)  # since it was last submitted
    last = events[-1] if events else {}
    if record and not began:
        if job is not None and job.state in JOB_FAILURES:
            kind, sentence = JOB_FAILURES[job.state]
            return RunState(RunStatus.FAILED, kind=kind, sentence=sentence, **facts)
        kind, sentence = _failure_from_log(Path(record["log"]))
        return RunState(RunStatus.FAILED, kind=kind, sentence=sentence, **facts)
    if last.get("event") == attempts.FAILED:
        return RunState(RunStatus.FAILED, kind=last["class"], sentence=last["sentence"], **facts)
    if last.get("event") == attempts.STOPPED:
        if job is not None and job.state == "CANCELLED":
            return RunState(RunStatus.FAILED, kind="user", sentence=JOB_FAILURES[job.state][1], **facts)
        return RunState(RunStatus.STOPPED, sentence=last["sentence"], **facts)
    if last.get("event") == "start":  # and no end: killed
        kind, sentence = JOB_FAILURES.get(job.state if job else "", ("killed", "its process was killed"))
        return RunState(RunStatus.FAILED, kind=kind, sentence=sentence, **facts)
    return RunState(RunStatus.NEW, **facts)


def _failure_from_log(log: Path) -> tuple[str, str]:
    """Why a job ended before its run began: it refused, or it crashed; the class, and a sentence."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    for number, line in reversed(list(enumerate(lines))):
        if line.startswith("aem_exp: "):
            return "config", line.removeprefix("aem_exp: ")
        if line.startswith("Traceback (most recent call last)"):
            return "crash", next(
                (after for after in lines[number + 1 :] if after[:1].strip()), "a traceback; see its log"
            )
    return "unseen", NEVER_STARTED


def _planned_steps(folder: Path) -> int:
    file = folder / EXPERIMENT
    return int(disk.read_json(file, "trainer")["trainer"]["steps"]) if file.exists() else 0


def _newest_success(rows: Sequence[metrics.MetricRow]) -> tuple[str, float] | None:
    """The newest success of the most telling kind."""
    for name in SUCCESS_METRICS:
        for row in reversed(rows):
            if name in row:
                return name, row[name]
    return None


def _seconds_left(rows: Sequence[metrics.MetricRow], steps: int, recent: int = 10) -> float:
    """Seconds to the last step, at the pace of the recent ones."""
    times = [(row["step"], row[metrics.LOGGED_AT] / 1000) for row in rows if "train/success" in row][-recent:]
    if len(times) < 2:
        return math.nan
    (first, begun), (last, at) = times[0], times[-1]
    pace = (at - begun) / (last - first)
    return max(0.0, pace * (steps - last) - (time.time() - at))
