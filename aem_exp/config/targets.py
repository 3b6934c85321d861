"""`_target_`: bound to its signature without importing it, then called.

A config may name a function or class of this package or of the user's own modules, wherever these are imported from. It may
not name one of the standard library, or of the libraries that this package needs for itself: among these are functions that
run whatever they are given. What a target takes is read from its source, so that a misspelt keyword is refused before torch, or
a world, is loaded.
"""

import functools
import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from aem_exp.config.call_signatures import (
    CallSignature,
    find_definition,
    find_module,
    list_public_names,
    list_sibling_modules,
    parse_module,
    read_definition,
)
from aem_exp.config.library_keywords import LORA_CONFIG, lora_signature
from aem_exp.config.schema import Experiment
from aem_exp.core.errors import ConfigError, closest_match, unknown_key_error
from aem_exp.core.typed import convert

_PACKAGE: Final = "aem_exp"
_ALLOWED_LIBRARIES: Final = (
    "peft",
)  # libraries that a config may name: the keywords of model.lora are those of peft.LoraConfig
_INSTALLERS: Final = ("pip", "setuptools", "wheel")  # in every environment, and nobody's own


def bind_target(at: str, block: Mapping[str, Any], positional: int = 0, supplied: Sequence[str] = ()) -> dict[str, Any]:
    """The block with its keywords checked against what the target takes.

    Args:
        at: the block's dotted key.
        positional: how many arguments the caller passes by position.
        supplied: arguments that the caller passes by name.

    Raises:
        ConfigError: no such target, or keywords that it does not take.
    """
    path = _target_path(at, block)
    given = {key: value for key, value in block.items() if key != "_target_"}
    signature = _read_signature(at, path)
    if len(signature.positional) < positional and not signature.accepts_any:
        raise ConfigError(
            f"{at}._target_", path, f"must take {positional} argument{'s' * (positional > 1)} by position"
        )
    taken = {*signature.positional[:positional], *supplied}
    keywords = [name for name in signature.hints if name not in taken]
    for key, value in given.items():
        if key in taken or (key not in keywords and not signature.accepts_any):
            raise unknown_key_error(f"{at}.{key}", value, keywords)
    missing = next((key for key in keywords if key in signature.required and key not in given), None)
    if missing:
        raise ConfigError(f"{at}.{missing}", None, f"required by {path}")
    return {"_target_": path} | {key: _convert_argument(at, key, value, signature) for key, value in given.items()}


def instantiate(block: Mapping[str, Any], partial: bool = False) -> Any:
    """Import the target and call it with the block's keywords; `partial` leaves the call to whoever has the rest."""
    path = str(block["_target_"])
    _check_allowed("_target_", path)
    module, _, name = path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    if not callable(target):
        remedy = f"is a {type(target).__name__}, and must be a class or a function"
        raise ConfigError("_target_", block["_target_"], remedy)
    keywords = {key: _instantiate_nested(value) for key, value in block.items() if key != "_target_"}
    return functools.partial(target, **keywords) if partial else target(**keywords)


def _instantiate_nested(value: Any) -> Any:
    return instantiate(value) if isinstance(value, Mapping) and "_target_" in value else value


def module_location(module: str) -> Path | None:
    """The file of a module, or the folder of a package, without importing it."""
    spec = find_module(module)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def _target_path(at: str, block: Mapping[str, Any]) -> str:
    path = block.get("_target_")
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise ConfigError(f"{at}._target_", path, "must be the dotted name of a function or class, package.module.name")
    _check_allowed(f"{at}._target_", path)
    return path


# Whose function may be called.


def _check_allowed(field: str, path: str) -> None:
    """Refuse a target by its name alone, before anything is imported.

    A package that the user has installed is the user's own, unless this package needs it.
    """
    head = path.partition(".")[0]
    if head in (_PACKAGE, *_ALLOWED_LIBRARIES):
        return
    remedy = "name a function of aem_exp or of a module of your own, which may call it"
    if head in sys.stdlib_module_names or head in sys.builtin_module_names:
        raise ConfigError(field, path, f"{head} is a module of Python's standard library; {remedy}")
    if library := _required_distribution(head):
        raise ConfigError(field, path, f"{head} comes with {library}, a library of this program; {remedy}")


@functools.cache
def _required_distribution(head: str) -> str | None:
    """The distribution that a module is installed by, where this package needs it, or pip does."""
    from importlib import metadata  # here, as `--help` needs none of it

    spec = find_module(head)
    places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    if not any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places):
        return None
    found = {_normalize_name(name) for name in metadata.packages_distributions().get(head, ())}
    return next(iter(sorted(found & _required_distributions())), None)


@functools.cache
def _required_distributions() -> frozenset[str]:
    """The distributions that this package needs, all of its extras included, and what those need in turn."""
    from importlib import metadata

    found, waiting = set(_INSTALLERS), ["aem-exp"]
    while waiting:
        name = waiting.pop()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of an extra; or this package runs where it is not installed
            continue
        for need in needs:
            needed = re.match(r"[\w.-]+", need)
            if needed and (name == "aem-exp" or "extra ==" not in need) and _normalize_name(needed[0]) not in found:
                found.add(_normalize_name(needed[0]))
                waiting.append(needed[0])
    return frozenset(found)


def _normalize_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _convert_argument(at: str, key: str, value: Any, signature: CallSignature) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        return bind_target(f"{at}.{key}", value)
    return convert(signature.hints.get(key, Any), value, f"{at}.{key}")


def _read_signature(at: str, path: str) -> CallSignature:
    module, _, name = path.rpartition(".")
    spec = find_module(module)
    if spec is None and path == LORA_CONFIG:
        return lora_signature()
    if spec is None:
        near = closest_match(module, list_sibling_modules(module))
        raise ConfigError(
            f"{at}._target_", path, f"there is no module {module}" + (f"; did you mean {near}?" if near else "")
        )
    found = find_definition(module, name)
    if found is None and parse_module(module) is not None:
        raise ConfigError(
            f"{at}._target_", path, f"{module} has no {name}" + _suggestion(name, list_public_names(module))
        )
    if found is not None and path.startswith(f"{_PACKAGE}."):  # not what our modules import for themselves
        _check_allowed(f"{at}._target_", f"{found[0]}.{name}")
    return CallSignature(accepts_any=True) if found is None else read_definition(*found)


def _suggestion(name: str, names: Iterable[str]) -> str:
    near = closest_match(name, names)
    return f"; did you mean {near}?" if near else ""


def bind_targets(e: Experiment) -> Experiment:
    """Every `_target_` checked against its signature, its keywords typed."""
    model, modulation, launch = e.model, e.modulation, e.launch
    if model.path and (Path(model.path).expanduser() / "config.json").is_file():  # one spelling, one signature
        model = replace(model, path=str(Path(model.path).expanduser().resolve()))
    folders = {name: getattr(launch, name) for name in ("servers", "workers_at")}
    whole: dict[str, Any] = {n: str(Path(f).expanduser().absolute()) for n, f in folders.items() if f is not None}
    launch = replace(launch, **whole)  # a job stands elsewhere
    if model.make is not None:
        model = replace(model, make=bind_target("model.make", model.make, supplied=("world", "env", "folder")))
    if model.lora is not None:
        lora = bind_target("model.lora", {"_target_": LORA_CONFIG, **model.lora}, supplied=("task_type",))
        model = replace(model, lora={key: value for key, value in lora.items() if key != "_target_"})
    if modulation.lam is not None:
        modulation = replace(modulation, lam=bind_target("modulation.lam", modulation.lam))
    advantage = bind_target("baseline.advantage", e.baseline.advantage, positional=1)
    baseline = replace(e.baseline, advantage=advantage)
    env = replace(e.env, make=bind_target("env.make", e.env.make))
    return replace(e, model=model, env=env, baseline=baseline, modulation=modulation, launch=launch)
