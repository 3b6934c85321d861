"""Where a start of a run begins: at its newest complete checkpoint, or at step 0; and the run dir that this start needs.

It imports neither torch nor MLflow.
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
from aem_exp.rundir import BEFORE, EXPERIMENT, checkpoints, episodes

log = logging.getLogger("aem_exp")
SPARE_BYTES = 50_000_000  # bytes for everything but weights


@dataclass(frozen=True)
class ResumePoint:
    """Where a start of a run begins, as its first process found it."""

    step: int
    """Steps that need not be trained again."""
    checkpoint: Path | None
    """The newest complete checkpoint; None where no step was saved."""
    is_scored: bool
    """Whether the policy was scored before the first step."""
    changes: list[str] = field(default_factory=list)
    """How code, libraries or machine differ from those of the first start."""

    @property
    def last_measured_step(self) -> int:
        """The last step whose measurements stand; -1 where not even the untrained policy was scored."""
        return self.step if self.checkpoint or self.is_scored else -1


def find_resume_point(folder: Path) -> ResumePoint:
    """What a run dir holds to go on from."""
    checkpoint = checkpoints.find_newest(folder)
    return ResumePoint(checkpoints.steps(checkpoint) if checkpoint else 0, checkpoint, (folder / BEFORE).exists())


def prepare_run_dir(experiment: Experiment, folder: Path, weights: str | None) -> ResumePoint:
    """Make the run dir what this start needs, and return where the start begins.

    Raises:
        ConfigError: the disk is too full, no checkpoint can be used, or this start would not continue what ran before.
        DamagedFileError: the run could not be recorded to its end.
    """
    _check_disk_space(folder, weights)
    for sentence in checkpoints.set_aside_damaged(folder):
        log.warning(sentence)
    if experiment.parent_dir and checkpoints.find_newest(folder) is None:
        checkpoints.copy_into_run(continuation.starting_checkpoint(experiment), folder)
    start = find_resume_point(folder)
    _check_sharding(experiment, start)
    ranks = distributed.world_size()
    if start.is_scored and start.checkpoint is None and provenance.list_changes(folder, experiment, weights, ranks):
        (folder / BEFORE).unlink()  # nothing was trained yet: begin anew, with what there is now
        start = find_resume_point(folder)
    _check_record(folder, start)
    changes = provenance.record_start(folder, experiment, weights, start.step if start.is_scored else None, ranks)
    disk.write_atomically(folder / EXPERIMENT, json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return replace(start, changes=changes)


def _check_disk_space(folder: Path, weights: str | None) -> None:
    """Refuse a disk that cannot hold two checkpoints (weights and two moments each) and the final model."""
    size = sum(file.stat().st_size for file in Path(weights).glob("*.safetensors")) if weights else 0
    need, free = 7 * size + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(
            "outputs", str(folder), f"has {free / 1e9:.1f} GB free and needs {need / 1e9:.1f} GB; choose another folder"
        )


def _check_sharding(experiment: Experiment, start: ResumePoint) -> None:
    """Refuse to read a checkpoint of sharded weights into whole ones, and the reverse."""
    sharded = experiment.launch.trainer.get("fsdp", False)
    if start.checkpoint and (saved := checkpoints.is_sharded(start.checkpoint)) != sharded:
        remedy = f"{start.checkpoint} was saved with {format_value(saved)}: go on with that"
        raise ConfigError("launch.trainer.fsdp", sharded, remedy)


def _check_record(folder: Path, start: ResumePoint) -> None:
    """Refuse to go on with a run that could not be recorded to its end.

    Raises:
        DamagedFileError: the score before the first step, or a part of the episodes.
    """
    if start.is_scored:
        disk.read_json(folder / BEFORE, "success")
    for part in episodes.list_parts(folder, start.last_measured_step):
        episodes.check_file(part)
