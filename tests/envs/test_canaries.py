"""Canaries and protected paths: pure functions of paths and of the source of tests."""

import ast
from random import Random

import pytest

from aem_exp.envs.swe import canaries, protected
from aem_exp.envs.swe.audited import read_report

TESTS = """
import pytest, unittest

def test_plain():
    value = 2
    assert value == 2
    assert [value, (value,)] == [2, (2,)]

@pytest.mark.skipif(True, reason="")
def test_may_be_skipped():
    assert 1 == 1

def test_no_literal():
    assert 1 < 2

def test_may_leave():
    if pytest:
        return
    assert 1 == 1

def test_in_a_loop():
    for x in []:
        assert x == 3

def test_left_out():
    assert 1 == 1

class TestGroup(unittest.TestCase):
    def setUp(self):
        self.value = "a"

    def test_unittest(self):
        self.assertEqual(self.value, "a")
"""


def run(source, name):
    """Run one test function of a module."""
    scope = {}
    exec(compile(source, "mutant", "exec"), scope)
    if name == "test_unittest":
        case = scope["TestGroup"](name)
        case.setUp()
        getattr(case, name)()
    else:
        scope[name]()


@pytest.mark.parametrize("seed", range(8))
def test_a_mutant_fails_where_the_test_passes(seed):
    wanted = [
        "test_plain",
        "test_may_be_skipped",
        "test_no_literal",
        "test_may_leave",
        "test_in_a_loop",
        "test_unittest",
    ]
    source, names = canaries.mutate(TESTS, wanted, Random(seed), most=8)
    assert names == ["test_plain", "test_unittest"]
    assert [n.name for n in ast.walk(ast.parse(source)) if getattr(n, "name", "").startswith("test")] == names
    for name in names:
        run(TESTS, name)
        with pytest.raises(AssertionError):
            run(source, name)


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "1.5",
        "1e300",
        "True",
        "None",
        "...",
        "'a'",
        "b'a'",
        "''",
        "[]",
        "()",
        "{}",
        "[1, [2, 'x']]",
        "{1: 'a'}",
        "{1, 2}",
    ],
)
def test_another_literal_differs(text):
    for seed in range(10):
        other = ast.literal_eval(canaries.other_literal(ast.parse(text, mode="eval").body, Random(seed)))
        value = ast.literal_eval(text)
        assert other != value
        if isinstance(value, list) and value:
            assert len(other) == len(value)  # lists of other lengths differ, whatever their items are equal to


def test_canaries_have_new_secrets_and_known_results():
    one, other = (canaries.make_canaries({"tests/test_a.py": TESTS}, None) for _ in range(2))
    assert not set(one.stems) & set(other.stems)
    assert all(path.startswith("tests/test_") for path in one.files)
    (mutant,) = one.mutants
    outcomes = {name: outcome for path, names in one.expected.items() for name, outcome in names.items()}
    assert sorted(outcomes.values()).count("passed") == 1 and set(one.expected[mutant].values()) == {"failed"}
    (canary,) = one.files.keys() - one.mutants
    for name, outcome in one.expected[canary].items():
        if outcome == "passed":
            run(one.files[canary], name)
        else:
            with pytest.raises(AssertionError):
                run(one.files[canary], name)


def test_a_file_that_cannot_be_parsed_has_no_mutant():
    assert canaries.mutate("print 'Python 2'", None, Random(0), 8) is None
    assert not canaries.make_canaries({"tests/test_a.py": "print 'Python 2'"}, None).mutants


@pytest.mark.parametrize(
    "path",
    [
        *(
            "conftest.py",
            "ledger/conftest.py",
            "pytest.ini",
            ".pytest.ini",
            "pytest.toml",
            "tox.ini",
            "setup.cfg",
            "setup.py",
        ),
        *("pyproject.toml", "sitecustomize.py", "usercustomize.py", "lib/x.pth", "x.dist-info/RECORD", "X.egg-info/a"),
        *("pytest.py", "_pytest/__init__.py", "src/pluggy.py", "argparse.py", "lib/json/__init__.py", "tests/a.py"),
        *(
            "ledger/test_x.py",
            "ledger/x_test.py",
            "ledger/tests/data.json",
            ".gitattributes",
            "a/.git/config",
            "a/b.pyc",
        ),
    ],
)
def test_a_path_that_decides_how_tests_run_is_protected(path):
    assert protected.is_protected(path)
    assert protected.protected_paths([path, "ledger/a.py"]) == [path]
    assert protected.protected_paths([path], allowed=[path]) == []


@pytest.mark.parametrize(
    "path",
    [
        "ledger/money.py",
        "ledger/json.py",
        "README.md",
        "docs/conf.py",
        "src/ledger/types.py",
        "testbed/x.py",
        "contest.py",
    ],
)
def test_the_source_of_a_package_is_not_protected(path):
    assert not protected.is_protected(path)


def test_the_paths_of_a_patch():
    patch = "diff --git a/x y.py b/x y.py\nrename\ndiff --git a/old.py b/new.py\n--- a/old.py\n+++ b/new.py\n"
    assert protected.patched_paths(patch) == {"x y.py", "old.py", "new.py"}


@pytest.mark.parametrize("text", [b"", b"<a", b"\xff\xfe", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"<a></b>"])
def test_a_report_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError):
        read_report(text)


def test_outcomes_of_a_report():
    case = '<testcase classname="tests.test_a.TestB" name="test_{}">{}</testcase>'
    inside = {
        "passed": "",
        "failed": "<failure/>",
        "broken": "<error/>",
        "skipped": '<skipped type="pytest.skip"/>',
        "expected": '<skipped type="pytest.xfail"/>',
    }
    text = f"<testsuites><testsuite>{''.join(case.format(*pair) for pair in inside.items())}</testsuite></testsuites>"
    assert [one.outcome for one in read_report(text.encode())] == ["passed", "failed", "failed", "other", "passed"]
