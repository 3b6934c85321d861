"""Finds the folders of YAML files and the choices in them."""

import os
from pathlib import Path

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError


def conf_root() -> Path:
    """The folder of our configs: $AEM_ROOT/conf, else the one in the wheel, else the one in the checkout."""
    bundled = disk.PACKAGE / "_bundled" / "conf"
    if root := os.environ.get("AEM_ROOT"):
        return Path(root).expanduser().absolute() / "conf"
    return bundled if bundled.is_dir() else disk.PACKAGE.parent / "conf"


def config_roots(config_dir: str | Path | None = None) -> list[Path]:
    """The folders of configs; the first one that has a file wins."""
    roots = [conf_root()]
    if not (roots[0] / "config.yaml").is_file():
        raise ConfigError("AEM_ROOT", os.environ.get("AEM_ROOT"), f"{roots[0] / 'config.yaml'} does not exist")
    if config_dir is not None:
        user = Path(config_dir).expanduser().absolute()
        if not user.is_dir():
            raise ConfigError("--config-dir", config_dir, "there is no such folder")
        roots.insert(0, user)
    return roots


def list_choices(roots: list[Path]) -> dict[str, dict[str, Path]]:
    """Group -> choice -> file, over all folders. Only groups of `conf/` count: a user's folder may have other subfolders."""
    groups = sorted(folder.name for folder in roots[-1].iterdir() if folder.is_dir())
    out: dict[str, dict[str, Path]] = {group: {} for group in groups}
    for root in reversed(roots):
        for group in groups:
            for file in sorted((root / group).glob("**/*.yaml")):
                out[group][str(file.relative_to(root / group).with_suffix(""))] = file
    # A folder with the name of a choice has parts of this choice, which are not choices: see conf/baseline/gigpo.yaml.
    return {
        group: {name: file for name, file in files.items() if name.rpartition("/")[0] not in files}
        for group, files in out.items()
    }
