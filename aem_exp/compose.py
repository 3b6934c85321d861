"""The only room that speaks Hydra: YAML files and overrides become one tree, not yet understood.

Hydra's grammar and its groups are kept. Its strictness is not needed: which keys and choices exist is asked before
Hydra is, so that a typo is one sentence with a suggestion (and `+experimnt=x` is not a new key that nobody reads).
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from aem_exp import keywords
from aem_exp.config import Experiment, choices, config_roots
from aem_exp.values import ConfigError, closest, unknown

Choices = Mapping[str, Mapping[str, Path]]
FIELDS: Final = [item.name for item in fields(Experiment)]


def compose(overrides: list[str], config_dir: str | Path | None = None) -> DictConfig:
    """Merge `conf/`, the user's folder over it, and the overrides; see `config.load`."""
    first, *rest = roots = config_roots(config_dir)
    lines = [_line(text, choices(roots)) for text in overrides]
    if rest:
        places = ", ".join("'" + f"file://{root}".replace("'", r"\'") + "'" for root in rest)
        lines.append(f"hydra.searchpath=[{places}]")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra 1.4 warns of version_base, which 1.3 warns to be without
            with hydra.initialize_config_dir(str(first), job_name="aem_exp", version_base="1.3"):
                return hydra.compose("config", lines)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError("config", " ".join(overrides) or "config.yaml", _sentence(error)) from error


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Dicts, lists and scalars, with interpolations resolved."""
    try:
        tree = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or "config"), "???", _sentence(error)) from error


def to_yaml(cfg: DictConfig, resolve: bool = False) -> str:
    return OmegaConf.to_yaml(cfg, resolve=resolve)


def _line(text: str, groups: Choices) -> str:
    """An override as Hydra wants it.

    Ours need no `+` to set a key that no file sets: the types say which keys exist.
    """
    override = _parsed(text)
    key, value = override.key_or_group, text.partition("=")[2]
    if override.is_sweep_override():
        raise ConfigError(key, value, "one value per experiment; several are a sweep, and come with aem_exp.sweep")
    if key in groups and override.package is None and not override.is_delete():
        chosen = override.value()
        for name in chosen if isinstance(chosen, list) else [chosen]:
            if str(name) not in groups[key]:
                raise ConfigError(key, name, groups[key])
        return ("" if key in FIELDS else "+") + text.lstrip("+")
    if key.partition(".")[0] not in FIELDS:
        raise _stranger(key, value, groups)
    return text if override.is_delete() else "++" + text.lstrip("+")


def _parsed(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError("override", text, f"must read key=value ({_sentence(error)})") from error


def _stranger(key: str, value: str, groups: Choices) -> ConfigError:
    """A key that is neither field nor group: the end of one perhaps, or a typo."""
    known = [
        f"{item.name}.{leaf.name}"
        for item in fields(Experiment)
        if is_dataclass(item.type)
        for leaf in fields(item.type)
    ]
    known += [f"trainer.{name}" for name in keywords.OURS | keywords.SCIENCE]
    known += [f"launch.trainer.{name}" for name in keywords.EXECUTION]
    leaves = {full.rpartition(".")[2]: full for full in reversed(known)}
    heads = list(dict.fromkeys([*FIELDS, *groups]))
    near = leaves.get(key) or keywords.INSTEAD.get(key) or closest(key, known if "." in key else heads)
    near = near or closest(key.partition(".")[0], heads) or leaves.get(closest(key, leaves) or "")
    return (
        ConfigError(key, value, f"no such key or group; did you mean {near}?") if near else unknown(key, value, heads)
    )


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
