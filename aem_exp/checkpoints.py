"""Which checkpoint of a run counts: the newest one that was written to its end.

transformers leaves an interrupted save behind like a finished one. Here a mark is written last, so a folder without it is
never resumed from.
"""

import json
import os
from pathlib import Path

_MARK = "step.json"


def mark(checkpoint: Path, step: int, ranks: int) -> None:
    """Declare a checkpoint complete: every rank has written its part of the state after `step` steps."""
    part = checkpoint / (_MARK + ".part")
    part.write_text(json.dumps({"step": step, "ranks": ranks}))
    os.replace(part, checkpoint / _MARK)


def newest(run_dir: Path) -> Path | None:
    complete = [path for path in run_dir.glob("checkpoint-*") if (path / _MARK).exists()]
    return max(complete, key=updates, default=None)


def updates(checkpoint: Path) -> int:
    """Optimizer steps taken when it was saved."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def steps(checkpoint: Path) -> int:
    """Steps that were trained when it was saved."""
    return json.loads((checkpoint / _MARK).read_text())["step"]
