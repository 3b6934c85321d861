"""The records of an active run: metrics, episodes and crashes. Only the first process writes them; in the other processes
the recorder writes nothing.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.cluster import distributed
from aem_exp.core import disk
from aem_exp.rollout.types import Trajectory
from aem_exp.run.resume import SPARE_BYTES
from aem_exp.rundir import metrics
from aem_exp.rundir.episodes import EpisodeWriter, build_record

if TYPE_CHECKING:
    from aem_exp.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("aem_exp")
StepCallback = Callable[[int, int, dict[str, float]], bool | None]
"""Called with the number of finished steps, the number of all steps, and the metrics of the last step. True stops the run."""


class RunRecorder:
    """Writes the records of a run in one of its processes.

    Attributes:
        episodes: writes the episodes; None except in the first process.
        is_enough: whether the callback asked to stop the run.
    """

    def __init__(
        self, folder: Path, last_measured_step: int, tracker: "Tracker | NullTracker", callback: StepCallback | None
    ) -> None:
        self.folder, self.tracker, self.callback = folder, tracker, callback
        self.episodes = EpisodeWriter(folder, last_measured_step) if distributed.is_main_process() else None
        self.is_enough = False
        self._crash_kinds: set[str] = set()  # kinds of crashes that were already reported

    def log_step(self, step: int, steps: int, row: dict[str, float]) -> None:
        """Log the metrics of a finished step."""
        self.tracker.log(step, row)
        if self.callback and self.callback(step, steps, row):
            self.is_enough = True

    def record_training(self, step: int, played: Sequence[Trajectory]) -> None:
        """Record the episodes of a step, and log a warning for each new kind of crash."""
        assert self.episodes
        self.episodes.add([build_record(step, "train", t, in_full=t.draw == 0) for t in played])
        for kind, group in groupby(sorted(_crashes(played)), lambda crash: crash[0]):
            crashes = list(group)
            if kind not in self._crash_kinds:
                log.warning(
                    "%d episodes of step %d crashed and are left out of the loss; for example, %s",
                    len(crashes),
                    step + 1,
                    crashes[0][1],
                )
            self._crash_kinds.add(kind)

    def record_panel(self, step: int, panel: str, played: Sequence[Trajectory]) -> None:
        """Record the episodes of a panel, with the responses of its first eight tasks."""
        if self.episodes:
            self.episodes.add([build_record(step, panel, t, in_full=t.draw < 8) for t in played])

    def prepare_save(self, step: int, policy: Any) -> None:
        """Write the metrics and episodes up to `step` to disk, before a checkpoint is written.

        Raises:
            OSError: the disk is too full for the checkpoint.
        """
        assert self.episodes
        size = 3 * sum(p.numel() * p.element_size() for p in policy.parameters())  # weights and two moments
        if shutil.disk_usage(self.folder).free < size + SPARE_BYTES:
            raise OSError(errno.ENOSPC, "not enough disk space for the next checkpoint", str(self.folder))
        self.tracker.flush()
        self.episodes.write(step)

    def write_before(self, file: Path, step: int, score: dict[str, Any]) -> None:
        """Write the score of the policy before the first step, and its episodes."""
        if self.episodes:
            self.episodes.write(step)
            _write_json(file, score)

    def write_diverged(self, file: Path, result: dict[str, Any]) -> None:
        """Write the score of a run that diverged, and the record of all episodes."""
        if self.episodes:
            self.episodes.finish()
            _write_json(file, result)

    def finish_episodes(self) -> None:
        """Write the record of all episodes."""
        if self.episodes:
            self.episodes.finish()

    def write_result(self, file: Path, result: dict[str, Any]) -> None:
        """Write the result, which marks the run as finished; then remove the parts of the episodes."""
        if self.episodes:
            _write_json(file, result)
            self.episodes.remove_parts()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    disk.write_atomically(file, json.dumps(content, indent=1) + "\n")


def _crashes(played: Sequence[Trajectory]) -> list[tuple[str, str]]:
    """Return the kind and the description of each crash."""
    return [(t.error.partition(":")[0], f"task {t.task.id}: {t.error}") for t in played if t.error]


def count_crashed(folder: Path) -> int:
    """Return how many training episodes crashed, over all starts of a run."""
    rows = metrics.read(folder)
    return round(sum(row.get("train/ended_crashed", 0.0) * row.get("train/episodes", 0.0) for row in rows))
