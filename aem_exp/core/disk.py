"""Files that are whole or absent, and folders that can take them."""

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


class Damaged(ConfigError):
    """A file of a run dir is not what was written."""


def cache() -> Path:
    """Where what is made once lies: $AEM_CACHE, else ~/.cache/aem_exp."""
    return Path(os.environ.get("AEM_CACHE") or Path.home() / ".cache" / "aem_exp")


def link(source: str | Path, target: str | Path) -> None:
    """The same file under a second name; a copy where both do not lie on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write(path: Path, content: str | bytes) -> None:
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


def read(file: Path, *keys: str) -> dict[str, Any]:
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
        raise damaged(file, error) from error
    return content


def read_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
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
        raise damaged(file, f"line {len(rows) + 1}: {_why(error)}", ", or remove the line") from error
    return rows


def damaged(file: Path, why: Exception | str, further: str = "") -> Damaged:
    """The error for a file of a run dir that is not what was written; `further`: what else helps than a good copy."""
    remedy = f"put a good copy of it there{further}, or move the run dir away and run again"
    return Damaged("RUN_DIR", str(file.parent), f"{file.name} is damaged ({_why(why)}); {remedy}")


def _why(error: Exception | str) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


@contextmanager
def making(folder: Path) -> Iterator[Path | None]:
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


def known(value: Any) -> Any:
    """A value for JSON, which has no NaN: null, where a number is not known."""
    if isinstance(value, Mapping):
        return {key: known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
