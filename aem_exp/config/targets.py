"""`_target_`: bound to its signature without importing it, then called.

A config may name a function or class of this package or of the user's own modules, wherever these are imported from. It may
not name one of the standard library, or of the libraries that this package needs for itself: among these are functions that
run whatever they are given. What a target takes is read from its source, so that a misspelt keyword is refused before torch, or
a world, is loaded.
"""

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final, Literal

from aem_exp.config.schema import Experiment
from aem_exp.core.errors import ConfigError, closest_match, unknown_key_error
from aem_exp.core.typed import convert

_TYPES: Final = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
_MAX_IMPORT_HOPS: Final = 8  # imports to follow from a package to where a name is defined
_PACKAGE: Final = "aem_exp"
_ALLOWED_LIBRARIES: Final = (
    "peft",
)  # libraries that a config may name: the keywords of model.lora are those of peft.LoraConfig
_INSTALLERS: Final = ("pip", "setuptools", "wheel")  # in every environment, and nobody's own


@dataclass
class CallSignature:
    """What a callable takes. `open`: it also takes what its source does not show."""

    positional: list[str] = field(default_factory=list)
    hints: dict[str, Any] = field(default_factory=dict)  # keyword -> type, in order
    required: set[str] = field(default_factory=set)
    accepts_any: bool = False

    def add(self, name: str, hint: Any, has_default: bool) -> None:
        self.hints[name] = hint
        (self.required.discard if has_default else self.required.add)(name)


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
    spec = _find_spec(module)
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

    spec = _find_spec(head)
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
    spec = _find_spec(module)
    if spec is None:
        near = closest_match(module, _sibling_modules(module))
        raise ConfigError(
            f"{at}._target_", path, f"there is no module {module}" + (f"; did you mean {near}?" if near else "")
        )
    found = _find_definition(module, name)
    if found is None and _parse_module(module) is not None:
        raise ConfigError(f"{at}._target_", path, f"{module} has no {name}" + _suggestion(name, _public_names(module)))
    if found is not None and path.startswith(f"{_PACKAGE}."):  # not what our modules import for themselves
        _check_allowed(f"{at}._target_", f"{found[0]}.{name}")
    return CallSignature(accepts_any=True) if found is None else _definition_signature(*found)


def _suggestion(name: str, names: Iterable[str]) -> str:
    near = closest_match(name, names)
    return f"; did you mean {near}?" if near else ""


# Finding source.


def _find_spec(module: str) -> ModuleSpec | None:
    """Where a module is, without importing it or its parents."""
    head, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(head) or find_spec(head)  # on disk first: a lazy module in memory hides its source
    except ValueError:  # __main__
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _sibling_modules(module: str) -> list[str]:
    parent = module.rpartition(".")[0]
    spec = _find_spec(parent) if parent else None
    places = spec.submodule_search_locations if spec else None
    return [f"{parent}.{info.name}" for info in iter_modules(places)] if places else []


def _parse_module(module: str) -> ast.Module | None:
    """The source of a module, parsed; None where there is none (compiled, or missing)."""
    spec = _find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return _parse_file(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@functools.cache
def _parse_file(file: str, changed: int) -> ast.Module:
    try:
        return ast.parse(Path(file).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError("_target_", file, f"is not Python: {error.msg}, line {error.lineno}") from error


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those under `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _public_names(module: str) -> list[str]:
    """The functions and classes that a module defines, and what a package re-exports in its `__all__`."""
    tree = _parse_module(module)
    names: list[str] = []
    for node in _statements(tree.body) if tree else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            names.append(node.name)
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            constants = [one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)]
            names += [name for name in constants if isinstance(name, str)]
    return names


def _find_definition(module: str, name: str, hops: int = _MAX_IMPORT_HOPS) -> tuple[str, ast.stmt] | None:
    """The statement that defines a name, and its module; imports are followed."""
    tree = _parse_module(module)
    for node in _statements(tree.body) if tree and hops else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find_definition(_import_source(module, node), alias.name, hops - 1)
    return None


def _import_source(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that `from ... import` reads."""
    if not node.level:
        return node.module or ""
    spec = _find_spec(module)
    package = module if spec and spec.submodule_search_locations is not None else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


# Reading signatures.


def _definition_signature(module: str, node: ast.stmt) -> CallSignature:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _function_signature(module, node.args)
    return _class_signature(module, node) if isinstance(node, ast.ClassDef) else CallSignature(accepts_any=True)


def _function_signature(module: str, args: ast.arguments, bound: bool = False) -> CallSignature:
    signature = CallSignature(accepts_any=args.kwarg is not None or args.vararg is not None)
    by_position = [*args.posonlyargs, *args.args]
    first_default = len(by_position) - len(args.defaults)
    for i, arg in enumerate(by_position):
        if not (bound and i == 0):
            signature.add(arg.arg, _annotation_type(module, arg.annotation), i >= first_default)
            signature.positional.append(arg.arg)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        signature.add(arg.arg, _annotation_type(module, arg.annotation), default is not None)
    return signature


def _class_signature(module: str, node: ast.ClassDef) -> CallSignature:
    """Of `__init__`, or of the fields of a dataclass; inherited where the class has neither."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _function_signature(module, item.args, bound=True)
    signature = CallSignature()
    for base in reversed(node.bases):
        inherited = _base_signature(module, base)
        signature.hints |= inherited.hints
        signature.required = signature.required - set(inherited.hints) | inherited.required
        signature.accepts_any |= inherited.accepts_any
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                _add_field(module, signature, item.target.id, item)
    signature.positional = list(signature.hints)
    return signature


def _base_signature(module: str, base: ast.expr) -> CallSignature:
    name = ast.unparse(base).partition("[")[0]
    if name in ("object", "Protocol", "Generic", "ABC"):
        return CallSignature()
    found = _find_definition(module, name) if name.isidentifier() else None
    return _definition_signature(*found) if found else CallSignature(accepts_any=True)


def _add_field(module: str, signature: CallSignature, name: str, item: ast.AnnAssign) -> None:
    """A dataclass field. `field(...)` has a default where a keyword says so."""
    if "ClassVar" in ast.unparse(item.annotation):
        return
    options: dict[str | None, ast.expr] = {}
    is_field = isinstance(item.value, ast.Call) and ast.unparse(item.value.func).endswith("field")
    if is_field and isinstance(item.value, ast.Call):
        options = {keyword.arg: keyword.value for keyword in item.value.keywords}
    init = options.get("init")
    if not (isinstance(init, ast.Constant) and init.value is False):
        has_default = bool(options.keys() & {"default", "default_factory"}) if is_field else item.value is not None
        signature.add(name, _annotation_type(module, item.annotation), has_default)


def _annotation_type(module: str, annotation: ast.expr | None) -> Any:
    """The type that an annotation spells, where it is plain enough to check; else Any."""
    match annotation:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            return _annotation_type(module, ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return _TYPES.get(name) or _alias_type(module, name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            left_hint, right_hint = _annotation_type(module, left), _annotation_type(module, right)
            return Any if Any in (left_hint, right_hint) else left_hint | right_hint
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return Literal[tuple(ast.literal_eval(choice) for choice in choices)]
        case ast.Subscript(value=ast.Name(id="list" | "Sequence"), slice=inner):
            return list[_annotation_type(module, inner)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict" | "Mapping"), slice=ast.Tuple(elts=[_, inner])):
            return dict[str, _annotation_type(module, inner)]  # type: ignore[misc]
    return Any


def _alias_type(module: str, name: str) -> Any:
    """What a name stands for that a module gives to a type: `Over = Literal["trajectories", "turns"]`."""
    found = _find_definition(module, name)
    return _annotation_type(found[0], found[1].value) if found and isinstance(found[1], ast.Assign) else Any


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
        lora = bind_target("model.lora", {"_target_": "peft.LoraConfig", **model.lora}, supplied=("task_type",))
        model = replace(model, lora={key: value for key, value in lora.items() if key != "_target_"})
    if modulation.lam is not None:
        modulation = replace(modulation, lam=bind_target("modulation.lam", modulation.lam))
    advantage = bind_target("baseline.advantage", e.baseline.advantage, positional=1)
    baseline = replace(e.baseline, advantage=advantage)
    env = replace(e.env, make=bind_target("env.make", e.env.make))
    return replace(e, model=model, env=env, baseline=baseline, modulation=modulation, launch=launch)
