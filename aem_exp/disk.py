"""Files that are whole or absent, and folders that can take them."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aem_exp.values import ConfigError


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
