"""The only module that uses private names of Hydra: to check each file that Hydra reads, and to compose groups fast.

With an untested version of Hydra, or one that lacks such a name, `is_supported` is false, and no private name is used.
`check_files` then checks all files beforehand, and `compose.Composer` calls Hydra's public `compose`.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import iglob
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from aem_exp.config import safe_yaml
from aem_exp.core.errors import ConfigError

TESTED_VERSIONS: Final = ("1.3", "1.4")
PRIVATE_NAMES: Final = (
    "config_loader_impl:ConfigLoaderImpl._apply_overrides_to_config",
    "config_loader_impl:ConfigLoaderImpl._compose_config_from_defaults_list",
    "config_loader_impl:ConfigLoaderImpl._parse_overrides_and_create_caching_repo",
    "config_repository:CachingConfigRepository.load_config",
    "core_plugins.file_config_source:FileConfigSource._normalize_file_name",
    "defaults_list:create_defaults_list",
    "sources_registry:SourcesRegistry.instance",
)


def hydra_version() -> str:
    """The installed version of Hydra, as `major.minor`."""
    return ".".join(hydra.__version__.split(".")[:2])


def is_supported() -> bool:
    """Whether the private names can be used."""
    if hydra_version() not in TESTED_VERSIONS:
        return False
    try:
        for name in PRIVATE_NAMES:
            resolve_name(f"hydra._internal.{name}")
    except (ImportError, AttributeError):
        return False
    return True


@contextmanager
def check_files(roots: Sequence[Path]) -> Iterator[None]:
    """Let Hydra read only files that are safe. Sources that are created in this block check files also after it.

    A group is a folder of `conf/`, the last root. Other folders in the user's folder, such as `outputs/`, are not groups.
    Without the private names, all files are checked first, including files that Hydra does not read.
    """
    if not is_supported():
        for root in roots:
            for name in sorted(iglob("**/*.yaml", root_dir=root, recursive=True, include_hidden=True)):
                safe_yaml.read(root / name, "config")
        yield
        return
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.sources_registry import SourcesRegistry

    class CheckedConfigSource(FileConfigSource):
        """A folder of configs whose errors name the file."""

        def is_group(self, config_path: str) -> bool:
            head = config_path.partition("/")[0]
            return (not head or (roots[-1] / head).is_dir()) and super().is_group(config_path)

        def load_config(self, config_path: str) -> ConfigResult:
            file = Path(self.path, self._normalize_file_name(config_path))
            if file.exists():
                safe_yaml.read(file, "config")
            try:
                return super().load_config(config_path)
            except (ValueError, YAMLError) as error:
                raise ConfigError("config", str(file), f"is not valid YAML: {format_error(error)}") from error

    kinds = SourcesRegistry.instance().types
    original, kinds["file"] = kinds["file"], CheckedConfigSource
    try:
        yield
    finally:
        kinds["file"] = original


class GroupComposer:
    """Composes choices of groups, and reads each file once.

    Hydra's own config (launchers, logging) is left out; the order of the other parts is Hydra's.
    """

    def __init__(self, loader: ConfigLoader, search_path: str):
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra._internal.config_repository import CachingConfigRepository

        assert isinstance(loader, ConfigLoaderImpl)

        class CachedFiles(CachingConfigRepository):
            """Hydra's cache of files; it returns copies, because Hydra modifies what it gets."""

            def __deepcopy__(self, memo: Any) -> "CachedFiles":
                return self

            def load_config(self, config_path: str) -> ConfigResult | None:
                copy: ConfigResult | None = pickle.loads(pickle.dumps(super().load_config(config_path)))
                return copy

        self._loader = loader
        self._files = CachedFiles(loader._parse_overrides_and_create_caching_repo("config", [search_path])[1])

    def compose(self, choices: list[Override]) -> DictConfig:
        """Compose a choice of groups, before values are set."""
        from hydra._internal.config_repository import CachingConfigRepository
        from hydra._internal.defaults_list import create_defaults_list

        repository = CachingConfigRepository(self._files)
        parts = create_defaults_list(repository, "config", choices, prepend_hydra=False, skip_missing=False)
        tree: DictConfig = self._loader._compose_config_from_defaults_list(parts.defaults, repository)
        tree.pop("hydra", None)
        OmegaConf.set_struct(tree, True)
        apply_overrides(parts.config_overrides, tree)
        return tree


def apply_overrides(overrides: list[Override], tree: DictConfig) -> None:
    """Set values in a composed tree."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    ConfigLoaderImpl._apply_overrides_to_config(overrides, tree)


def format_error(error: Exception) -> str:
    """An error of Hydra or OmegaConf in one line."""
    return " ".join(str(error).partition("\n    full_key")[0].split())
