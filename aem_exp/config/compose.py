"""Composes YAML files and overrides to one config tree, with Hydra.

Unknown keys and choices are refused before Hydra sees them, with a suggestion. Besides this module, only
`hydra_internals` imports Hydra.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from aem_exp.config import (
    Experiment,
    Trainer,
    config_roots,
    continuation,
    list_choices,
    read,
    safe_yaml,
    to_dict,
    trainer_keys,
)
from aem_exp.config.hydra_internals import GroupComposer, apply_overrides, check_files, format_error, is_supported
from aem_exp.config.prompts import TEMPLATE_FIELDS
from aem_exp.core.errors import ConfigError, closest_match, unknown_key_error

Choices = Mapping[str, Mapping[str, Path]]
PARENT_PREFIX: Final = "from="
PARENT_CONFIG: Final = "continued"
REPLACEABLE_GROUPS: Final = ("modulation", "launch")  # groups whose file says all of their block
MAX_VALUES: Final = 10_000  # of one override of a sweep
FIELDS: Final = [item.name for item in fields(Experiment)]
LIBRARY_ERRORS: Final = (HydraException, OmegaConfBaseException, YAMLError)  # what the libraries below raise


def compose(overrides: list[str], config_dir: str | Path | None = None, trust: bool = False) -> DictConfig:
    """Merge `conf/`, the user's folder over it, and the overrides; see `config.load`.

    With `from=RUN_DIR` that run's experiment stands in the place of `config.yaml`.
    """
    roots = config_roots(config_dir)
    groups = list_choices(roots)
    parents = [text.removeprefix(PARENT_PREFIX) for text in overrides if text.startswith(PARENT_PREFIX)]
    if trust and not parents:
        raise ConfigError("--trust", True, f"only read with {PARENT_PREFIX}RUN_DIR")
    overrides = [text for text in overrides if not text.startswith(PARENT_PREFIX)]
    base = _parent_config(parents[-1], overrides, trust) if parents else None
    lines = [line for text in overrides for line in _hydra_overrides(text, groups, base is not None)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra 1.4 warns of version_base, which 1.3 warns to be without
            tree = _compose_with_hydra(lines, roots, base)
    except LIBRARY_ERRORS as error:
        raise ConfigError("config", " ".join(overrides) or "config.yaml", format_error(error)) from error
    except RecursionError as error:
        circle = "defaults: of these files lead in a circle; a file must not ask for one that asks for it"
        raise ConfigError("config", " ".join(overrides) or "config.yaml", circle) from error
    _check_templates(tree, overrides)
    return tree


def _check_templates(tree: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a template that was asked for, and that the episodes' history never shows."""
    history = OmegaConf.select(tree, "env.history")
    for text in overrides:
        key, value = override_key(text), text.partition("=")[2]
        head, _, name = key.rpartition(".")
        readers = [other for other, templates in TEMPLATE_FIELDS.items() if name in templates]
        if head == "env.prompt" and readers and history in TEMPLATE_FIELDS and history not in readers:
            raise ConfigError(key, value, f"only read with env.history={readers[0]}")


def _parent_config(parent: str, overrides: list[str], trust: bool) -> dict[str, Any]:
    """What another run was, without the blocks that are chosen anew."""
    folder = Path(parent).expanduser().absolute()
    experiment = read(folder, trust)
    name, steps = continuation.starting_point(parent, experiment)
    tree = to_dict(experiment) | {"parent": name, "parent_dir": str(folder), "parent_steps": steps, "resume": "exact"}
    chosen = {text.lstrip("+").partition("=")[0] for text in overrides}
    return {key: value for key, value in tree.items() if key not in chosen & set(REPLACEABLE_GROUPS)}


def _compose_with_hydra(lines: list[str], roots: list[Path], base: dict[str, Any] | None) -> DictConfig:
    """Hydra's answer, where an earlier folder hides the files of a later one. The first `config.yaml` is the primary."""
    ConfigStore.instance().store(PARENT_CONFIG, OmegaConf.create(base or {}))
    with _initialize_hydra(roots) as search_path:
        return hydra.compose(PARENT_CONFIG if base else "config", [*lines, search_path])


@contextmanager
def _initialize_hydra(roots: list[Path]) -> Iterator[str]:
    """Hydra with our folders; what is yielded is an override that it needs."""
    main = next(i for i, root in enumerate(roots) if (root / "config.yaml").is_file())
    below = ", ".join("'" + f"file://{root}".replace("'", r"\'") + "'" for root in roots[main + 1 :])
    with hydra.initialize_config_dir(str(roots[main]), job_name="aem_exp", version_base="1.3"), check_files(roots):
        places = GlobalHydra.instance().config_loader().get_search_path()
        for root in roots[:main]:
            places.prepend("config-dir", f"file://{root}", anchor="main")
        # The search path is given even where it is empty: it makes Hydra look at its places anew.
        yield f"hydra.searchpath=[{below}]"


# Many at once.


class Composer:
    """`compose` for the cells of a sweep, several times faster: each file is read once, each choice of groups composed once.

    The order of Hydra's parts is Hydra's own, without what it composes for itself (its launchers, its logging). Where that
    fails, `compose` is asked: it says what is wrong, in the words of a single load.
    """

    def __init__(self, config_dir: str | Path | None = None):
        self.config_dir = config_dir
        self.roots = config_roots(config_dir)
        self.groups = list_choices(self.roots)
        self._trees: dict[tuple[str, ...], bytes] = {}  # choice of groups -> its tree, pickled: a copy is quick

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """What `compose` makes of the overrides."""
        if not is_supported() or any(text.startswith(PARENT_PREFIX) for text in overrides):
            return compose(list(overrides), self.config_dir)
        read = [_parse_override(line) for text in overrides for line in _hydra_overrides(text, self.groups, False)]
        chosen = tuple(str(override.input_line) for override in read if override.key_or_group in self.groups)
        try:
            if chosen not in self._trees:
                self._trees[chosen] = pickle.dumps(self._compose_groups(chosen))
            tree: DictConfig = pickle.loads(self._trees[chosen])
            values = [override for override in read if override.key_or_group not in self.groups]
            apply_overrides(values, tree)
        except (*LIBRARY_ERRORS, RecursionError):
            return compose(list(overrides), self.config_dir)
        _check_templates(tree, overrides)
        return tree

    def expand_sweep(self, text: str) -> list[str]:
        """An override of several values, in Hydra's grammar, as one override per value."""
        override = _parse_override(text)
        if not override.is_sweep_override():
            return [text]
        key, given, parsed = override.get_key_element(), text.partition("=")[2], override.value()
        if not override.is_discrete_sweep():
            raise ConfigError(key, given, "cannot be counted; a sweep takes commas, choice(...), range(...), glob(...)")
        if isinstance(parsed, Glob):
            values = parsed.filter(list(self.groups.get(override.key_or_group, ())))
        else:
            values = list(islice(override.sweep_string_iterator(), MAX_VALUES + 1))
        if not values:
            raise ConfigError(key, given, "holds no value")
        if len(values) > MAX_VALUES:
            raise ConfigError(key, given, f"holds more than {MAX_VALUES:,} values")
        return [f"{key}={value}" for value in values]

    def drop_replaced_choices(self, overrides: Sequence[str]) -> list[str]:
        """The overrides without the choices of a group that a later one replaces."""
        last = {override_key(text): i for i, text in enumerate(overrides)}
        return [
            text
            for i, text in enumerate(overrides)
            if override_key(text) not in self.groups or last[override_key(text)] == i
        ]

    def _compose_groups(self, choices: tuple[str, ...]) -> DictConfig:
        """What Hydra makes of a choice of groups, before values are set."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._group_composer.compose([_parse_override(text) for text in choices])

    @cached_property
    def _group_composer(self) -> GroupComposer:
        with _initialize_hydra(self.roots) as search_path:
            return GroupComposer(GlobalHydra.instance().config_loader(), search_path)


def override_key(text: str) -> str:
    """The group or dotted key that an override sets."""
    return str(_parse_override(text).key_or_group)


def override_value(text: str) -> Any:
    """What an override of one value sets its key to."""
    return _parse_override(text).value()


def may_interpolate(cfg: DictConfig, key: str) -> bool:
    """Whether a value may be made of the top-level `key`: by an interpolation that names it, or is more than a dotted key."""
    quoted = re.findall(r"\$\{(.*?)\}", repr(OmegaConf.to_container(cfg)))
    return any(not re.fullmatch(r"[\w.]+", inner) or key in inner for inner in quoted)


def to_container(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Dicts, lists and scalars, with interpolations resolved."""
    tree = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    _check_values(tree)
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        missing = re.search(r"Missing mandatory value: (\S+)", str(error))
        if missing:
            raise ConfigError(missing[1], "???", "must be given a value") from error
        raise ConfigError(str(error.full_key or "config"), "${...}", format_error(error)) from error


def _check_values(tree: DictConfig) -> None:
    """Refuse what would call a function when it is resolved, wherever it came from."""
    parts: list[tuple[str, Any]] = [("", OmegaConf.to_container(tree))]
    for key, value in parts:
        at = f"{key}." if key else ""
        if isinstance(value, dict):
            parts += [(f"{at}{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            parts += [(f"{at}{i}", item) for i, item in enumerate(value)]
        elif isinstance(value, str):
            try:
                safe_yaml.check_value(value)
            except safe_yaml.UnsafeYAMLError as error:
                raise ConfigError(key, value, str(error)) from error


def to_yaml(cfg: DictConfig, resolve: bool = False) -> str:
    return OmegaConf.to_yaml(cfg, resolve=resolve)


def _hydra_overrides(text: str, groups: Choices, continued: bool) -> list[str]:
    """An override as Hydra wants it.

    Ours need no `+` to set a key that no file sets: the types say which keys exist. A block with a `_target_` replaces the
    one that stands there: its keywords belong to another function.
    """
    override = _parse_override(text)
    key, value = override.key_or_group, text.partition("=")[2]
    if override.is_sweep_override():
        raise ConfigError(key, value, "one value per experiment; several are a sweep: -m, or python -m aem_exp.sweep")
    if key in groups and override.is_delete():
        raise ConfigError(key, "~", groups[key])
    if key in groups and override.package is None:
        chosen = override.value()
        for name in chosen if isinstance(chosen, list) else [chosen]:
            if not isinstance(name, str) and str(name) in groups[key]:
                raise ConfigError(key, name, "reads as a number; give the file another name")
            if str(name) not in groups[key]:
                raise ConfigError(key, name, groups[key])
        if continued and key not in REPLACEABLE_GROUPS:
            remedy = f"with from=, {' and '.join(REPLACEABLE_GROUPS)} can be chosen anew; of the rest, single keys"
            raise ConfigError(key, value, remedy)
        return [("" if key in FIELDS and not continued else "+") + text.lstrip("+")]
    if key in ("parent", "parent_dir", "parent_steps"):
        raise ConfigError(key, value, "is set by from=RUN_DIR")
    if key.partition(".")[0] not in FIELDS:
        raise _unknown_key_error(key, value, groups)
    if override.is_delete():
        return [text]
    block = override.value()
    cleared = [f"++{key}=null"] if isinstance(block, dict) and "_target_" in block else []
    return [*cleared, "++" + text.lstrip("+")]


@cache
def _parse_override(text: str) -> Override:
    try:
        safe_yaml.check_nesting(text)
        safe_yaml.check_value(text)
        return OverridesParser.create().parse_override(text)
    except safe_yaml.UnsafeYAMLError as error:
        raise ConfigError("override", text, str(error)) from error
    except (HydraException, ValueError) as error:  # a number of more digits than Python reads is a ValueError
        raise ConfigError("override", text, f"must read key=value ({format_error(error)})") from error


def _unknown_key_error(key: str, value: str, groups: Choices) -> ConfigError:
    """A key that is neither field nor group: the end of one perhaps, or a typo."""
    blocks = {
        item.name: item.type for item in fields(Experiment) if is_dataclass(item.type) and item.type is not Trainer
    }
    known = [f"{name}.{leaf.name}" for name, block in blocks.items() for leaf in fields(block)]
    known += [f"trainer.{name}" for name in trainer_keys.OWN_KEYS | trainer_keys.GRPO_KEYS]
    known += [f"launch.trainer.{name}" for name in trainer_keys.LAUNCH_KEYS]
    leaves = {full.rpartition(".")[2]: full for full in reversed(known)}
    heads = list(dict.fromkeys([*FIELDS, *groups]))
    near = leaves.get(key) or trainer_keys.REPLACEMENTS.get(key) or closest_match(key, known if "." in key else heads)
    near = near or closest_match(key.partition(".")[0], heads) or leaves.get(closest_match(key, leaves) or "")
    if near:
        return ConfigError(key, value, f"no such key or group; did you mean {near}?")
    return unknown_key_error(key, value, heads)
