"""Atomic writes, checked JSON reads, and the cache folder.

A file of a run dir is complete or absent, and a damaged one is reported with a remedy.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aem_exp.core.errors import ConfigError

PACKAGE = Path(__file__).absolute().parents[1]  # the folder of aem_exp


class DamagedFileError(ConfigError):
    """A file of a run dir is not what was written."""


def cache_dir() -> Path:
    """Where what is made once lies: $AEM_CACHE, else ~/.cache/aem_exp."""
    return Path(os.environ.get("AEM_CACHE") or Path.home() / ".cache" / "aem_exp")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under a second name; a copy where both do not lie on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file at once, or leave it as it was."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError:  # a full disk: what could not be written takes no room
        half.unlink(missing_ok=True)
        raise


def read_json(file: Path, *keys: str) -> dict[str, Any]:
    """The mapping that a file of a run dir holds as JSON; `keys`: what it has at least.

    Raises:
        Damaged: the file cannot be read, or is not what a run writes.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no mapping")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it has no {missing[0]}")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file_error(file, error) from error
    return content


def read_json_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
    """The mappings that a file of a run dir holds as JSON, one per line; a last line that a kill cut short is left out.

    Raises:
        Damaged: the file cannot be read, or a line of it is not what a run writes.
    """
    rows = list[dict[str, Any]]()
    try:
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        for line in lines:
            row = json.loads(line.decode())
            if not (isinstance(row, dict) and all(key in row for key in keys)):
                raise ValueError(f"no mapping with {' and '.join(keys)}")
            rows.append(row)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file_error(file, f"line {len(rows) + 1}: {_error_text(error)}", ", or remove the line") from error
    return rows


def damaged_file_error(file: Path, why: Exception | str, further: str = "") -> DamagedFileError:
    """The error for a file of a run dir that is not what was written; `further`: what else helps than a good copy."""
    remedy = f"put a good copy of it there{further}, or move the run dir away and run again"
    return DamagedFileError("RUN_DIR", str(file.parent), f"{file.name} is damaged ({_error_text(why)}); {remedy}")


def _error_text(error: Exception | str) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


@contextmanager
def create_folder_once(folder: Path) -> Iterator[Path | None]:
    """Make a folder of the cache once: yields an empty one, which becomes it at the end; None where it is there already.

    One process makes it while others wait. What a killed one left half done is removed; one that is there is only read.
    """
    from filelock import FileLock

    if folder.exists():
        yield None
        return
    check_writable(folder.parent, "AEM_CACHE")
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            yield None
            return
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def check_writable(folder: Path, field: str) -> None:
    """Make the folder, and refuse one that takes no files; `field` is the setting that named it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 65536)
            probe.flush()
    except OSError as error:
        raise ConfigError(field, str(folder), f"cannot be written: {error.strerror}; choose another folder") from error


def nonfinite_to_none(value: Any) -> Any:
    """A value for JSON, which has no NaN: null, where a number is not known."""
    if isinstance(value, Mapping):
        return {key: nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
