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
JOB_FAILURES: Final = {  # state of a job that ended before the run could record a reason -> failure class, sentence
    "OUT_OF_MEMORY": ("oom", "the node ran out of memory: raise mem_gb in site.yaml or lower launch.device_episodes"),
    "NODE_FAIL": ("node", "its node failed"),
    "BOOT_FAIL": ("node", "its node did not boot"),
    "TIMEOUT": ("time", "it reached its time limit before it could save: raise launch.warn_seconds"),
    "CANCELLED": ("user", "its job was cancelled"),
    "PREEMPTED": ("node", "its job was preempted and not requeued"),
    "DEADLINE": ("time", "its job's deadline passed"),
}
NEVER_STARTED: Final = (
    "its job ended before the run began; if there is no log either, the node cannot read the run directory"
)
RETRYABLE: Final = ("node", "time", "user", "killed", "unseen")  # the experiment is not the cause: submit it again


class RunStatus(StrEnum):
    """The state of a run."""

    DONE = "done"
    RUNNING = "running"
    QUEUED = "queued"
    STOPPED = "stopped"
    FAILED = "failed"
    NEW = "new"


@dataclass(frozen=True)
class RunState:
    """The progress of one run, and the reason if it does not progress."""

    what: RunStatus
    """Its status."""
    step: int = 0
    """The last step with metrics."""
    steps: int = 0
    """The planned number of steps; 0 if unknown."""
    left: float = math.nan
    """Estimated seconds to the last step; NaN if unknown."""
    score: tuple[str, float] | None = None
    """Name and value of the newest success metric."""
    starts: int = 0
    """The number of times the run was started."""
    kind: str = ""
    """The class of the failure."""
    sentence: str = ""
    """The reason of a failure or stop, the reason a job is pending, or the owner of the run lock."""
    job: str = ""
    """The id of its last job."""
    log: str = ""
    """The log file of that job."""

    @property
    def missing(self) -> bool:
        """Whether the run is unfinished, no process runs it, and a new start could finish it."""
        return self.what in (RunStatus.NEW, RunStatus.STOPPED) or (
            self.what == RunStatus.FAILED and self.kind in RETRYABLE
        )


def read(folders: Sequence[Path]) -> dict[Path, RunState]:
    """Read the state of each run, with one query to the scheduler."""
    records = {folder: _read_job_record(folder) for folder in folders}
    jobs = slurm.query_jobs(record["job"] for record in records.values() if "job" in record)
    return {folder: _read_or_damaged(folder, records[folder], jobs) for folder in folders}


def _read_job_record(folder: Path) -> dict[str, Any]:
    """The last job of a run; empty if there is none or the file cannot be read."""
    with suppress(OSError, ValueError):
        return dict(slurm.read_job_record(folder))
    return {}


def _read_or_damaged(folder: Path, record: Mapping[str, Any], jobs: Mapping[str, Job]) -> RunState:
    """The state of a run. Damaged files give a failed state, so that they do not affect the table of other runs."""
    try:
        return _read_state(folder, record, jobs)
    except disk.DamagedFileError as error:
        return RunState(RunStatus.FAILED, kind="disk", sentence=error.remedy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return RunState(
            RunStatus.FAILED,
            kind="disk",
            sentence=f"its run directory cannot be read: {attempts.describe_error(error)}",
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
    """The state of an unfinished run without a process."""
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
    if last.get("event") == "start":  # started, but never ended: killed
        kind, sentence = JOB_FAILURES.get(job.state if job else "", ("killed", "its process was killed"))
        return RunState(RunStatus.FAILED, kind=kind, sentence=sentence, **facts)
    return RunState(RunStatus.NEW, **facts)


def _failure_from_log(log: Path) -> tuple[str, str]:
    """Class and sentence of a failure before the run began, from the job's log: a refusal or a traceback."""
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
    """The newest value of the first success metric that was logged: test, else eval, else train."""
    for name in SUCCESS_METRICS:
        for row in reversed(rows):
            if name in row:
                return name, row[name]
    return None


def _seconds_left(rows: Sequence[metrics.MetricRow], steps: int, recent: int = 10) -> float:
    """Estimated seconds to the last step, at the pace of the last `recent` steps."""
    times = [(row["step"], row[metrics.LOGGED_AT] / 1000) for row in rows if "train/success" in row][-recent:]
    if len(times) < 2:
        return math.nan
    (first, begun), (last, at) = times[0], times[-1]
    pace = (at - begun) / (last - first)
    return max(0.0, pace * (steps - last) - (time.time() - at))
