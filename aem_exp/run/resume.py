"""Finds the step from which a run starts (its newest complete checkpoint, or step 0), and prepares the run directory.

This module imports neither torch nor MLflow.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from aem_exp import config, provenance
from aem_exp.cluster import distributed
from aem_exp.config import ConfigError, Experiment, continuation
from aem_exp.core import disk
from aem_exp.core.errors import format_value
from aem_exp.rundir import BEFORE, EXPERIMENT, FIXED_STATES, checkpoints, episodes

log = logging.getLogger("aem_exp")
SPARE_BYTES = 50_000_000  # for all files without weights


@dataclass(frozen=True)
class ResumePoint:
    """The point from which a start of a run begins, as its first process found it."""

    step: int
    """Number of steps that are already trained."""
    checkpoint: Path | None
    """The newest complete checkpoint; None if no step was saved."""
    is_scored: bool
    """Whether the policy was scored before the first step."""
    changes: list[str] = field(default_factory=list)
    """Changes of code, libraries or machine since the first start."""

    @property
    def last_measured_step(self) -> int:
        """The last step whose metrics are kept; -1 if the policy was not yet scored before the first step."""
        return self.step if self.checkpoint or self.is_scored else -1


def find_resume_point(folder: Path) -> ResumePoint:
    """Return the point from which a run resumes."""
    checkpoint = checkpoints.find_newest(folder)
    return ResumePoint(checkpoints.steps(checkpoint) if checkpoint else 0, checkpoint, (folder / BEFORE).exists())


def prepare_run_dir(experiment: Experiment, folder: Path, weights: str | None) -> ResumePoint:
    """Prepare the run directory for this start, and return its resume point.

    Raises:
        ConfigError: the disk is too full, all checkpoints are damaged, or code, libraries or machine have changed.
        DamagedFileError: a record of the run is damaged.
    """
    _check_disk_space(folder, weights)
    for sentence in checkpoints.set_aside_damaged(folder):
        log.warning(sentence)
    if experiment.parent_dir and checkpoints.find_newest(folder) is None:
        checkpoint = continuation.starting_checkpoint(experiment)
        checkpoints.copy_into_run(checkpoint, folder)
        states = checkpoint.parent / FIXED_STATES
        if states.exists():  # both runs measure their steps on the same states
            disk.write_atomically(folder / FIXED_STATES, states.read_text())
    start = find_resume_point(folder)
    _check_sharding(experiment, start)
    ranks = distributed.world_size()
    if start.is_scored and start.checkpoint is None and provenance.list_changes(folder, experiment, weights, ranks):
        (folder / BEFORE).unlink()  # nothing is trained yet: score the policy again, with the present code
        start = find_resume_point(folder)
    _check_record(folder, start)
    changes = provenance.record_start(folder, experiment, weights, start.step if start.is_scored else None, ranks)
    disk.write_atomically(folder / EXPERIMENT, json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return replace(start, changes=changes)


def _check_disk_space(folder: Path, weights: str | None) -> None:
    """Raise an error if the disk cannot hold two checkpoints (weights and two moments each) and the final model."""
    size = sum(file.stat().st_size for file in Path(weights).glob("*.safetensors")) if weights else 0
    need, free = 7 * size + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(
            "outputs", str(folder), f"has {free / 1e9:.1f} GB free and needs {need / 1e9:.1f} GB; choose another folder"
        )


def _check_sharding(experiment: Experiment, start: ResumePoint) -> None:
    """Raise an error if the checkpoint is sharded and the run is not, or the reverse."""
    sharded = experiment.launch.trainer.get("fsdp", False)
    if start.checkpoint and (saved := checkpoints.is_sharded(start.checkpoint)) != sharded:
        remedy = (
            f"{start.checkpoint} was saved with launch.trainer.fsdp={format_value(saved)}; resume with the same value"
        )
        raise ConfigError("launch.trainer.fsdp", sharded, remedy)


def _check_record(folder: Path, start: ResumePoint) -> None:
    """Check the files that the final records are built from.

    Raises:
        DamagedFileError: the score before the first step, or a part of the episodes, is damaged.
    """
    if start.is_scored:
        disk.read_json(folder / BEFORE, "success")
    for part in episodes.list_parts(folder, start.last_measured_step):
        episodes.check_file(part)
