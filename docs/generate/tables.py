"""Tables of the configuration, in Markdown: from types, docstrings, and the files of `conf/`."""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from aem_exp import config
from aem_exp.config.call_signatures import parse_module
from aem_exp.core.typed import type_hints

CONF = Path(__file__).parents[2] / "conf"
MORE_TARGETS = (
    "aem_exp.sandboxes.apptainer.Apptainer",
    "aem_exp.sandboxes.docker.Docker",
)  # that no file of conf/ names
ARGUMENT = r"^    (\w[\w, ]*): ((?:.*(?:\n {8}.*)*))"  # of a docstring, in the section `Args`
TYPES = {int: "integer", float: "number", bool: "true, false", str: "text", type(None): "null"}


def key_table(block: type, prefix: str, keys: Iterable[str] = ()) -> str:
    """One row per field of a dataclass or typed dict."""
    hints, docs = type_hints(block), field_docs(block)
    rows = []
    for key in keys or hints:
        assert docs.get(key), f"{block.__module__}.{block.__name__}.{key} has no docstring below it"
        rows.append((f"`{prefix}{key}`", describe_type(hints[key]), _default(block, prefix, key), docs[key]))
    head = ("Key", "Type", "Default", "Meaning")
    return (
        table(head, rows)
        if any(row[2] for row in rows)
        else table((*head[:2], head[3]), [(*r[:2], r[3]) for r in rows])
    )


def choice_table(group: str) -> str:
    """One row per file of a group. The first comment of a file is its meaning; a comment `Paper: ...` may follow."""
    chosen = next(
        (item[group] for item in _config_yaml()["defaults"] if isinstance(item, dict) and group in item), None
    )
    sign = "+" if group == "experiment" else ""
    files = config.list_choices([CONF])[group].items()
    rows = [
        (f"`{sign}{group}={name}`{' (default)' if name == chosen else ''}", _first_comment(file), _paper(file))
        for name, file in files
    ]
    head = ("Choice", "Meaning", "Paper")
    return table(head, rows) if any(row[2] for row in rows) else table(head[:2], [row[:2] for row in rows])


def list_targets() -> list[str]:
    """Every `_target_` of `conf/`, and what else can stand there."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    return sorted({*re.findall(r"_target_: (aem_exp[\w.]+)", text), *MORE_TARGETS})


def describe_target(target: str) -> str:
    """The first paragraph of the docstring of a function or class."""
    return _split_docstring(_load(target))[0]


def argument_table(target: str) -> str:
    """One row per argument that a config may give. A function gets its positional arguments from the program."""
    called = _load(target)
    is_class = isinstance(called, type)
    meanings: dict[str, str] = {}
    for one in reversed(called.__mro__[:-1]) if is_class else [called]:
        meanings |= (field_docs(one) if is_class else {}) | _split_docstring(one)[1]
    hints = get_type_hints(called.__init__ if is_class else called, include_extras=True)
    rows = []
    for name, item in inspect.signature(called).parameters.items():
        if is_class or item.kind is item.KEYWORD_ONLY:
            assert meanings.get(name), f"the docstring of {target} does not describe {name}"
            default = "required" if item.default is item.empty else f"`{_as_yaml(item.default)}`"
            rows.append((f"`{name}`", describe_type(hints[name]), default, meanings[name]))
    return table(("Argument", "Type", "Default", "Meaning"), rows)


def code_table(title: str, meanings: Mapping[str, str]) -> str:
    return table((title, "Meaning"), [(f"`{key}`", meaning) for key, meaning in meanings.items()])


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def field_docs(block: type) -> dict[str, str]:
    """Field -> the docstring below it, those of base classes included."""
    docs: dict[str, str] = {}
    for cls in reversed(getattr(block, "__mro__", (block,))):
        tree = parse_module(cls.__module__) if cls.__module__.startswith("aem_exp") else None
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)] if tree else []
        docs |= {name: text for node in classes if node.name == cls.__name__ for name, text in _documented(node.body)}
    return docs


def describe_type(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ", ".join([describe_type(args[0]), *(rule.description.removeprefix("of ") for rule in args[1:])])
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, args))
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin in (list, Sequence):
        return f"list of {describe_type(args[0])}"
    if origin in (dict, Mapping) or is_typeddict(hint):
        return "mapping"
    return TYPES.get(hint, "`_target_`")


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for item, below in pairwise(body):
        if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield ast.unparse(item.target), " ".join(str(below.value.value).split())


def _default(block: type, prefix: str, key: str) -> str:
    if is_typeddict(block):
        return ""
    item = next(field for field in fields(block) if field.name == key)
    chosen = (_config_yaml().get(prefix.rstrip("."), {}) if prefix else _config_yaml()).get(key)
    set_there = "" if chosen is None else f"`{_as_yaml(chosen)}` in `conf/config.yaml`"
    if item.default is MISSING and item.default_factory is MISSING:
        return f"required; {set_there or 'set by `baseline`'}"
    neutral = item.default_factory() if item.default is MISSING else item.default  # type: ignore[misc]
    return f"`{_as_yaml(neutral)}`" + (f"; {set_there}" if set_there and chosen != neutral else "")


@cache
def _config_yaml() -> dict[str, Any]:
    return yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))


def _as_yaml(value: Any) -> str:
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _first_comment(file: Path) -> str:
    return _link_papers(next(comment for comment in _comments(file) if not comment.startswith("@")))


def _paper(file: Path) -> str:
    """The comment `Paper: ...` of a file, or nothing."""
    found = (comment.removeprefix("Paper: ") for comment in _comments(file) if comment.startswith("Paper: "))
    return _link_papers(next(found, ""))


def _comments(file: Path) -> list[str]:
    return [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]


def _link_papers(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _load(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def _split_docstring(called: Any) -> tuple[str, dict[str, str]]:
    """The first paragraph, and argument -> meaning. `a, b: text` describes two arguments."""
    text, meanings = inspect.cleandoc(called.__doc__ or ""), {}
    section = re.search(r"^Args:\n((?:    .*\n?)+)", text, re.MULTILINE)
    for names, meaning in re.findall(ARGUMENT, section[1] if section else "", re.MULTILINE):
        meanings |= dict.fromkeys(re.split(r",\s*", names), _sentence(meaning))
    return _sentence(text.partition("\n\n")[0]), meanings


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:]
