"""Small git repositories with a bug, made here: an issue, a gold patch, hidden tests, and files that have nothing to do with it.

Everything follows from a name. An instance is a row in SWE-bench's format, so that it takes the way of the real ones; its
repository is a `git fast-import` stream, which any sandbox turns into the same commits.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from aem_exp.envs.swe.tools import ToolCall

PACKAGES: Final = ("ledger", "almanac", "compass", "pantry")
START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
FIRST_COMMIT_SECONDS: Final = 1_700_000_000  # seconds since 1970, of the first commit
SETUP_SCRIPT: Final = """set -e
git init -q -b main . && git fast-import --quiet --force && git checkout -q -f main
git config user.name agent && git config user.email agent@example.org"""
# No settings and no plugins of the tree, and of its modules none that has another's name: they are looked for last.
PYTEST_COMMAND: Final = (
    "python3 -P -c 'import sys, pytest; sys.path.append(\"/testbed\"); sys.exit(pytest.main())' -rA -p no:cacheprovider"
    " -c /dev/null --rootdir=/testbed --noconftest --import-mode=importlib"
)
GITIGNORE: Final = "__pycache__/\n.pytest_cache/\n"


class Bug(NamedTuple):
    """A line that is wrong, and how."""

    family: str
    line: str


class Function(NamedTuple):
    """A function with one line, `right`, that a bug can take the place of; `cases` are (call, value), and every bug changes
    the value of the first one."""

    name: str
    code: str  # with {line} in the place of it
    right: str
    bugs: tuple[Bug, ...]
    cases: tuple[tuple[str, str], ...]


def _function(code: str, right: str, bugs: Mapping[str, str], *cases: tuple[str, str]) -> Function:
    name = code.split("(", 1)[0].removeprefix("def ")
    return Function(name, code, right, tuple(Bug(*pair) for pair in bugs.items()), cases)


MODULES: Final[Mapping[str, tuple[Function, ...]]] = {
    "numbers": (
        _function(
            "def mean(values):\n    {line}\n",
            "return sum(values) / len(values)",
            {"operator": "return sum(values) * len(values)", "wrong name": "return max(values) / len(values)"},
            ("mean([2, 4, 6])", "4"),
            ("mean([1])", "1"),
        ),
        _function(
            "def clamp(value, low, high):\n    {line}\n",
            "return max(low, min(value, high))",
            {"operator": "return min(low, max(value, high))", "wrong name": "return max(low, min(value, low))"},
            ("clamp(5, 0, 9)", "5"),
            ("clamp(-3, 0, 9)", "0"),
        ),
        _function(
            "def is_leap(year):\n    {line}\n",
            "return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
            {
                "condition": "return year % 4 == 0 and year % 100 != 0",
                "operator": "return year % 4 == 0 or year % 400 == 0",
            },
            ("(is_leap(2000), is_leap(1900))", "(True, False)"),
            ("is_leap(2023)", "False"),
        ),
        _function(
            "def factorial(n):\n    product = 1\n    {line}\n        product *= k\n    return product\n",
            "for k in range(2, n + 1):",
            {"off by one": "for k in range(2, n):", "constant": "for k in range(0, n + 1):"},
            ("factorial(5)", "120"),
        ),
    ),
    "texts": (
        _function(
            "def initials(name):\n    {line}\n",
            'return "".join(word[0].upper() for word in name.split())',
            {
                "missing call": 'return "".join(word[0] for word in name.split())',
                "index": 'return "".join(word[-1].upper() for word in name.split())',
            },
            ("initials('ada lovelace')", "'AL'"),
        ),
        _function(
            "def shorten(text, most):\n    {line}\n        return text\n    return text[: most - 3] + '...'\n",
            "if len(text) <= most:",
            {"boundary": "if len(text) < most:", "constant": "if len(text) <= 3:"},
            ("shorten('seven', 5)", "'seven'"),
        ),
        _function(
            "def is_palindrome(text):\n    letters = [c.lower() for c in text if c.isalpha()]\n    {line}\n",
            "return letters == letters[::-1]",
            {"index": "return letters == letters[::1][1:]", "condition": "return letters != letters[::-1]"},
            ("is_palindrome('Never odd or even')", "True"),
        ),
        _function(
            "def count_words(text):\n    counts = {{}}\n    for word in text.lower().split():\n        {line}\n"
            "    return counts\n",
            "counts[word] = counts.get(word, 0) + 1",
            {
                "constant": "counts[word] = counts.get(word, 1) + 1",
                "wrong name": "counts[text] = counts.get(word, 0) + 1",
            },
            ("count_words('a b a')", "{'a': 2, 'b': 1}"),
        ),
    ),
    "money": (
        _function(
            "def with_tax(price, rate):\n    {line}\n",
            "return round(price * (1 + rate), 2)",
            {"operator": "return round(price * (1 - rate), 2)", "constant": "return round(price * (1 + rate), 0)"},
            ("with_tax(10.5, 0.2)", "12.6"),
        ),
        _function(
            "def discount(price, share):\n    {line}\n        raise ValueError(share)\n    return price * (1 - share)\n",
            "if not 0 <= share <= 1:",
            {"boundary": "if not 0 < share < 1:", "condition": "if 0 <= share <= 1:"},
            ("(discount(8, 0), discount(8, 1))", "(8, 0)"),
        ),
        _function(
            "def change(paid, price):\n    coins, left = [], paid - price\n    for coin in (50, 20, 10, 5, 2, 1):\n"
            "        {line}\n            coins.append(coin)\n            left -= coin\n    return coins\n",
            "while left >= coin:",
            {"boundary": "while left > coin:", "wrong name": "while paid < coin:"},
            ("change(100, 30)", "[50, 20]"),
        ),
        _function(
            "def total(prices, shipping=4):\n    {line}\n",
            "return sum(prices) + shipping if prices else 0",
            {
                "condition": "return sum(prices) + shipping",
                "operator": "return sum(prices) - shipping if prices else 0",
            },
            ("(total([]), total([2, 3]))", "(0, 9)"),
        ),
    ),
    "lists": (
        _function(
            "def chunks(items, size):\n    {line}\n",
            "return [items[i : i + size] for i in range(0, len(items), size)]",
            {
                "off by one": "return [items[i : i + size - 1] for i in range(0, len(items), size)]",
                "wrong name": "return [items[i : i + size] for i in range(0, size, size)]",
            },
            ("chunks([1, 2, 3], 2)", "[[1, 2], [3]]"),
        ),
        _function(
            "def unique(items):\n    seen, kept = set(), []\n    for item in items:\n        {line}\n"
            "            seen.add(item)\n            kept.append(item)\n    return kept\n",
            "if item not in seen:",
            {"condition": "if item in seen:", "wrong name": "if item not in items:"},
            ("unique([2, 1, 2])", "[2, 1]"),
        ),
        _function(
            "def rotate(items, by):\n    by %= len(items)\n    {line}\n",
            "return items[by:] + items[:by]",
            {"index": "return items[:by] + items[by:]", "off by one": "return items[by + 1 :] + items[: by + 1]"},
            ("rotate([1, 2, 3], 1)", "[2, 3, 1]"),
        ),
        _function(
            "def second_largest(items):\n    {line}\n",
            "return sorted(set(items))[-2]",
            {"missing call": "return sorted(items)[-2]", "index": "return sorted(set(items))[1]"},
            ("second_largest([1, 5, 7, 3, 7])", "5"),
        ),
    ),
    "dates": (
        _function(
            "def days_between(first, last):\n    {line}\n",
            "return abs((last - first).days)",
            {"missing call": "return (last - first).days", "wrong name": "return abs((last - last).days)"},
            ("days_between(date(2024, 3, 1), date(2024, 2, 1))", "29"),
        ),
        _function(
            "def is_weekend(day):\n    {line}\n",
            "return day.weekday() >= 5",
            {"boundary": "return day.weekday() > 5", "constant": "return day.weekday() >= 4"},
            ("[is_weekend(date(2024, 6, d)) for d in (7, 8, 9)]", "[False, True, True]"),
        ),
        _function(
            "def quarter(day):\n    {line}\n",
            "return (day.month - 1) // 3 + 1",
            {"off by one": "return day.month // 3 + 1", "operator": "return (day.month - 1) % 3 + 1"},
            ("[quarter(date(2024, m, 1)) for m in (3, 6, 12)]", "[1, 2, 4]"),
        ),
    ),
    "grid": (
        _function(
            "def manhattan(a, b):\n    {line}\n",
            "return abs(a[0] - b[0]) + abs(a[1] - b[1])",
            {
                "operator": "return abs(a[0] - b[0]) * abs(a[1] - b[1])",
                "index": "return abs(a[0] - b[0]) + abs(a[0] - b[1])",
            },
            ("manhattan((1, 0), (3, 4))", "6"),
        ),
        _function(
            "def neighbours(x, y):\n    {line}\n",
            "return [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]",
            {
                "operator": "return [(x + 1, y), (x + 1, y), (x, y + 1), (x, y - 1)]",
                "wrong name": "return [(x + 1, y), (x - 1, y), (y, y + 1), (x, y - 1)]",
            },
            ("neighbours(4, 7)", "[(5, 7), (3, 7), (4, 8), (4, 6)]"),
        ),
        _function(
            "def transpose(rows):\n    {line}\n",
            "return [list(column) for column in zip(*rows)]",
            {
                "missing call": "return [column for column in zip(*rows)]",
                "operator": "return [list(row) for row in rows]",
            },
            ("transpose([[1, 2], [3, 4]])", "[[1, 3], [2, 4]]"),
        ),
    ),
}
ISSUES: Final = (
    "{path}: `{call}` gives `{got}`. It should give `{value}`.",
    "`{name}` in {path} is wrong\n\nI call `{call}` and expect `{value}`, but I get `{got}`.",
    "Wrong result of `{name}`\n\nSince the last release `{call}` no longer gives `{value}` but `{got}`. See {path}.",
)


@dataclass(frozen=True)
class GeneratedInstance:
    """An instance: its row in SWE-bench's format, its repository, and where the bug is."""

    row: Mapping[str, Any]
    stream: bytes  # git fast-import
    path: str
    wrong: str  # the line as it stands
    right: str

    @property
    def family(self) -> str:
        return str(self.row["version"])


def families() -> list[str]:
    return sorted({bug.family for _, _, bug in _bugs()})


def fingerprint_parts() -> list[Any]:
    """All that decides what is made, for a fingerprint."""
    return [MODULES, ISSUES, PACKAGES, SETUP_SCRIPT, GITIGNORE, PYTEST_COMMAND]


@cache
def generate(name: str, modules: int, functions: int) -> GeneratedInstance:
    """The instance of a name.

    Args:
        modules: of the package; the bug is in one of them.
        functions: of each module.
    """
    random = Random(f"swe {name}")
    package = random.choice(PACKAGES)
    module, function, bug = random.choice(_bugs())
    others = random.sample([one for one in MODULES if one != module], modules - 1)
    chosen = {one: random.sample(MODULES[one], min(functions, len(MODULES[one]))) for one in others}
    rest = [one for one in MODULES[module] if one != function]
    mine = [function, *random.sample(rest, min(functions - 1, len(rest)))]
    random.shuffle(mine)
    chosen = dict(sorted({**chosen, module: mine}.items()))
    files = _files(package, chosen, (function, bug))
    path, test = f"{package}/{module}.py", f"tests/test_{module}.py"
    hidden = _tests(package, module, mine)
    fixed = files[path].replace(bug.line, function.right)
    call, value = function.cases[0]
    names = {one: [f"{test}::test_{one.name}_{i}" for i in range(len(one.cases))] for one in mine}
    visible = [
        f"tests/test_{one}.py::test_{f.name}_{i}" for one in others for f in chosen[one] for i in range(len(f.cases))
    ]
    broken = [
        name
        for name, (c, v) in zip(names[function], function.cases, strict=True)
        if _evaluate_call(function, bug.line, c) != v
    ]
    passing = [name for cases in names.values() for name in cases if name not in broken]
    issue = random.choice(ISSUES).format(
        name=function.name, path=path, call=call, value=value, got=_evaluate_call(function, bug.line, call)
    )
    asked = {name.partition("::")[0] for name in [*names[function], *visible]}
    stream, commit = _history(files, package)
    row = {
        "instance_id": f"made__{package}-{name}",
        "repo": f"made/{package}",
        "version": bug.family,
        "base_commit": commit,
        "problem_statement": issue,
        "patch": diff(path, files[path], fixed),
        "test_patch": diff(test, files[test], hidden),
        "FAIL_TO_PASS": json.dumps(broken),
        "PASS_TO_PASS": json.dumps([*passing, *visible]),
        "image": "host",  # the machine's own system
        "log_parser": "parse_log_pytest",
        "eval_type": "pass_and_fail",
        "eval_script": _script({name: text for name, text in sorted({**files, test: hidden}.items()) if name in asked}),
    }
    return GeneratedInstance(row, stream, path, bug.line, function.right)


@cache
def _bugs() -> list[tuple[str, Function, Bug]]:
    return [(module, f, bug) for module, functions in MODULES.items() for f in functions for bug in f.bugs]


def _evaluate_call(function: Function, line: str, call: str) -> str:
    """What a call comes to, as a person would read it: the code is ours, and runs here."""
    from datetime import date

    space: dict[str, Any] = {"date": date}
    exec(function.code.format(line=line), space)
    try:
        return repr(eval(call, space))
    except Exception as error:
        return f"{type(error).__name__}"


def _files(package: str, chosen: Mapping[str, Sequence[Function]], bugged: tuple[Function, Bug]) -> dict[str, str]:
    files = {
        ".gitignore": GITIGNORE,
        "README.md": f"# {package}\n\nSmall helpers: {', '.join(chosen)}.\n",
        "CHANGES.md": f"0.2: {', '.join(chosen)}\n0.1: first release\n",
        f"{package}/__init__.py": '"""Small helpers."""\n\n__version__ = "0.2"\n',
    }
    for module, functions in chosen.items():
        code = [f.code.format(line=bugged[1].line if f == bugged[0] else f.right) for f in functions]
        files[f"{package}/{module}.py"] = f'"""Helpers for {module}."""\n\n\n' + "\n\n".join(code)
        files[f"tests/test_{module}.py"] = _tests(package, module, [f for f in functions if f != bugged[0]])
    return files


def _tests(package: str, module: str, functions: Sequence[Function]) -> str:
    dates = "from datetime import date\n\n" if module == "dates" else ""
    return f"{dates}from {package}.{module} import *\n" + "".join(
        f"\n\ndef test_{f.name}_{i}():\n    assert {call} == {value}\n"
        for f in functions
        for i, (call, value) in enumerate(f.cases)
    )


def _script(files: Mapping[str, str]) -> str:
    """As SWE-bench's, for a tree that a patch has made: all tests are ours, git (whose hooks may not be) is not asked, and of
    what lies there nothing but the package is heeded."""
    written = [f"cat > {name} <<'EOF_TESTS'\n{text}EOF_TESTS" for name, text in files.items()]
    return "\n".join(
        [
            "cd /testbed",
            "rm -rf tests && mkdir tests",
            *written,
            f": '{START}'",
            f"{PYTEST_COMMAND} {' '.join(files)}",
            f": '{END}'",
        ]
    )


def diff(path: str, old: str, new: str) -> str:
    """A patch of one file, as git writes it."""
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)


def _history(files: Mapping[str, str], package: str) -> tuple[bytes, str]:
    """Two commits of somebody else's, as a stream, and the id of the second. None is without the bug."""
    later = {name for name in files if name.startswith("tests/") or name == "CHANGES.md"}
    first = {name: text for name, text in files.items() if name not in later}
    stream, parent = b"", ""
    for number, (told, said) in enumerate(((first, f"{package} 0.1"), (files, "tests, and what has changed"))):
        who = f"Robin <robin@example.org> {FIRST_COMMIT_SECONDS + 86_400 * number} +0000"
        head = "".join(
            [f"tree {_tree_id(told)}\n", f"parent {parent}\n" if parent else "", f"author {who}\ncommitter {who}\n"]
        )
        parent = _object_id("commit", f"{head}\n{said}".encode())
        changes = b"".join(
            b"M 100644 inline %s\n%s" % (name.encode(), _data_block(text)) for name, text in sorted(told.items())
        )
        stream += f"commit refs/heads/main\nauthor {who}\ncommitter {who}\n".encode() + _data_block(said) + changes
    return stream + b"done\n", parent


def _data_block(text: str) -> bytes:
    return b"data %d\n%s\n" % (len(text.encode()), text.encode())


def _tree_id(files: Mapping[str, str]) -> str:
    """The id that git gives to a folder of files."""
    folders: dict[str, dict[str, str]] = {}
    entries = []
    for name, text in files.items():
        head, _, rest = name.partition("/")
        if rest:
            folders.setdefault(head, {})[rest] = text
        else:
            entries.append((name, b"100644 %s\0" % name.encode() + bytes.fromhex(_object_id("blob", text.encode()))))
    entries += [
        (f"{name}/", b"40000 %s\0" % name.encode() + bytes.fromhex(_tree_id(inside)))
        for name, inside in folders.items()
    ]
    return _object_id("tree", b"".join(entry for _, entry in sorted(entries)))


def _object_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content, usedforsecurity=False).hexdigest()


# What a policy made here reads and writes. Its tokens are words, or whole wordings: code is written line by line.


def words() -> list[str]:
    """All words, and the wordings that are one token each."""
    from aem_exp.envs.swe.tools import ToolCall

    lines = [line for _, f, bug in _bugs() for line in (bug.line, f.right)]
    paths = [f"{package}/{module}.py" for package in PACKAGES for module in MODULES]
    editor = ToolCall("file_editor", {"command": "view", "path": "x"})
    tags = [line for line in format_call(editor).split("\n") if "path" not in line]
    tags += ["<parameter=command>str_replace</parameter>", *format_call(ToolCall("finish", {})).split("\n")]
    tags += [_format_parameter("path", path) for path in paths]
    tags += [_format_parameter(name, line) for line in lines for name in ("old_str", "new_str")]
    texts = [f.code.format(line=f.right) for functions in MODULES.values() for f in functions]
    texts += [text for functions in MODULES.values() for f in functions for case in f.cases for text in case]
    texts += [_evaluate_call(f, bug.line, f.cases[0][0]) for _, f, bug in _bugs()]
    said_too = "two levels deep CHANGES md README gitignore tests test is changed ERROR Helpers for Small helpers init"
    loose = [
        word
        for text in (*texts, *ISSUES, said_too, *MODULES, *PACKAGES)
        for word in re.findall(r"[^\W\d_]+|\d+|[^\w\s]", text)
    ]
    return [*tags, *dict.fromkeys(lines), *paths, *loose, *(str(n) for n in range(200))]


def format_call(call: "ToolCall") -> str:
    """A call as a policy of such words writes it: an element to a line, each of which is one of them."""
    given = [_format_parameter(name, value) for name, value in call.arguments.items()]
    return "\n".join([f"<function={call.tool}>", *given, "</function>"])


def _format_parameter(name: str, value: str) -> str:
    return f"<parameter={name}>{value}</parameter>"


def find_path(issue: str) -> str:
    """The file that an issue speaks of."""
    found = re.search(r"\w+/\w+\.py", issue)
    assert found, issue
    return found[0]


def find_wrong_line(text: str) -> tuple[str, str] | None:
    """A line that is wrong in what was shown, and what it should be."""
    return next(((bug.line, f.right) for _, f, bug in _bugs() if bug.line in text), None)


def choose_wrong_line(wrong: str, random: Random) -> str:
    """Another wrong line for the same place."""
    return random.choice(
        [bug.line for _, f, one in _bugs() if one.line == wrong for bug in f.bugs if bug.line != wrong]
    )


def choose_path(random: Random) -> str:
    return f"{random.choice(PACKAGES)}/{random.choice(list(MODULES))}.py"
