"""Reads the signature of a function or class from its source code, without importing its module."""

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final, Literal

from aem_exp.core.errors import ConfigError

_TYPES: Final = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None), "Any": Any}
_MAX_IMPORT_HOPS: Final = 8  # imports to follow from a package to where a name is defined


@dataclass
class CallSignature:
    """The parameters of a callable."""

    positional: list[str] = field(default_factory=list)
    """names of the positional parameters, in order"""
    hints: dict[str, Any] = field(default_factory=dict)
    """parameter -> type, in order"""
    required: set[str] = field(default_factory=set)
    """parameters without a default"""
    accepts_any: bool = False
    """whether it may accept other parameters, which its source does not show"""

    def add(self, name: str, hint: Any, has_default: bool) -> None:
        self.hints[name] = hint
        (self.required.discard if has_default else self.required.add)(name)


def find_module(module: str) -> ModuleSpec | None:
    """Find a module without importing it or its parents."""
    head, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(head) or find_spec(head)  # first on disk: a lazy module in memory hides its source
    except ValueError:  # __main__
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def list_sibling_modules(module: str) -> list[str]:
    """The modules in the package of a module; the module itself need not exist."""
    parent = module.rpartition(".")[0]
    spec = find_module(parent) if parent else None
    folders = spec.submodule_search_locations if spec else None
    return [f"{parent}.{info.name}" for info in iter_modules(folders)] if folders else []


def parse_module(module: str) -> ast.Module | None:
    """Parse the source of a module; None if it has no source (compiled or missing)."""
    spec = find_module(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return _parse_file(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@functools.cache
def _parse_file(file: str, changed: int) -> ast.Module:
    try:
        return ast.parse(Path(file).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError("_target_", file, f"has a syntax error: {error.msg}, line {error.lineno}") from error


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, including those under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def list_public_names(module: str) -> list[str]:
    """The public functions and classes of a module, and the names in its `__all__`."""
    tree = parse_module(module)
    names: list[str] = []
    for node in _statements(tree.body) if tree else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            names.append(node.name)
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            constants = [item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)]
            names += [name for name in constants if isinstance(name, str)]
    return names


def find_definition(module: str, name: str, hops: int = _MAX_IMPORT_HOPS) -> tuple[str, ast.stmt] | None:
    """The module and the statement that define a name; imports are followed."""
    tree = parse_module(module)
    for node in _statements(tree.body) if tree and hops else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_definition(_import_source(module, node), alias.name, hops - 1)
    return None


def _import_source(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module in a `from ... import`."""
    if not node.level:
        return node.module or ""
    spec = find_module(module)
    package = module if spec and spec.submodule_search_locations is not None else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def read_definition(module: str, node: ast.stmt) -> CallSignature:
    """The signature of a function or class; for any other object, one that accepts everything."""
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
    """The signature of `__init__`, or of the fields of a dataclass; inherited if the class has neither."""
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
    found = find_definition(module, name) if name.isidentifier() else None
    return read_definition(*found) if found else CallSignature(accepts_any=True)


def _add_field(module: str, signature: CallSignature, name: str, item: ast.AnnAssign) -> None:
    """Add a dataclass field. `field(...)` has a default if it has the keyword `default` or `default_factory`."""
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
    """The type of an annotation if it is simple enough to check; else Any."""
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


def parse_hint(text: str) -> Any:
    """The type of an annotation that is given as text."""
    return _annotation_type("", ast.parse(text, mode="eval").body)


def _alias_type(module: str, name: str) -> Any:
    """The type behind an alias, such as `Over = Literal["trajectories", "turns"]`."""
    found = find_definition(module, name)
    return _annotation_type(found[0], found[1].value) if found and isinstance(found[1], ast.Assign) else Any
