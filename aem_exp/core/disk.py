"""Atomic writes, checked JSON reads, and the cache folder.

A file of a run dir is complete or absent. A damaged file is reported with a remedy.
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
    """A file of a run dir does not have the content that a run writes."""


def cache_dir() -> Path:
    """The cache folder: $AEM_CACHE, else ~/.cache/aem_exp."""
    return Path(os.environ.get("AEM_CACHE") or Path.home() / ".cache" / "aem_exp")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a hard link to `source`, or a copy if they are on different disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: on an error it keeps its old content."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:  # on a full disk, the partial file must not take space
        partial.unlink(missing_ok=True)
        raise


def read_json(file: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file of a run dir that contains a mapping with at least these keys.

    Raises:
        DamagedFileError: the file cannot be read, or a run would not write it like this.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"the key {missing[0]} is missing")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file_error(file, error) from error
    return content


def read_json_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
    """Read a JSON Lines file of a run dir, one mapping per line. An incomplete last line, left by a kill, is ignored.

    Raises:
        DamagedFileError: the file cannot be read, or a run would not write one of its lines.
    """
    rows = list[dict[str, Any]]()
    try:
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        for line in lines:
            row = json.loads(line.decode())
            if not (isinstance(row, dict) and all(key in row for key in keys)):
                raise ValueError(f"it is not a mapping with {' and '.join(keys)}")
            rows.append(row)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file_error(
            file, f"line {len(rows) + 1}: {_error_text(error)}", ", or remove this line"
        ) from error
    return rows


def damaged_file_error(file: Path, cause: Exception | str, other_remedy: str = "") -> DamagedFileError:
    """The error for a damaged file of a run dir; `other_remedy`: an alternative to restoring the file."""
    remedy = f"restore it from a backup{other_remedy}, or move the run dir away and run again"
    return DamagedFileError("RUN_DIR", str(file.parent), f"{file.name} is damaged ({_error_text(cause)}); {remedy}")


def _error_text(error: Exception | str) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


@contextmanager
def create_folder_once(folder: Path) -> Iterator[Path | None]:
    """Create a folder of the cache exactly once, also with several processes.

    One process creates it while the others wait. The remains of a killed process are removed.

    Yields:
        An empty folder to fill, which is renamed to `folder` at the end; None if `folder` exists.
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
    """Make the folder, and raise `ConfigError` if no file can be written in it; `field` is the setting that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 65536)
            probe.flush()
    except OSError as error:
        raise ConfigError(field, str(folder), f"cannot be written: {error.strerror}; choose another folder") from error


def nonfinite_to_none(value: Any) -> Any:
    """Replace NaN and infinity by None, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
