"""Which checkpoint of a run counts: the newest one that was written to its end.

transformers leaves an interrupted save behind like a finished one. Here a mark is written last, so a folder without it is
never resumed from.
"""

import json
import shutil
from pathlib import Path

from aem_exp import disk

_MARK = "step.json"


def mark(checkpoint: Path, step: int, updates: int, ranks: int) -> None:
    """Declare a checkpoint complete: every rank has written its part of the state after `step` steps."""
    disk.write(checkpoint / _MARK, json.dumps({"step": step, "updates": updates, "ranks": ranks}))


def newest(run_dir: Path) -> Path | None:
    complete = [path for path in run_dir.glob("checkpoint-*") if (path / _MARK).exists()]
    return max(complete, key=_number, default=None)


def steps(checkpoint: Path) -> int:
    """Steps that were trained when it was saved."""
    return json.loads((checkpoint / _MARK).read_text())["step"]


def updates(checkpoint: Path) -> int:
    """Updates that were made when it was saved; what transformers counts, and names it by, includes steps without any."""
    return json.loads((checkpoint / _MARK).read_text()).get("updates", _number(checkpoint))


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def in_pieces(checkpoint: Path) -> bool:
    """It was saved by processes that share the weights (FSDP)."""
    return any(checkpoint.glob("pytorch_model_fsdp*"))


def adopt(checkpoint: Path, run_dir: Path) -> None:
    """Let a run begin at another run's checkpoint: a copy, without a byte where both lie on one disk."""
    copy = run_dir / checkpoint.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns(_MARK), copy_function=disk.link)
    disk.write(copy / _MARK, (checkpoint / _MARK).read_text())
