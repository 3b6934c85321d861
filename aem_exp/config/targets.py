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
from aem_exp.core.errors import ConfigError, closest, unknown
from aem_exp.core.typed import convert

_TYPES: Final = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
_HOPS: Final = 8  # imports to follow from a package to where a name is defined
_OURS: Final = "aem_exp"
_NEEDED: Final = ("peft",)  # libraries that a config may name: the keywords of model.lora are those of peft.LoraConfig
_INSTALLERS: Final = ("pip", "setuptools", "wheel")  # in every environment, and nobody's own


@dataclass
class Signature:
    """What a callable takes. `open`: it also takes what its source does not show."""

    positional: list[str] = field(default_factory=list)
    hints: dict[str, Any] = field(default_factory=dict)  # keyword -> type, in order
    required: set[str] = field(default_factory=set)
    open: bool = False

    def add(self, name: str, hint: Any, has_default: bool) -> None:
        self.hints[name] = hint
        (self.required.discard if has_default else self.required.add)(name)


def bind(at: str, block: Mapping[str, Any], positional: int = 0, supplied: Sequence[str] = ()) -> dict[str, Any]:
    """The block with its keywords checked against what the target takes.

    Args:
        at: the block's dotted key.
        positional: how many arguments the caller passes by position.
        supplied: arguments that the caller passes by name.

    Raises:
        ConfigError: no such target, or keywords that it does not take.
    """
    path = _path(at, block)
    given = {key: value for key, value in block.items() if key != "_target_"}
    signature = _signature(at, path)
    if len(signature.positional) < positional and not signature.open:
        raise ConfigError(
            f"{at}._target_", path, f"must take {positional} argument{'s' * (positional > 1)} by position"
        )
    taken = {*signature.positional[:positional], *supplied}
    keywords = [name for name in signature.hints if name not in taken]
    for key, value in given.items():
        if key in taken or (key not in keywords and not signature.open):
            raise unknown(f"{at}.{key}", value, keywords)
    missing = next((key for key in keywords if key in signature.required and key not in given), None)
    if missing:
        raise ConfigError(f"{at}.{missing}", None, f"required by {path}")
    return {"_target_": path} | {key: _bound_keyword(at, key, value, signature) for key, value in given.items()}


def instantiate(block: Mapping[str, Any], partial: bool = False) -> Any:
    """Import the target and call it with the block's keywords; `partial` leaves the call to whoever has the rest."""
    path = str(block["_target_"])
    _check_allowed("_target_", path)
    module, _, name = path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    if not callable(target):
        remedy = f"is a {type(target).__name__}, and must be a class or a function"
        raise ConfigError("_target_", block["_target_"], remedy)
    keywords = {key: _made(value) for key, value in block.items() if key != "_target_"}
    return functools.partial(target, **keywords) if partial else target(**keywords)


def _made(value: Any) -> Any:
    return instantiate(value) if isinstance(value, Mapping) and "_target_" in value else value


def location(module: str) -> Path | None:
    """The file of a module, or the folder of a package, without importing it."""
    spec = _spec(module)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def _path(at: str, block: Mapping[str, Any]) -> str:
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
    if head in (_OURS, *_NEEDED):
        return
    remedy = "name a function of aem_exp or of a module of your own, which may call it"
    if head in sys.stdlib_module_names or head in sys.builtin_module_names:
        raise ConfigError(field, path, f"{head} is a module of Python's standard library; {remedy}")
    if library := _library(head):
        raise ConfigError(field, path, f"{head} comes with {library}, a library of this program; {remedy}")


@functools.cache
def _library(head: str) -> str | None:
    """The distribution that a module is installed by, where this package needs it, or pip does."""
    from importlib import metadata  # here, as `--help` needs none of it

    spec = _spec(head)
    places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    if not any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places):
        return None
    found = {_normal(name) for name in metadata.packages_distributions().get(head, ())}
    return next(iter(sorted(found & _libraries())), None)


@functools.cache
def _libraries() -> frozenset[str]:
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
            if needed and (name == "aem-exp" or "extra ==" not in need) and _normal(needed[0]) not in found:
                found.add(_normal(needed[0]))
                waiting.append(needed[0])
    return frozenset(found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _bound_keyword(at: str, key: str, value: Any, signature: Signature) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        return bind(f"{at}.{key}", value)
    return convert(signature.hints.get(key, Any), value, f"{at}.{key}")


def _signature(at: str, path: str) -> Signature:
    module, _, name = path.rpartition(".")
    spec = _spec(module)
    if spec is None:
        near = closest(module, _siblings(module))
        raise ConfigError(
            f"{at}._target_", path, f"there is no module {module}" + (f"; did you mean {near}?" if near else "")
        )
    found = _definition(module, name)
    if found is None and _tree(module) is not None:
        raise ConfigError(f"{at}._target_", path, f"{module} has no {name}" + _suggestion(name, _names(module)))
    if found is not None and path.startswith(f"{_OURS}."):  # not what our modules import for themselves
        _check_allowed(f"{at}._target_", f"{found[0]}.{name}")
    return Signature(open=True) if found is None else _read(*found)


def _suggestion(name: str, names: Iterable[str]) -> str:
    near = closest(name, names)
    return f"; did you mean {near}?" if near else ""


# Finding source.


def _spec(module: str) -> ModuleSpec | None:
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


def _siblings(module: str) -> list[str]:
    parent = module.rpartition(".")[0]
    spec = _spec(parent) if parent else None
    places = spec.submodule_search_locations if spec else None
    return [f"{parent}.{info.name}" for info in iter_modules(places)] if places else []


def _tree(module: str) -> ast.Module | None:
    """The source of a module, parsed; None where there is none (compiled, or missing)."""
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return _parsed(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@functools.cache
def _parsed(file: str, changed: int) -> ast.Module:
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


def _names(module: str) -> list[str]:
    tree = _tree(module)
    nodes = _statements(tree.body) if tree else ()
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]


def _definition(module: str, name: str, hops: int = _HOPS) -> tuple[str, ast.stmt] | None:
    """The statement that defines a name, and its module; imports are followed."""
    tree = _tree(module)
    for node in _statements(tree.body) if tree and hops else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_source(module, node), alias.name, hops - 1)
    return None


def _source(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that `from ... import` reads."""
    if not node.level:
        return node.module or ""
    spec = _spec(module)
    package = module if spec and spec.submodule_search_locations is not None else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


# Reading signatures.


def _read(module: str, node: ast.stmt) -> Signature:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _function(module, node.args)
    return _class(module, node) if isinstance(node, ast.ClassDef) else Signature(open=True)


def _function(module: str, args: ast.arguments, bound: bool = False) -> Signature:
    signature = Signature(open=args.kwarg is not None or args.vararg is not None)
    by_position = [*args.posonlyargs, *args.args]
    first_default = len(by_position) - len(args.defaults)
    for i, arg in enumerate(by_position):
        if not (bound and i == 0):
            signature.add(arg.arg, _hint(module, arg.annotation), i >= first_default)
            signature.positional.append(arg.arg)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        signature.add(arg.arg, _hint(module, arg.annotation), default is not None)
    return signature


def _class(module: str, node: ast.ClassDef) -> Signature:
    """Of `__init__`, or of the fields of a dataclass; inherited where the class has neither."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _function(module, item.args, bound=True)
    signature = Signature()
    for base in reversed(node.bases):
        inherited = _base(module, base)
        signature.hints |= inherited.hints
        signature.required = signature.required - set(inherited.hints) | inherited.required
        signature.open |= inherited.open
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                _add_field(module, signature, item.target.id, item)
    signature.positional = list(signature.hints)
    return signature


def _base(module: str, base: ast.expr) -> Signature:
    name = ast.unparse(base).partition("[")[0]
    if name in ("object", "Protocol", "Generic", "ABC"):
        return Signature()
    found = _definition(module, name) if name.isidentifier() else None
    return _read(*found) if found else Signature(open=True)


def _add_field(module: str, signature: Signature, name: str, item: ast.AnnAssign) -> None:
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
        signature.add(name, _hint(module, item.annotation), has_default)


def _hint(module: str, annotation: ast.expr | None) -> Any:
    """The type that an annotation spells, where it is plain enough to check; else Any."""
    match annotation:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            return _hint(module, ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return _TYPES.get(name) or _alias(module, name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            left_hint, right_hint = _hint(module, left), _hint(module, right)
            return Any if Any in (left_hint, right_hint) else left_hint | right_hint
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return Literal[tuple(ast.literal_eval(choice) for choice in choices)]
        case ast.Subscript(value=ast.Name(id="list" | "Sequence"), slice=inner):
            return list[_hint(module, inner)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict" | "Mapping"), slice=ast.Tuple(elts=[_, inner])):
            return dict[str, _hint(module, inner)]  # type: ignore[misc]
    return Any


def _alias(module: str, name: str) -> Any:
    """What a name stands for that a module gives to a type: `Over = Literal["trajectories", "turns"]`."""
    found = _definition(module, name)
    return _hint(found[0], found[1].value) if found and isinstance(found[1], ast.Assign) else Any


def bind_experiment(e: Experiment) -> Experiment:
    """Every `_target_` checked against its signature, its keywords typed."""
    model, modulation, launch = e.model, e.modulation, e.launch
    if model.path and (Path(model.path).expanduser() / "config.json").is_file():  # one spelling, one signature
        model = replace(model, path=str(Path(model.path).expanduser().resolve()))
    folders = {name: getattr(launch, name) for name in ("servers", "workers_at")}
    whole: dict[str, Any] = {n: str(Path(f).expanduser().absolute()) for n, f in folders.items() if f is not None}
    launch = replace(launch, **whole)  # a job stands elsewhere
    if model.make is not None:
        model = replace(model, make=bind("model.make", model.make, supplied=("world", "env", "folder")))
    if model.lora is not None:
        lora = bind("model.lora", {"_target_": "peft.LoraConfig", **model.lora}, supplied=("task_type",))
        model = replace(model, lora={key: value for key, value in lora.items() if key != "_target_"})
    if modulation.lam is not None:
        modulation = replace(modulation, lam=bind("modulation.lam", modulation.lam))
    advantage = bind("baseline.advantage", e.baseline.advantage, positional=1)
    baseline = replace(e.baseline, advantage=advantage)
    env = replace(e.env, make=bind("env.make", e.env.make))
    return replace(e, model=model, env=env, baseline=baseline, modulation=modulation, launch=launch)
