"""Checks the owner of a run dir before code from it may run.

A run dir names functions (`experiment.json`) and contains modules (`code/`). Both must belong to the user, or the user
must trust them with `--trust`.
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
    """Refuse a run dir that another user could have written, unless it is trusted.

    Symbolic links are checked themselves and not followed: a link of another user may point to a file of the user's own.

    Raises:
        ConfigError: a part belongs to another user or is a symbolic link. Also, even if trusted: a module in `code/` has the
            name of a module of the standard library that this system lacks.
    """
    folder = Path(run_dir).expanduser().absolute()
    if not trusted:
        _check_owner(folder)
    for file in (folder / "code").glob("*"):
        if _shadows_standard_library(file.name.partition(".")[0]):
            remedy = f"code/{file.name} would be imported as a module of Python's standard library; remove it"
            raise ConfigError("RUN_DIR", str(folder), remedy)


@cache
def standard_library_paths() -> list[str]:
    """The entries of `sys.path` for the standard library: its archive, its folder, and its compiled modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    archive = folder.with_name(f"python{sys.version_info.major}{sys.version_info.minor}.zip")
    compiled = sysconfig.get_config_var("DESTSHARED") or folder / "lib-dynload"
    return [str(path) for path in (archive, folder, folder / "lib-dynload", compiled)]


def _shadows_standard_library(name: str) -> bool:
    """Whether a module would be imported as a standard module that this system lacks, such as `msvcrt`.

    Standard modules that the system has cannot be shadowed, because the standard library comes first.
    """
    missing = name in sys.stdlib_module_names and name not in sys.builtin_module_names
    return missing and PathFinder.find_spec(name, standard_library_paths()) is None


def _check_owner(folder: Path) -> None:
    for path in _code_paths(folder):
        try:
            link, owner = path.is_symlink(), path.lstat().st_uid
        except OSError:  # absent or not accessible: no code can be read from it either
            continue
        name = str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else "it"
        if owner != os.getuid():
            remedy = f"{name} belongs to another user and could run any code; review experiment.json and code/"
            raise ConfigError("RUN_DIR", str(folder), f"{remedy}, then add --trust")
        if link and name != "it":
            remedy = f"{name} is a symbolic link, which a run never writes; replace it by the file"
            raise ConfigError("RUN_DIR", str(folder), f"{remedy}, or review it, then add --trust")


def _code_paths(folder: Path) -> Iterator[Path]:
    """All paths that decide which code runs: the folder (and its target, if it is a link), the experiment, and the code."""
    yield from (folder, folder.resolve(), folder / "experiment.json", folder / "code")
    for parent, folders, files in os.walk(folder / "code"):
        yield from (Path(parent) / name for name in (*folders, *files))
