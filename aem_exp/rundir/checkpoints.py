"""Which checkpoint a run resumes from: the newest complete one whose files match their recorded sizes and CRC-32 checksums."""

import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError

_MARK: Final = "step.json"
_CHUNK_BYTES: Final = 1 << 24  # bytes per read
_READERS: Final = 4  # files read in parallel


def mark_complete(checkpoint: Path, step: int, updates: int, ranks: int) -> None:
    """Mark a checkpoint as complete: every rank has written its part of the state after `step` steps.

    This reads all files once for their checksums, usually from the page cache.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != _MARK)
    names = [str(path.relative_to(checkpoint)) for path in files]
    facts = [{"size": path.stat().st_size, "crc32": crc} for path, crc in zip(files, _crcs(files), strict=True)]
    content = {"step": step, "updates": updates, "ranks": ranks, "files": dict(zip(names, facts, strict=True))}
    disk.write_atomically(checkpoint / _MARK, json.dumps(content))


def find_newest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint whose files have the recorded sizes. Checksums are not compared."""
    return next(
        (checkpoint for checkpoint in list_complete(run_dir) if not describe_damage(checkpoint, content=False)), None
    )


def list_complete(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were marked as complete, newest first."""
    complete = [path for path in run_dir.glob("checkpoint-*") if (path / _MARK).exists()]
    return sorted(complete, key=_number, reverse=True)


def describe_damage(checkpoint: Path, content: bool = True) -> str:
    """Describe how a checkpoint differs from its record; "" if it is intact, or if an older version saved no record.

    Args:
        content: compare checksums too, not only sizes.
    """
    try:
        expected = {checkpoint / name: facts for name, facts in _read_mark(checkpoint).get("files", {}).items()}
        sizes = {file: facts["size"] for file, facts in expected.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{_MARK} cannot be read: {error}"
    for file, size in sizes.items():
        name = file.relative_to(checkpoint)
        if not file.is_file():
            return f"{name} is missing"
        if (actual := file.stat().st_size) != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    files = list(expected) if content else []
    for file, crc in zip(files, _crcs(files), strict=True):
        if crc != expected[file].get("crc32"):
            return f"the content of {file.relative_to(checkpoint)} has changed"
    return ""


def set_aside_damaged(run_dir: Path) -> list[str]:
    """Rename damaged checkpoints, so that the newest intact one is used. Return one sentence per renamed checkpoint.

    Raises:
        ConfigError: all checkpoints are damaged.
    """
    damaged = dict[Path, str]()
    for checkpoint in list_complete(run_dir):
        if not (why := describe_damage(checkpoint)):
            break
        damaged[checkpoint] = why
    else:
        if damaged:
            reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
            remedy = "restore one of them from a copy, or move the run directory away to train from the start"
            raise ConfigError("RUN_DIR", str(run_dir), f"all of its checkpoints are damaged ({reasons}); {remedy}")
    for checkpoint in damaged:
        shutil.rmtree(_damaged_path(checkpoint), ignore_errors=True)
        checkpoint.rename(_damaged_path(checkpoint))
    return [f"{path.name} is damaged ({why}); renamed to {_damaged_path(path).name}" for path, why in damaged.items()]


def steps(checkpoint: Path) -> int:
    """Return the number of trained steps at this checkpoint."""
    return int(_read_mark(checkpoint)["step"])


def updates(checkpoint: Path) -> int:
    """Return the number of updates at this checkpoint.

    The number in the folder's name is that of transformers, which also counts steps without an update.
    """
    return int(_read_mark(checkpoint).get("updates", _number(checkpoint)))


def is_sharded(checkpoint: Path) -> bool:
    """Return whether the checkpoint is sharded over processes (FSDP)."""
    return any(checkpoint.glob("pytorch_model_fsdp*"))


def copy_into_run(checkpoint: Path, run_dir: Path) -> None:
    """Copy a checkpoint of another run, so that this run starts from it. On the same disk the files are hard links."""
    copy = run_dir / checkpoint.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns(_MARK), copy_function=disk.link_or_copy)
    disk.write_atomically(copy / _MARK, (checkpoint / _MARK).read_text())


def _read_mark(checkpoint: Path) -> dict[str, Any]:
    content = json.loads((checkpoint / _MARK).read_text())
    int(content["step"])
    return dict(content)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _damaged_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"damaged-{checkpoint.name}")


def _crcs(files: list[Path]) -> list[int]:
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(_crc, files))


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as data:
        while part := data.read(_CHUNK_BYTES):
            value = zlib.crc32(part, value)
    return value
