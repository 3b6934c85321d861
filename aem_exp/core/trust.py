"""Checks the owner of a run dir before any of its code may run.

A run dir names functions (`experiment.json`) and carries modules (`code/`), so both must belong to the user, or be trusted
with `--trust`.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from aem_exp.core.errors import ConfigError


def check_run_dir(run_dir: str | Path, trusted: bool = False) -> None:
    """Refuse a run dir that somebody else could have written, unless it is trusted.

    Every file is looked at itself, not what it leads to: a symbolic link in somebody else's folder may lead to a file of
    the user's own.

    Raises:
        ConfigError: something in it belongs to somebody else, or is a symbolic link; or, trusted or not, a module in its code
            would be taken for one of the standard library.
    """
    folder = Path(run_dir).expanduser().absolute()
    if not trusted:
        _check_owner(folder)
    for file in (folder / "code").glob("*"):
        if _shadows_standard_library(file.name.partition(".")[0]):
            why = f"code/{file.name} would be taken for a module of Python's standard library; remove it"
            raise ConfigError("RUN_DIR", str(folder), why)


@cache
def standard_library_paths() -> list[str]:
    """The places of `sys.path` that are the standard library's: its archive, its folder, its compiled modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    archive = folder.with_name(f"python{sys.version_info.major}{sys.version_info.minor}.zip")
    compiled = sysconfig.get_config_var("DESTSHARED") or folder / "lib-dynload"
    return [str(place) for place in (archive, folder, folder / "lib-dynload", compiled)]


def _shadows_standard_library(name: str) -> bool:
    """Whether a module would be imported for one of the standard library that this system lacks, such as `msvcrt`. For one that
    is there it never is, as the standard library comes first."""
    missing = name in sys.stdlib_module_names and name not in sys.builtin_module_names
    return missing and PathFinder.find_spec(name, standard_library_paths()) is None


def _check_owner(folder: Path) -> None:
    for path in _code_paths(folder):
        try:
            link, owner = path.is_symlink(), path.lstat().st_uid
        except OSError:  # not there, or out of reach: nothing can be read from it either
            continue
        name = str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else "it"
        if owner != os.getuid():
            why = f"{name} belongs to somebody else, and could run any code; read experiment.json and code/"
            raise ConfigError("RUN_DIR", str(folder), f"{why}, then add --trust")
        if link and name != "it":
            why = f"{name} is a symbolic link, which a run never writes; put the file itself there"
            raise ConfigError("RUN_DIR", str(folder), f"{why}, or read it, then add --trust")


def _code_paths(folder: Path) -> Iterator[Path]:
    """What decides which code runs: the folder (a link to it, and where that leads), its experiment, and its code."""
    yield from (folder, folder.resolve(), folder / "experiment.json", folder / "code")
    for place, folders, files in os.walk(folder / "code"):
        yield from (Path(place) / name for name in (*folders, *files))
