"""Correct patches of generated repositories: the gold line, and a rewriting of the code around it.

An audited grade must resolve all of them.
"""

import ast
import re

from aem_exp.envs.swe import generated


def rewrites(name, modules=2, functions=2):
    """Kind -> the files that a correct patch writes (None: it removes the file), for the repository of a name."""
    made = generated.generate_repository(name, modules, functions)
    files = _files(made)
    path, right = made.path, files[made.path].replace(made.wrong, made.right)
    package, _, module = path.partition("/")
    stem = module.removesuffix(".py")
    target = _function_with(right, made.right)
    return {
        "gold": {path: right},
        "reformatted": {path: ast.unparse(ast.parse(right)) + "\n"},
        "comments and annotations": {path: _annotate(right)},
        "renamed locals": {path: _rename_locals(right)},
        "private function and alias": {path: _alias(right, target)},
        "helper in a new module": {
            f"{package}/_{stem}_impl.py": right,
            path: f"from {package}._{stem}_impl import *\n",
        },
        "module becomes a package": {path: None, f"{package}/{stem}/__init__.py": right},
        "methods of a class": {path: _in_class(right, target)},
        "decorated": {path: _decorate(right, target)},
        "try and finally": {path: _in_try(right)},
        "other functions moved": {path: _reverse(right)},
        "with configuration": {
            path: right,
            "pyproject.toml": "[project]\nname = 'x'\nversion = '1'\n",
            "setup.cfg": "[flake8]\n",
        },
        "with tests of its own": {
            path: right,
            "tests/test_of_the_agent.py": "def test_nothing():\n    pass\n",
            "conftest.py": "\n",
        },
        "with documents and data": {
            path: right,
            "CHANGES.md": "repaired\n",
            "data/blob.bin": bytes(range(256)),
            "notes.txt": "",
        },
    }


def _files(made):
    """The files of the repository, from its stream."""
    files, text = {}, made.stream.decode()
    for part in text.split("\nM 100644 inline ")[1:]:
        name, _, rest = part.partition("\ndata ")
        size, _, content = rest.partition("\n")
        files[name] = content.encode()[: int(size)].decode()
    return files


def _function_with(text, line):
    """The name of the function that contains a line."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and line.strip() in "\n".join(
            text.splitlines()[node.lineno - 1 : node.end_lineno]
        ):
            return node.name
    raise AssertionError(line)


def _annotate(text):
    annotated = re.sub(r"^(def .*\)):$", r"\1 -> object:  # repaired", text, flags=re.MULTILINE)
    return f"from __future__ import annotations\n{annotated}\nVERSION: int = 2\n"


def _rename_locals(text):
    """Rename the names that functions assign, except parameters, which callers may use."""
    tree = ast.parse(text)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            stored -= {argument.arg for argument in function.args.args}
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and node.id in stored:
                    node.id = f"{node.id}_renamed"
    return ast.unparse(tree) + "\n"


def _alias(text, name):
    return text.replace(f"def {name}(", f"def _{name}(") + f"\n\n{name} = _{name}\n"


def _in_class(text, name):
    tree = ast.parse(text)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    tree.body.remove(function)
    body = "\n".join(f"    {line}" for line in ast.unparse(function).splitlines())
    return f"{ast.unparse(tree)}\n\nclass Helpers:\n    @staticmethod\n{body}\n\n{name} = Helpers.{name}\n"


def _decorate(text, name):
    head = "import functools\n\ndef traced(function):\n    @functools.wraps(function)\n    def call(*args, **kwargs):\n"
    head += "        return function(*args, **kwargs)\n    return call\n\n"
    return head + text.replace(f"def {name}(", f"@traced\ndef {name}(")


def _in_try(text):
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Try(node.body, [], [], [ast.Pass()])]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _reverse(text):
    """The functions in another order, with a new one between them."""
    tree = ast.parse(text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    rest = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    tree.body = [*rest, *functions[::-1], *ast.parse("def unused(*values):\n    return values\n").body]
    return ast.unparse(tree) + "\n"
