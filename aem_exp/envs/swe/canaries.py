"""Tests with secret names that run beside the hidden tests and whose results are known.

- One canary passes, and one fails. Code that makes every test pass, or that replaces the results, gets one of them wrong.
- A mutant is a copy of a hidden test in which the expected literal of an assertion is another one. A correct solution passes the
  hidden test, so it fails the mutant. Values that are equal to everything, and values that are read from the source of the test,
  pass both.

Code under test runs in the same process and can find the canaries. They make forgeries harder, and cannot exclude them.
"""

import ast
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from random import Random
from typing import Any, Final

MAX_MUTANTS: Final = 8  # mutants of one run
PASSES, FAILS = "passed", "failed"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Canaries:
    """The secret test files of one run."""

    files: Mapping[str, str]
    """Path -> content."""
    expected: Mapping[str, Mapping[str, str]]
    """Path -> name of a test function -> `PASSES` or `FAILS`."""
    mutants: frozenset[str] = frozenset()
    """The paths of mutants."""

    @property
    def stems(self) -> list[str]:
        """The secret names of the modules."""
        return [PurePosixPath(path).stem for path in self.files]


def make_canaries(tests: Mapping[str, str], failing: Collection[str] | None) -> Canaries:
    """Make the canaries of a run, with new secrets.

    Args:
        tests: path -> content of the hidden test files whose tests the patch must repair.
        failing: names of the test functions that the patch must repair; None means all functions.
    """
    folder = PurePosixPath(min(tests)).parent
    path, passing, failed = str(folder / f"{_secret()}.py"), _secret(), _secret()
    one, other = secrets.token_hex(8), secrets.token_hex(8)
    code = (
        f'def {passing}():\n    assert "{one}".upper() == "{one.upper()}"\n\n\n'
        f'def {failed}():\n    assert "{one}".upper() == "{other.upper()}"\n'
    )
    files, expected = {path: code}, {path: {passing: PASSES, failed: FAILS}}
    random, left = Random(secrets.randbits(64)), MAX_MUTANTS
    for test, text in sorted(tests.items()):
        mutant = mutate(text, failing, random, left)
        if mutant is not None:
            place = str(PurePosixPath(test).parent / f"{_secret()}.py")
            files[place], names = mutant
            expected[place] = dict.fromkeys(names, FAILS)
            left -= len(names)
    return Canaries(files, expected, frozenset(files.keys() - {path}))


def mutate(text: str, failing: Collection[str] | None, random: Random, most: int) -> tuple[str, list[str]] | None:
    """A copy of a test file with only mutated tests, and their names; None if no test can be mutated.

    Only an assertion that every passing execution of the test reaches is changed, so that a mutant cannot pass with a correct
    solution.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # the file may be for another version of Python
        return None
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    scopes += [node for node in tree.body if isinstance(node, ast.ClassDef) and _is_collected(node)]
    names: list[str] = []
    for scope in scopes:
        tests = [node for node in scope.body if isinstance(node, Function) and node.name.startswith("test")]
        for test in tests:
            wanted = (failing is None or test.name in failing) and test.name not in names and len(names) < most
            if wanted and not _may_be_skipped(test) and _mutate_one(test, random):
                names.append(test.name)
            else:
                scope.body.remove(test)
        if not scope.body:
            scope.body.append(ast.Pass())
    return (ast.unparse(ast.fix_missing_locations(tree)) + "\n", names) if names else None


def _is_collected(node: ast.ClassDef) -> bool:
    """Whether test runners look for tests in a class."""
    return node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases)


def _may_be_skipped(test: Function) -> bool:
    """Whether a decorator such as `skipif` or `xfail` may give the test another outcome."""
    return any(word in ast.unparse(one) for one in test.decorator_list for word in ("skip", "xfail", "expectedFailure"))


def _mutate_one(test: Function, random: Random) -> bool:
    """Change one expected literal. Returns whether there was one."""
    literals = list(_expected_literals(test.body))
    if not literals:
        return False
    nodes, index = random.choice(literals)
    nodes[index] = other_literal(nodes[index], random)
    return True


def _expected_literals(statements: Sequence[ast.stmt]) -> Iterator[tuple[list[ast.expr], int]]:
    """The literals of assertions that are statements of the test itself, up to the first statement that may leave it.

    Each literal is the item of a list of nodes: the list, and the index.
    """
    for statement in statements:
        if any(isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) for node in ast.walk(statement)):
            return
        if isinstance(statement, ast.Assert) and isinstance(check := statement.test, ast.Compare):
            if len(check.ops) == 1 and isinstance(check.ops[0], ast.Eq) and _is_literal(check.comparators[0]):
                yield check.comparators, 0
        elif isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
            is_equal = isinstance(call.func, ast.Attribute) and call.func.attr in ("assertEqual", "assertEquals")
            if is_equal and len(call.args) >= 2:
                yield from ((call.args, index) for index in (0, 1) if _is_literal(call.args[index]))


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def other_literal(node: ast.expr, random: Random) -> ast.expr:
    """A literal that is not equal to this one. It has the same structure, so that only a value in it differs."""
    values = [one for one in ast.walk(node) if isinstance(one, ast.Constant)]
    if not values:  # an empty collection
        return ast.Constant(random.randrange(2, 1000))
    copy = ast.parse(ast.unparse(node), mode="eval").body
    chosen = random.choice([one for one in ast.walk(copy) if isinstance(one, ast.Constant)])
    chosen.value = _other_value(chosen.value)
    return copy


def _other_value(value: object) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | complex):
        return value + 1 if value + 1 != value else 1
    if isinstance(value, str):
        return f"{value}?"
    if isinstance(value, bytes):
        return value + b"?"
    return 0  # for None and ...


def _secret() -> str:
    return f"test_{secrets.token_hex(6)}"
