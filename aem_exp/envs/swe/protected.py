"""Files that decide how tests run. An audited grade leaves them as they are in the base commit.

An agent is asked to change the source of a package. A change to a test, to pytest's configuration, or to a file that Python or
git reads at its start can make any test appear to pass. The gold patch of a row widens the rule: files that it changes, an agent
may change too, such as `setup.cfg`.
"""

import re
import sys
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Final

CONFIGURATION: Final = {
    *("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg", "setup.py"),
    *("pyproject.toml", ".coveragerc", ".gitattributes", ".gitmodules", "noxfile.py", "Makefile", "runtests.py"),
}
START_OF_PYTHON: Final = {"sitecustomize.py", "usercustomize.py", "pyvenv.cfg"}
START_SUFFIXES: Final = {".pth", ".egg-link", ".pyc", ".pyo"}
METADATA: Final = re.compile(r".+\.(dist|egg)-info", re.IGNORECASE)
TEST_FOLDERS: Final = {"test", "tests", "testing", "r2e_tests"}
TEST_MODULE: Final = re.compile(r"test_.+\.py|.+_test\.py|tests?\.py")
# Folders that are often on Python's path, where a module hides an installed one of the same name.
IMPORT_ROOTS: Final = ("src", "lib")
RUNNER_MODULES: Final = {
    *("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli", "attr"),
    *("attrs", "xdist", "execnet", "hypothesis", "coverage", "pkg_resources", "setuptools", "_distutils_hack"),
}


def protected_paths(paths: Collection[str], allowed: Collection[str] = ()) -> list[str]:
    """The paths that an audited grade leaves unchanged.

    Args:
        paths: relative paths that an agent changed.
        allowed: paths that the gold patch changes.
    """
    return sorted(path for path in paths if path not in allowed and is_protected(path))


def is_protected(path: str) -> bool:
    """Whether a file can decide how tests run, by its path."""
    *folders, name = PurePosixPath(path).parts
    return (
        name in CONFIGURATION
        or name in START_OF_PYTHON
        or PurePosixPath(name).suffix in START_SUFFIXES
        or any(part == ".git" or METADATA.fullmatch(part) for part in (*folders, name))
        or is_test(path)
        or _hides_installed_module(folders, name)
    )


def is_test(path: str) -> bool:
    """Whether a file is a test module or lies in a folder of tests."""
    *folders, name = PurePosixPath(path).parts
    return bool(TEST_FOLDERS.intersection(folders)) or TEST_MODULE.fullmatch(name) is not None


def patched_paths(patch: str) -> set[str]:
    """The paths that a patch in git's format changes."""
    return {path for pair in re.findall(r"^diff --git a/(.+) b/(.+)$", patch, re.MULTILINE) for path in pair}


def _hides_installed_module(folders: list[str], name: str) -> bool:
    """Whether a file is, or is part of, a top-level module with the name of a module of Python or of pytest."""
    inside = folders[1:] if folders and folders[0] in IMPORT_ROOTS else folders
    top = inside[0] if inside else name.partition(".")[0]
    is_code = PurePosixPath(name).suffix in (".py", ".so", ".pyd")
    return is_code and (top in RUNNER_MODULES or top in sys.stdlib_module_names)
