"""The audited grade: runs the hidden tests together with canaries, and believes the result only if independent records agree.

- The script that prepares the tests and the tests are two commands, so that no process of the first one is alive during the
  second, and the exit code is that of the tests.
- pytest's exit code is 1, because a canary fails.
- In pytest's own report (JUnit XML), each canary occurs once with its known result, and each test of the row passed.
- The benchmark's rule on the log says `resolved`.

In a suite of another runner (Django, SymPy), no canary can run. It gets the first rule, the exit code 0, and the benchmark's
rule. Its tests run once more with other expected values, and must then fail.
"""

import re
import secrets
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import PurePosixPath
from random import Random
from typing import Final
from xml.etree import ElementTree

from aem_exp.envs.swe import official, patch
from aem_exp.envs.swe.canaries import FAILS, MAX_MUTANTS, PASSES, Canaries, make_canaries, mutate
from aem_exp.envs.swe.official import Verdict
from aem_exp.envs.swe.protected import is_test
from aem_exp.envs.swe.rows import Instance
from aem_exp.sandboxes import CommandResult, Sandbox, SandboxBroken

START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
_MARKED: Final = re.compile(rf"(.*)^: '{START}'\n(.*)^: '{END}'$", re.MULTILINE | re.DOTALL)
_EXIT_CODE: Final = re.compile(r"^SWEBENCH_TEST_EXIT_CODE=.*\n", re.MULTILINE)
_PYTEST: Final = re.compile(r"\b(pytest|py\.test)\b")
R2E_TESTS_COMMAND: Final = "cat /root/run_tests.sh; printf '\\0'; cd r2e_tests && find . -name '*.py' -printf '%P\\0'"
UNTAR: Final = "tar --extract --file=- --no-same-owner || exit 125"
OTHER: Final = "other"  # the outcome of a test that neither passed nor failed
XFAIL: Final = "pytest.xfail"  # counts as passed in SWE-bench


@dataclass(frozen=True)
class Audit:
    """The result of an audited run of the tests."""

    verdict: Verdict
    """The benchmark's verdict on the log of this run."""
    doubt: str = ""
    """Why the result is not believed; empty if all records agree."""
    has_canaries: bool = True
    """Whether canaries could run beside the tests."""
    log: str = ""
    """The log of the tests."""

    @property
    def resolved(self) -> bool:
        return self.verdict == "resolved" and not self.doubt


@dataclass(frozen=True)
class Suite:
    """How to run the hidden tests of a row."""

    before: str
    """The script that prepares the repository."""
    command: str
    """The script that runs the tests."""
    files: tuple[str, ...]
    """The test files with tests that the patch must repair."""
    failing: frozenset[str]
    """Names of the functions of these tests."""
    expected: tuple[str, ...]
    """Names of all tests that must pass, as the benchmark writes them."""
    is_pytest: bool


@dataclass(frozen=True)
class TestCase:
    """A test in pytest's report."""

    classname: str
    """The module and the classes, with dots."""
    name: str
    """The function, with its parameters in brackets."""
    outcome: str
    """`passed`, `failed` or `other`."""


def audit_patch(sandbox: Sandbox, instance: Instance, agent_patch: bytes, seconds: float) -> Audit:
    """Apply a patch in a fresh, prepared sandbox, and run the tests with canaries.

    Args:
        sandbox: a fresh sandbox, after `official.prepare`.
        seconds: time limit of the tests.

    Raises:
        SandboxLost: the sandbox was lost, so there is no verdict.
    """
    if not agent_patch.strip():
        return Audit("no_patch")
    if not official.apply_patch(sandbox, agent_patch):
        return Audit("not_applied")
    try:
        return _run(sandbox, instance, find_suite(sandbox, instance), seconds)
    except SandboxBroken as broken:
        return Audit("tests_fail", log=str(broken))


def find_suite(sandbox: Sandbox, instance: Instance) -> Suite:
    """The tests of a row. In the format of R2E-Gym, they lie in the image."""
    if instance.format == "r2e":
        script, *names = sandbox.run(R2E_TESTS_COMMAND, official.APPLY_SECONDS).text.split("\0")
        passing = [name for name, status in official.expected_statuses(instance).items() if status == "PASSED"]
        tests = tuple(f"r2e_tests/{name}" for name in names if name)
        return Suite("", official.R2E_COMMAND, tests, _functions(passing), tuple(passing), bool(_PYTEST.search(script)))
    spec = official.make_spec(instance)
    marked = _MARKED.search(spec.eval_script)
    before, command = marked.groups() if marked else ("", spec.eval_script)
    failing = spec.FAIL_TO_PASS
    command = _EXIT_CODE.sub("", command)
    files = {name.partition("::")[0] for name in failing if "::" in name}
    is_pytest = marked is not None and bool(files) and bool(_PYTEST.search(command))
    files |= set() if is_pytest else _named_files(command)
    expected = (*failing, *spec.PASS_TO_PASS)
    return Suite(before, command, tuple(sorted(files)), _functions(failing), expected, is_pytest)


def _functions(tests: Iterable[str]) -> frozenset[str]:
    """The names of test functions, without their file, class and parameters."""
    return frozenset(re.split(r"::|\.", test.partition("[")[0].split(" ")[0])[-1] for test in tests)


def _named_files(command: str) -> set[str]:
    """The test files that a command names, by their paths, or as modules in `tests` (Django)."""
    paths = {word for word in re.findall(r"[\w./-]+\.py\b", command) if is_test(word)}
    return paths | {f"tests/{word.replace('.', '/')}.py" for word in re.findall(r"(?<=\s)\w+(?:\.\w+)+(?=\s)", command)}


def _run(sandbox: Sandbox, instance: Instance, suite: Suite, seconds: float) -> Audit:
    begun, state, hidden = prepare_tests(sandbox, suite, seconds)
    if begun.stop_reason:
        return Audit("tests_timeout" if begun.stop_reason == "time" else "tests_fail", log=begun.text)
    tests = {path: file.content.decode(errors="replace") for path, file in hidden.items()}
    if not suite.is_pytest:
        return _run_twice(sandbox, instance, suite, begun.text, state, tests, seconds)
    if not tests:  # the patch made the script fail before it wrote the tests
        return Audit("tests_fail", log=begun.text)
    canaries, report = make_canaries(tests, suite.failing), f"/tmp/{secrets.token_hex(8)}.xml"
    options = f"--junitxml={report} -o junit_family=xunit1 {' '.join(canaries.files)}"
    mark = secrets.token_hex(16)
    watched = f'{state}export PYTEST_ADDOPTS="${{PYTEST_ADDOPTS:-}} {options}"\nexec < /dev/null\n{suite.command}'
    script = f"{UNTAR}\n{watched}\ncode=$?; echo; echo {mark}; cat {report}; exit $code"
    ran = sandbox.run(script, seconds, _tar(canaries.files))
    output, _, records = ran.output.rpartition(f"\n{mark}\n".encode())
    doubt = "" if ran.stop_reason else _find_doubt(records, ran.code, suite, canaries)
    return _judge(instance, begun.text, replace(ran, output=output or ran.output), canaries.stems, doubt)


def _run_twice(
    sandbox: Sandbox,
    instance: Instance,
    suite: Suite,
    before: str,
    state: str,
    tests: Mapping[str, str],
    seconds: float,
) -> Audit:
    """Run a suite in which no canary can run, and run it again with other expected values if it passes."""
    ran = sandbox.run(f"{state}{suite.command}", seconds)
    doubt = f"the tests end with exit code {ran.code}" if ran.code else ""
    audit = _judge(instance, before, ran, [], doubt, has_canaries=False)
    random = Random(secrets.randbits(64))
    mutants = {path: mutate(text, suite.failing, random, MAX_MUTANTS) for path, text in tests.items()}
    files = {path: mutant[0] for path, mutant in mutants.items() if mutant}
    if not audit.resolved or not files:
        return audit
    again = sandbox.run(f"{UNTAR}\n{state}{suite.command}", seconds, _tar(files))
    return audit if again.code else replace(audit, doubt="the tests also pass with other expected values")


def prepare_tests(sandbox: Sandbox, suite: Suite, seconds: float) -> tuple[CommandResult, str, dict[str, patch.File]]:
    """Run the script before the tests: its result, the variables and the folder that it leaves, and the hidden test files."""
    mark, end = secrets.token_hex(16), secrets.token_hex(16)
    names = patch.printf_names(suite.files)
    script = (
        f"{suite.before}\n{{ set +x; }} 2>/dev/null\nprintf '\\n%s\\n' {mark}\nexport -p; printf 'cd -- %q\\n' \"$PWD\"\n"
        f"printf '%s\\n' {end}\ncd {sandbox.workdir}; printf '{names}' | {patch.COPY_COMMAND}\n"
    )
    ran = sandbox.run(
        f"cat > {official.SCRIPT_FILE} && bash {official.SCRIPT_FILE} < /dev/null", seconds, script.encode()
    )
    output, _, rest = ran.output.rpartition(f"\n{mark}\n".encode())
    state, _, archive = rest.partition(f"{end}\n".encode())
    begun = CommandResult(output, ran.code, ran.stop_reason, ran.seconds)
    try:
        hidden = patch.parse_archive(archive, suite.files) if archive else {}
    except patch.UnreadableChanges:
        hidden = {}
    return begun, state.decode(errors="replace"), hidden


def _judge(
    instance: Instance, before: str, ran: CommandResult, secret: list[str], doubt: str, has_canaries: bool = True
) -> Audit:
    lines = [line for line in ran.text.splitlines() if not any(name in line for name in secret)]
    log = "\n".join([before, START, *lines, END, ""])
    if ran.stop_reason:
        return Audit("tests_timeout" if ran.stop_reason == "time" else "tests_fail", log=log)
    verdict, log = official.parse_verdict(instance, log)
    return Audit(verdict, doubt, has_canaries, log)


def _find_doubt(report: bytes, code: int, suite: Suite, canaries: Canaries) -> str:
    """Why a run of pytest is not believed; empty if its exit code and its report are as expected."""
    if code != 1:
        return f"pytest ended with exit code {code}, but a canary must fail"
    try:
        cases = read_report(report)
    except ValueError as error:
        return f"pytest's report cannot be read: {error}"
    return _check_canaries(cases, canaries) or _check_tests(cases, suite.expected)


def read_report(text: bytes) -> list[TestCase]:
    """The tests in a JUnit report. Raises ValueError if it is not one."""
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:  # pytest writes none, and entities can expand without limit
        raise ValueError("it has a document type")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from error
    cases = []
    for node in root.iter("testcase"):
        kinds = {child.tag: child.get("type") for child in node}
        failed = "failure" in kinds or "error" in kinds
        other = "skipped" in kinds and kinds["skipped"] != XFAIL
        outcome = FAILS if failed else OTHER if other else PASSES
        cases.append(TestCase(node.get("classname", ""), node.get("name", ""), outcome))
    return cases


def _check_canaries(cases: Iterable[TestCase], canaries: Canaries) -> str:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case in cases:
        for part in case.classname.split("."):
            found[part, case.name.partition("[")[0]].append(case.outcome)
    for path, functions in canaries.expected.items():
        kind = "mutant" if path in canaries.mutants else "canary"
        for name, outcome in functions.items():
            outcomes = found[PurePosixPath(path).stem, name]
            if not outcomes or (kind == "canary" and len(outcomes) > 1):
                return f"pytest's report has a {kind} {len(outcomes)} times"
            if set(outcomes) != {outcome}:
                return f"a {kind} that must have {outcome} has {', '.join(sorted(set(outcomes) - {outcome}))}"
    return ""


def _check_tests(cases: Iterable[TestCase], expected: Iterable[str]) -> str:
    """Why a test of the row is not believed to have passed. Names are compared without what the benchmark cuts off."""
    by_function: dict[str, list[TestCase]] = defaultdict(list)
    for case in cases:
        by_function[case.name.partition("[")[0]].append(case)
    for test in expected:
        *scopes, name = test.split("::") if "::" in test else re.split(r"\.(?![^\[]*\])", test)
        owner = [PurePosixPath(scopes[0]).stem, *scopes[1:]] if scopes and scopes[0].endswith(".py") else scopes
        found = [
            case
            for case in by_function[name.partition("[")[0]]
            if case.name.startswith(name) and f".{case.classname}".endswith("".join(f".{scope}" for scope in owner))
        ]
        exact = [case for case in found if case.name == name] or found
        if not exact:
            return f"pytest's report lacks {test}"
        if not any(case.outcome == PASSES for case in exact):
            return f"pytest's report says that {test} did not pass"
    return ""


def _tar(files: Mapping[str, str]) -> bytes:
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data := text.encode(errors="replace"))
            archive.addfile(member, BytesIO(data))
    return stream.getvalue()
