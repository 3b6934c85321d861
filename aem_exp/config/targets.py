"""Checks `_target_` entries against the signature of the function or class that they name, and calls them.

A config may name functions and classes of this package and of the user's own modules. The standard library and the
libraries that this package requires are refused, because some of their functions run arbitrary code. Signatures are read from
source code, so a misspelt keyword is refused before torch or an environment is loaded.
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
_ALLOWED_LIBRARIES: Final = ("peft",)  # model.lora has the keywords of peft.LoraConfig
_INSTALLERS: Final = ("pip", "setuptools", "wheel")  # in every Python environment, so not installed by the user


def bind_target(
    block_key: str, block: Mapping[str, Any], positional: int = 0, supplied: Sequence[str] = ()
) -> dict[str, Any]:
    """Check the keywords of a block against the signature of its target, and convert them to its types.

    Args:
        block_key: dotted key of the block.
        positional: number of arguments that the caller passes by position.
        supplied: names of the arguments that the caller passes by keyword.

    Raises:
        ConfigError: the target does not exist, or does not take these keywords.
    """
    path = _target_path(block_key, block)
    given = {key: value for key, value in block.items() if key != "_target_"}
    signature = _read_signature(block_key, path)
    if len(signature.positional) < positional and not signature.accepts_any:
        raise ConfigError(
            f"{block_key}._target_", path, f"must accept {positional} argument{'s' * (positional > 1)} by position"
        )
    passed = {*signature.positional[:positional], *supplied}
    keywords = [name for name in signature.hints if name not in passed]
    for key, value in given.items():
        if key in passed or (key not in keywords and not signature.accepts_any):
            raise unknown_key_error(f"{block_key}.{key}", value, keywords)
    missing = next((key for key in keywords if key in signature.required and key not in given), None)
    if missing:
        raise ConfigError(f"{block_key}.{missing}", None, f"is required by {path}")
    return {"_target_": path} | {
        key: _convert_argument(block_key, key, value, signature) for key, value in given.items()
    }


def instantiate(block: Mapping[str, Any], partial: bool = False) -> Any:
    """Import the target and call it with the keywords of the block; with `partial`, return a partial function instead."""
    path = str(block["_target_"])
    _check_allowed("_target_", path)
    module, _, name = path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    if not callable(target):
        remedy = f"must be a class or a function; it is a {type(target).__name__}"
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


def _target_path(block_key: str, block: Mapping[str, Any]) -> str:
    path = block.get("_target_")
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise ConfigError(
            f"{block_key}._target_", path, "must be the dotted name of a function or class: package.module.name"
        )
    _check_allowed(f"{block_key}._target_", path)
    return path


# Which functions may be called.


def _check_allowed(field: str, path: str) -> None:
    """Refuse a target by its name, before anything is imported.

    A package that the user has installed counts as the user's own, unless this package requires it.
    """
    head = path.partition(".")[0]
    if head in (_PACKAGE, *_ALLOWED_LIBRARIES):
        return
    remedy = "name a function of aem_exp or of your own module, which may call it"
    if head in sys.stdlib_module_names or head in sys.builtin_module_names:
        raise ConfigError(field, path, f"{head} is a module of Python's standard library; {remedy}")
    if library := _required_distribution(head):
        raise ConfigError(field, path, f"{head} belongs to {library}, a library that aem_exp requires; {remedy}")


@functools.cache
def _required_distribution(head: str) -> str | None:
    """The distribution of a module if this package or pip requires it; else None."""
    from importlib import metadata  # a late import: `--help` does not need it

    spec = find_module(head)
    paths = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    if not any({"site-packages", "dist-packages"} & set(Path(path).parts) for path in paths):
        return None
    distributions = {_normalize_name(name) for name in metadata.packages_distributions().get(head, ())}
    return next(iter(sorted(distributions & _required_distributions())), None)


@functools.cache
def _required_distributions() -> frozenset[str]:
    """The distributions that this package requires, directly or indirectly, including all of its extras."""
    from importlib import metadata

    required, queue = set(_INSTALLERS), ["aem-exp"]
    while queue:
        name = queue.pop()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra that is not installed, or this package itself
            continue
        for need in needs:
            match = re.match(r"[\w.-]+", need)
            if match and (name == "aem-exp" or "extra ==" not in need) and _normalize_name(match[0]) not in required:
                required.add(_normalize_name(match[0]))
                queue.append(match[0])
    return frozenset(required)


def _normalize_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _convert_argument(block_key: str, key: str, value: Any, signature: CallSignature) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        return bind_target(f"{block_key}.{key}", value)
    return convert(signature.hints.get(key, Any), value, f"{block_key}.{key}")


def _read_signature(block_key: str, path: str) -> CallSignature:
    module, _, name = path.rpartition(".")
    spec = find_module(module)
    if spec is None and path == LORA_CONFIG:
        return lora_signature()
    if spec is None:
        near = closest_match(module, list_sibling_modules(module))
        raise ConfigError(
            f"{block_key}._target_",
            path,
            f"the module {module} does not exist" + (f"; did you mean {near}?" if near else ""),
        )
    found = find_definition(module, name)
    if found is None and parse_module(module) is not None:
        raise ConfigError(
            f"{block_key}._target_", path, f"{module} has no {name}" + _suggestion(name, list_public_names(module))
        )
    if found is not None and path.startswith(f"{_PACKAGE}."):  # refuse names that our modules import from libraries
        _check_allowed(f"{block_key}._target_", f"{found[0]}.{name}")
    return CallSignature(accepts_any=True) if found is None else read_definition(*found)


def _suggestion(name: str, names: Iterable[str]) -> str:
    near = closest_match(name, names)
    return f"; did you mean {near}?" if near else ""


def bind_targets(e: Experiment) -> Experiment:
    """Check every `_target_` of an experiment against its signature, and make local paths absolute."""
    model, modulation, launch = e.model, e.modulation, e.launch
    if (
        model.path and (Path(model.path).expanduser() / "config.json").is_file()
    ):  # one spelling of a path gives one signature
        model = replace(model, path=str(Path(model.path).expanduser().resolve()))
    if launch.servers is not None:  # a job has another current folder
        launch = replace(launch, servers=str(Path(launch.servers).expanduser().absolute()))
    if model.path and model.make and "_target_" not in model.make:  # such as from the experiment file
        remedy = "are settings of a policy that is made, and model.path loads one; add model.make=null"
        raise ConfigError("model.make", ", ".join(model.make), remedy)
    if model.make is not None:
        model = replace(model, make=bind_target("model.make", model.make, supplied=("world", "env", "folder")))
    if model.lora is not None:
        model = replace(model, lora=_bind_lora("model.lora", model.lora))
    warm_start = e.warm_start
    if warm_start.lora is not None:
        warm_start = replace(warm_start, lora=_bind_lora("warm_start.lora", warm_start.lora))
    if modulation.lam is not None:
        modulation = replace(modulation, lam=bind_target("modulation.lam", modulation.lam))
    advantage = bind_target("baseline.advantage", e.baseline.advantage, positional=1)
    baseline = replace(e.baseline, advantage=advantage)
    env = replace(e.env, make=bind_target("env.make", e.env.make))
    return replace(
        e,
        model=model,
        env=env,
        baseline=baseline,
        modulation=modulation,
        warm_start=warm_start,
        launch=launch,
    )


def _bind_lora(key: str, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keywords of a LoRA adapter against `peft.LoraConfig`."""
    bound = bind_target(key, {"_target_": LORA_CONFIG, **lora}, supplied=("task_type",))
    return {name: value for name, value in bound.items() if name != "_target_"}
