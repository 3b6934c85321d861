"""Finds and reads the YAML file of a sweep, and checks its keys and their types."""

import shlex
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from aem_exp import config
from aem_exp.config import rules, safe_yaml
from aem_exp.core import cli
from aem_exp.core.errors import ConfigError, unknown_key_error

KEYS: Final = ("question", "base", "arms", "pairs", "contrasts", "products", "search", "seeds", "launch", "config_dir")
KINDS: Final[Mapping[str, tuple[type, str]]] = {  # key -> its type, and a description of it
    "question": (str, "a sentence"),
    "products": (list, "a list with one product per item"),
    "pairs": (list, "a list with two arms per item, such as [aem none, aem shuffled]"),
    "arms": (dict, "a mapping from name to overrides"),
    "contrasts": (dict, "a mapping from name to weights, such as {aem: 1, none: -1}"),
    "search": (dict, "a mapping with the keys space and trials"),
    "config_dir": (str, "a folder, relative to this file"),
}


def list_sweeps() -> dict[str, str]:
    """The sweeps of the package: name -> question."""
    return {file.stem: read_sweep_file(file)["question"].strip() for file in sorted(_sweeps_folder().glob("*.yaml"))}


def _sweeps_folder() -> Path:
    """The folder of the package's sweeps, next to `conf/`."""
    return config.conf_root().parent / "sweeps"


def find_file(file_or_name: str | Path) -> Path | None:
    """The file of a sweep, from a path or a name in `sweeps/`; None if there is none."""
    name = Path(file_or_name).expanduser()
    places = [name, _sweeps_folder() / f"{name}.yaml", _sweeps_folder().parent / name]
    found = next((place for place in places if place.is_file()), None)
    return found.absolute() if found else None


def config_folder(file: Path, data: Mapping[str, Any]) -> Path | None:
    """The `config_dir:` of a sweep file, which is relative to the file. Configurations can name modules in this folder."""
    if "config_dir" not in data:
        return None
    folder = file.parent / Path(data["config_dir"]).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{file.stem}.config_dir", data["config_dir"], f"folder {folder} does not exist")
    cli.add_user_modules(folder)
    return folder


def require_file(file_or_name: str | Path) -> Path:
    """The file of a sweep, from a path or a name in `sweeps/`.

    Raises:
        ConfigError: there is no such file.
    """
    if file := find_file(file_or_name):
        return file
    names = [path.stem for path in sorted(_sweeps_folder().glob("*.yaml"))]
    raise ConfigError("sweep", file_or_name, names, "or give the path of a sweep file")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        count = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, times in count.items() if times > 1), None):
            raise ConfigError(
                f"{Path(self.name).stem}.{twice}", None, "is defined twice in one block; remove one of them"
            )
        return super().construct_mapping(node, deep)


def read_sweep_file(file: Path) -> dict[str, Any]:
    """Read a sweep file.

    Raises:
        ConfigError: it is not valid YAML, or a key is unknown, empty or of the wrong type.
    """
    data = _load_yaml(file)
    _check_keys(file.stem, data)
    return data


def _load_yaml(file: Path) -> dict[str, Any]:
    loader = _UniqueKeyLoader(safe_yaml.read(file, "sweep"))
    loader.name = str(file)
    try:
        data = loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # an integer with too many digits is a ValueError
        raise ConfigError("sweep", str(file), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError("sweep", str(file), f"must be a mapping with keys of {', '.join(KEYS)}")
    return data


def _check_keys(name: str, data: dict[str, Any]) -> None:
    """Check names, emptiness and types of the keys. A study without arms gets one arm, the base."""
    for key, value in data.items():
        if key not in KEYS:
            raise unknown_key_error(f"{name}.{key}", value, KEYS)
    if "search" in data:
        data.setdefault("arms", {"base": None})
    for key in (
        "question",
        "arms",
        "seeds",
        *(key for key in ("pairs", "contrasts", "products", "search") if key in data),
    ):
        if data.get(key) in (None, "", [], {}):
            raise ConfigError(f"{name}.{key}", data.get(key), "must not be empty")
    for key, (kind, words) in KINDS.items():
        if key in data and not isinstance(data[key], kind):
            raise ConfigError(f"{name}.{key}", data[key], f"must be {words}")
    for arm in data["arms"]:
        if not isinstance(arm, str) or not rules.NAME_PATTERN.fullmatch(arm):
            raise ConfigError(f"{name}.arms", arm, "must be a name of letters, digits and . _ + = -")


def parse_overrides(at: str, value: Any) -> list[str]:
    """Parse overrides: a line as on the command line, or a list of overrides."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        for word in value:
            if "=" not in word and not word.startswith("~"):
                remedy = "must be key=value; inside [] a comma ends an item, so write the line without brackets"
                raise ConfigError(at, word, remedy)
        return value
    if value is None or isinstance(value, str):
        try:
            return shlex.split(value or "")
        except ValueError as error:
            raise ConfigError(at, value, f"cannot be parsed as a command line: {error}") from error
    raise ConfigError(at, value, "must be overrides as on the command line, such as baseline=grpo trainer.steps=40")


def parse_seeds(name: str, value: Any) -> str:
    """Seeds as the value of an override: `0,1,2` or `range(0,3)`."""
    seeds = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if not seeds.strip():
        raise ConfigError(f"{name}.seeds", value, "must not be empty")
    return seeds
