"""Composes YAML files and overrides to one config tree, with Hydra.

Unknown keys and choices are refused with a suggestion before Hydra sees them. Only this module, `hydra_internals` and
`--hydra-help` import Hydra.
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
    model_path,
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
REPLACEABLE_GROUPS: Final = ("modulation", "launch")  # groups whose file sets its whole block
MAX_VALUES: Final = 10_000  # of one override in a sweep
FIELDS: Final = [item.name for item in fields(Experiment)]
LIBRARY_ERRORS: Final = (HydraException, OmegaConfBaseException, YAMLError)  # errors of Hydra, OmegaConf and PyYAML


def compose(overrides: list[str], config_dir: str | Path | None = None, trust: bool = False) -> DictConfig:
    """Merge `conf/`, the user's config folder, and the overrides; see `config.load`.

    With `from=RUN_DIR`, the experiment of that run replaces `config.yaml`.
    """
    roots = config_roots(config_dir)
    groups = list_choices(roots)
    parents = [text.removeprefix(PARENT_PREFIX) for text in overrides if text.startswith(PARENT_PREFIX)]
    if trust and not parents:
        raise ConfigError("--trust", True, f"has no effect without {PARENT_PREFIX}RUN_DIR")
    overrides = [text for text in overrides if not text.startswith(PARENT_PREFIX)]
    base = _parent_config(parents[-1], overrides, trust) if parents else None
    lines = [line for text in overrides for line in _hydra_overrides(text, groups, base is not None)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra 1.4 warns if version_base is given, 1.3 if it is not
            tree = _compose_with_hydra(lines, roots, base)
    except LIBRARY_ERRORS as error:
        raise ConfigError("config", " ".join(overrides) or "config.yaml", format_error(error)) from error
    except RecursionError as error:
        remedy = "the defaults: lists of these files are circular; a file must not include a file that includes it"
        raise ConfigError("config", " ".join(overrides) or "config.yaml", remedy) from error
    _name_model(tree)
    _check_templates(tree, overrides)
    return tree


def _name_model(tree: DictConfig) -> None:
    """Name a model without a name after its path, as for `model=local`."""
    path = OmegaConf.select(tree, "model.path")
    if not OmegaConf.select(tree, "model.name") and isinstance(path, str):
        OmegaConf.update(tree, "model.name", model_path.model_name(path), force_add=True)


def _check_templates(tree: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse an override of a prompt template that has no effect with this `env.history`."""
    history = OmegaConf.select(tree, "env.history")
    for text in overrides:
        key, value = override_key(text), text.partition("=")[2]
        head, _, name = key.rpartition(".")
        readers = [other for other, templates in TEMPLATE_FIELDS.items() if name in templates]
        if head == "env.prompt" and readers and history in TEMPLATE_FIELDS and history not in readers:
            raise ConfigError(key, value, f"has no effect without env.history={readers[0]}")


def _parent_config(parent: str, overrides: list[str], trust: bool) -> dict[str, Any]:
    """The experiment of the parent run, without the blocks that the overrides replace."""
    folder = Path(parent).expanduser().absolute()
    experiment = read(folder, trust)
    name, steps = continuation.starting_point(parent, experiment)
    tree = to_dict(experiment) | {"parent": name, "parent_dir": str(folder), "parent_steps": steps, "resume": "exact"}
    chosen = {text.lstrip("+").partition("=")[0] for text in overrides}
    return {key: value for key, value in tree.items() if key not in chosen & set(REPLACEABLE_GROUPS)}


def _compose_with_hydra(lines: list[str], roots: list[Path], base: dict[str, Any] | None) -> DictConfig:
    """Compose with Hydra. An earlier folder hides files of a later one; the first `config.yaml` is the primary config."""
    ConfigStore.instance().store(PARENT_CONFIG, OmegaConf.create(base or {}))
    with _initialize_hydra(roots) as search_path:
        return hydra.compose(PARENT_CONFIG if base else "config", [*lines, search_path])


@contextmanager
def _initialize_hydra(roots: list[Path]) -> Iterator[str]:
    """Initialise Hydra with our folders.

    Yields:
        The override that sets Hydra's search path.
    """
    main = next(i for i, root in enumerate(roots) if (root / "config.yaml").is_file())
    below = ", ".join("'" + f"file://{root}".replace("'", r"\'") + "'" for root in roots[main + 1 :])
    with hydra.initialize_config_dir(str(roots[main]), job_name="aem_exp", version_base="1.3"), check_files(roots):
        search_path = GlobalHydra.instance().config_loader().get_search_path()
        for root in roots[:main]:
            search_path.prepend("config-dir", f"file://{root}", anchor="main")
        # This override is needed even if the list is empty: it makes Hydra read the search path again.
        yield f"hydra.searchpath=[{below}]"


# Many configs.


class Composer:
    """`compose` for the cells of a sweep. It reads each file once and composes each choice of groups once.

    This is several times faster. Hydra's own config (launchers, logging) is left out; the order of the other parts is Hydra's.
    If composing fails, `compose` is called, so that the error is the same as for a single experiment.
    """

    def __init__(self, config_dir: str | Path | None = None):
        self.config_dir = config_dir
        self.roots = config_roots(config_dir)
        self.groups = list_choices(self.roots)
        self._trees: dict[tuple[str, ...], bytes] = {}  # choice of groups -> its pickled tree, which is fast to copy

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The same result as `compose` for these overrides."""
        if not is_supported() or any(text.startswith(PARENT_PREFIX) for text in overrides):
            return compose(list(overrides), self.config_dir)
        parsed = [_parse_override(line) for text in overrides for line in _hydra_overrides(text, self.groups, False)]
        chosen = tuple(str(override.input_line) for override in parsed if override.key_or_group in self.groups)
        try:
            if chosen not in self._trees:
                self._trees[chosen] = pickle.dumps(self._compose_groups(chosen))
            tree: DictConfig = pickle.loads(self._trees[chosen])
            values = [override for override in parsed if override.key_or_group not in self.groups]
            apply_overrides(values, tree)
        except (*LIBRARY_ERRORS, RecursionError):
            return compose(list(overrides), self.config_dir)
        _name_model(tree)
        _check_templates(tree, overrides)
        return tree

    def expand_sweep(self, text: str) -> list[str]:
        """Expand an override with several values (Hydra's grammar) to one override per value."""
        override = _parse_override(text)
        if not override.is_sweep_override():
            return [text]
        key, given, parsed = override.get_key_element(), text.partition("=")[2], override.value()
        if not override.is_discrete_sweep():
            raise ConfigError(
                key, given, "has no countable values; a sweep takes commas, choice(...), range(...) or glob(...)"
            )
        if isinstance(parsed, Glob):
            values = parsed.filter(list(self.groups.get(override.key_or_group, ())))
        else:
            values = list(islice(override.sweep_string_iterator(), MAX_VALUES + 1))
        if not values:
            raise ConfigError(key, given, "has no value")
        if len(values) > MAX_VALUES:
            raise ConfigError(key, given, f"has more than {MAX_VALUES:,} values")
        return [f"{key}={value}" for value in values]

    def drop_replaced_choices(self, overrides: Sequence[str]) -> list[str]:
        """Drop each choice of a group that a later override replaces."""
        last = {override_key(text): i for i, text in enumerate(overrides)}
        return [
            text
            for i, text in enumerate(overrides)
            if override_key(text) not in self.groups or last[override_key(text)] == i
        ]

    def _compose_groups(self, choices: tuple[str, ...]) -> DictConfig:
        """Compose a choice of groups with Hydra, before values are set."""
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
    """The value that an override sets."""
    return _parse_override(text).value()


def may_interpolate(cfg: DictConfig, key: str) -> bool:
    """Whether an interpolation may use the top-level `key`: one that names it, or one that is more than a dotted key."""
    quoted = re.findall(r"\$\{(.*?)\}", repr(OmegaConf.to_container(cfg)))
    return any(not re.fullmatch(r"[\w.]+", inner) or key in inner for inner in quoted)


def to_container(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config to dicts, lists and scalars, with interpolations resolved."""
    tree = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    _check_values(tree)
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        missing = re.search(r"Missing mandatory value: (\S+)", str(error))
        if missing:
            raise ConfigError(missing[1], "???", "needs a value") from error
        raise ConfigError(str(error.full_key or "config"), "${...}", format_error(error)) from error


def _check_values(tree: DictConfig) -> None:
    """Refuse values that would call a function when they are resolved, from any source."""
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
    """A config as YAML; `resolve` fills in the interpolations."""
    return OmegaConf.to_yaml(cfg, resolve=resolve)


def _hydra_overrides(text: str, groups: Choices, continued: bool) -> list[str]:
    """Convert an override to Hydra's form.

    Our overrides need no `+` for a key that no file sets, because the types define which keys exist. A block with a
    `_target_` replaces the whole block, because the old keywords belong to another function.
    """
    override = _parse_override(text)
    key, value = override.key_or_group, text.partition("=")[2]
    if override.is_sweep_override():
        raise ConfigError(
            key, value, "an experiment takes one value; for several, add -m or use python -m aem_exp.sweep"
        )
    if key in groups and override.is_delete():
        raise ConfigError(key, "~", groups[key])
    if key in groups and override.package is None:
        chosen = override.value()
        for name in chosen if isinstance(chosen, list) else [chosen]:
            if not isinstance(name, str) and str(name) in groups[key]:
                raise ConfigError(key, name, "is read as a number; rename the file")
            if str(name) not in groups[key]:
                raise ConfigError(key, name, groups[key])
        if continued and key not in REPLACEABLE_GROUPS:
            remedy = (
                f"with from=, only {' and '.join(REPLACEABLE_GROUPS)} can be replaced; set single keys of the others"
            )
            raise ConfigError(key, value, remedy)
        return [("" if key in FIELDS and not continued else "+") + text.lstrip("+")]
    if key in ("parent", "parent_dir", "parent_steps"):
        raise ConfigError(key, value, "is set by from=RUN_DIR")
    if key.partition(".")[0] not in FIELDS:
        raise _unknown_key_error(key, value, groups)
    if override.is_delete():
        return [text]
    block = override.value()
    clear = [f"++{key}=null"] if isinstance(block, dict) and "_target_" in block else []
    return [*clear, "++" + text.lstrip("+")]


@cache
def _parse_override(text: str) -> Override:
    try:
        safe_yaml.check_nesting(text)
        safe_yaml.check_value(text)
        return OverridesParser.create().parse_override(text)
    except safe_yaml.UnsafeYAMLError as error:
        raise ConfigError("override", text, str(error)) from error
    except (HydraException, ValueError) as error:  # a number with too many digits is a ValueError
        raise ConfigError("override", text, f"must have the form key=value ({format_error(error)})") from error


def _unknown_key_error(key: str, value: str, groups: Choices) -> ConfigError:
    """The error for a key that is neither a field nor a group, such as the last part of a dotted key, or a typo."""
    blocks = {
        item.name: item.type for item in fields(Experiment) if is_dataclass(item.type) and item.type is not Trainer
    }
    known = [f"{name}.{leaf.name}" for name, block in blocks.items() if name != "warm_start" for leaf in fields(block)]
    known += [f"trainer.{name}" for name in trainer_keys.OWN_KEYS | trainer_keys.GRPO_KEYS]
    known += [f"launch.trainer.{name}" for name in trainer_keys.LAUNCH_KEYS]
    known += [f"warm_start.{leaf.name}" for leaf in fields(blocks["warm_start"])]  # trainer.learning_rate comes first
    leaves = {full.rpartition(".")[2]: full for full in reversed(known)}
    heads = list(dict.fromkeys([*FIELDS, *groups]))
    near = leaves.get(key) or trainer_keys.REPLACEMENTS.get(key) or closest_match(key, known if "." in key else heads)
    near = near or closest_match(key.partition(".")[0], heads) or leaves.get(closest_match(key, leaves) or "")
    if near:
        return ConfigError(key, value, f"no such key or group; did you mean {near}?")
    return unknown_key_error(key, value, heads)
