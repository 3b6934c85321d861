"""`memory.json`: the peak memory of the first step of a run, and the estimate for the rows of this step."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from aem_exp.core import disk
from aem_exp.core.disk import DamagedFileError
from aem_exp.core.typed import build_from_mapping

FILE: Final = "memory.json"


@dataclass(frozen=True)
class MeasuredMemory:
    """Peak memory of one process in a step, measured and estimated. All sizes are in bytes."""

    step: int
    """Number of finished steps when it was measured."""
    peak: float
    """Measured peak: on a CPU, of the resident memory of the process; on a GPU, of torch's allocator."""
    base: float
    """The part of it that was used before the policy was loaded: Python and its libraries."""
    estimate: float
    """Estimate for the rows of this step, without `base`."""
    rows: int
    """Rows of the largest micro-batch."""
    tokens: int
    """Tokens of each of these rows, with padding."""
    episodes: int
    """Episodes that were played at the same time."""

    @property
    def ratio(self) -> float:
        """Measured memory divided by estimated memory, without `base`."""
        return (self.peak - self.base) / self.estimate

    def correct(self, estimate: float) -> float:
        """Expected peak of a process for another estimate."""
        return self.base + self.ratio * estimate


def read(folder: Path) -> MeasuredMemory | None:
    """The measurement of a run; None if there is none, or if its file is damaged."""
    try:
        return build_from_mapping(MeasuredMemory, disk.read_json(folder / FILE), FILE)
    except (OSError, DamagedFileError, ValueError):
        return None


def write(folder: Path, measured: MeasuredMemory) -> None:
    disk.write_atomically(folder / FILE, json.dumps(asdict(measured), indent=1) + "\n")
