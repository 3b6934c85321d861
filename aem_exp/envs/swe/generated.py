"""Generates a small git repository with one bug from a name, with an issue, a gold patch and hidden tests.

An instance is a row in SWE-bench's format and is handled like a real one. Its repository is a `git fast-import` stream, from
which every sandbox makes the same commits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Final

from aem_exp.envs.swe.bugs import ISSUES, MODULES, PACKAGES, Bug, Function, evaluate_call, list_bugs
from aem_exp.envs.swe.git_objects import build_history, diff

START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
SETUP_SCRIPT: Final = """set -e
git init -q -b main . && git fast-import --quiet --force && git checkout -q -f main
git config user.name agent && git config user.email agent@example.org"""
# Ignores pytest settings and plugins in the repository. Its modules come last on the path, so they shadow no other module.
PYTEST_COMMAND: Final = (
    "python3 -P -c 'import sys, pytest; sys.path.append(\"/testbed\"); sys.exit(pytest.main())' -rA -p no:cacheprovider"
    " -c /dev/null --rootdir=/testbed --noconftest --import-mode=importlib"
)
GITIGNORE: Final = "__pycache__/\n.pytest_cache/\n"


@dataclass(frozen=True)
class GeneratedInstance:
    """An instance: its row, its repository, and the place of the bug."""

    row: Mapping[str, Any]
    """The row in SWE-bench's format."""
    stream: bytes
    """The repository, for `git fast-import`."""
    path: str
    """The file with the bug."""
    wrong: str
    """The line with the bug."""
    right: str
    """The correct line."""

    @property
    def family(self) -> str:
        return str(self.row["version"])


def families() -> list[str]:
    """The kinds of bugs, which are also the kinds of tasks."""
    return sorted({bug.family for _, _, bug in list_bugs()})


def fingerprint_parts() -> list[Any]:
    """All data that decides the repositories, for a fingerprint."""
    return [MODULES, ISSUES, PACKAGES, SETUP_SCRIPT, GITIGNORE, PYTEST_COMMAND]


@cache
def generate_repository(name: str, modules: int, functions: int) -> GeneratedInstance:
    """The instance of a name.

    Args:
        modules: number of modules in the package; the bug is in one of them.
        functions: largest number of functions in a module.
    """
    random = Random(f"swe {name}")
    package = random.choice(PACKAGES)
    module, function, bug = random.choice(list_bugs())
    own, others = _draw_functions(module, function, modules, functions, random)
    files = _files(package, dict(sorted({**others, module: own}.items())), function, bug)
    path, test = f"{package}/{module}.py", f"tests/test_{module}.py"
    hidden_tests = _tests(package, module, own)
    call, value = function.cases[0]
    issue = random.choice(ISSUES).format(
        name=function.name, path=path, call=call, value=value, got=evaluate_call(function, bug.line, call)
    )
    failing = _failing_tests(module, function, bug)
    passing = [test_name for f in own for test_name in _test_names(module, f) if test_name not in failing]
    passing += [test_name for other in others for f in others[other] for test_name in _test_names(other, f)]
    later = {file for file in files if file.startswith("tests/") or file == "CHANGES.md"}
    first = {file: text for file, text in files.items() if file not in later}
    stream, commit = build_history([(first, f"{package} 0.1"), (files, "tests, and what has changed")])
    row = {
        "instance_id": f"made__{package}-{name}",
        "repo": f"made/{package}",
        "version": bug.family,
        "base_commit": commit,
        "problem_statement": issue,
        "patch": diff(path, files[path], files[path].replace(bug.line, function.right)),
        "test_patch": diff(test, files[test], hidden_tests),
        "FAIL_TO_PASS": json.dumps(failing),
        "PASS_TO_PASS": json.dumps(passing),
        "image": "host",  # the machine's own system; `Made` replaces it
        "log_parser": "parse_log_pytest",
        "eval_type": "pass_and_fail",
        "eval_script": _eval_script({**files, test: hidden_tests}),
    }
    return GeneratedInstance(row, stream, path, bug.line, function.right)


def _draw_functions(
    module: str, function: Function, modules: int, functions: int, random: Random
) -> tuple[list[Function], dict[str, list[Function]]]:
    """The functions of the module with the bug, and of other modules."""
    other_modules = random.sample([other for other in MODULES if other != module], modules - 1)
    others = {other: random.sample(MODULES[other], min(functions, len(MODULES[other]))) for other in other_modules}
    rest = [other for other in MODULES[module] if other != function]
    own = [function, *random.sample(rest, min(functions - 1, len(rest)))]
    random.shuffle(own)
    return own, others


def _test_names(module: str, function: Function) -> list[str]:
    """pytest's names for the tests of a function, one for each case."""
    return [f"tests/test_{module}.py::test_{function.name}_{i}" for i in range(len(function.cases))]


def _failing_tests(module: str, function: Function, bug: Bug) -> list[str]:
    """The tests that fail because of the bug."""
    pairs = zip(_test_names(module, function), function.cases, strict=True)
    return [name for name, (call, value) in pairs if evaluate_call(function, bug.line, call) != value]


def _files(package: str, chosen: Mapping[str, Sequence[Function]], function: Function, bug: Bug) -> dict[str, str]:
    """The files of the repository. The function with the bug has no test in them."""
    files = {
        ".gitignore": GITIGNORE,
        "README.md": f"# {package}\n\nSmall helpers: {', '.join(chosen)}.\n",
        "CHANGES.md": f"0.2: {', '.join(chosen)}\n0.1: first release\n",
        f"{package}/__init__.py": '"""Small helpers."""\n\n__version__ = "0.2"\n',
    }
    for module, functions in chosen.items():
        code = [f.code.format(line=bug.line if f == function else f.right) for f in functions]
        files[f"{package}/{module}.py"] = f'"""Helpers for {module}."""\n\n\n' + "\n\n".join(code)
        files[f"tests/test_{module}.py"] = _tests(package, module, [f for f in functions if f != function])
    return files


def _tests(package: str, module: str, functions: Sequence[Function]) -> str:
    """The content of the test file of a module."""
    dates = "from datetime import date\n\n" if module == "dates" else ""
    return f"{dates}from {package}.{module} import *\n" + "".join(
        f"\n\ndef test_{f.name}_{i}():\n    assert {call} == {value}\n"
        for f in functions
        for i, (call, value) in enumerate(f.cases)
    )


def _eval_script(files: Mapping[str, str]) -> str:
    """A script like SWE-bench's, which runs the hidden tests in a patched repository.

    It does not run git, because the patch may have written git hooks. It uses only the package of the repository.
    """
    tests = {name: text for name, text in sorted(files.items()) if name.startswith("tests/")}
    written = [f"cat > {name} <<'EOF_TESTS'\n{text}EOF_TESTS" for name, text in tests.items()]
    return "\n".join(
        [
            "cd /testbed",
            "rm -rf tests && mkdir tests",
            *written,
            f": '{START}'",
            f"{PYTEST_COMMAND} {' '.join(tests)}",
            f": '{END}'",
        ]
    )
