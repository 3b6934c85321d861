"""A list of bugs: small functions, and for each function lines that are wrong in a known way.

`generated` makes repositories of this data. All of it is part of a world's fingerprint.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

PACKAGES: Final = ("ledger", "almanac", "compass", "pantry")
ISSUES: Final = (
    "{path}: `{call}` gives `{got}`. It should give `{value}`.",
    "`{name}` in {path} is wrong\n\nI call `{call}` and expect `{value}`, but I get `{got}`.",
    "Wrong result of `{name}`\n\nSince the last release `{call}` no longer gives `{value}` but `{got}`. See {path}.",
)


class Bug(NamedTuple):
    """A wrong line, and the kind of its bug (`family`)."""

    family: str
    line: str


class Function(NamedTuple):
    """A function with one line that a bug can replace."""

    name: str
    code: str
    """The source, with {line} at the place of the line."""
    right: str
    """The correct line."""
    bugs: tuple[Bug, ...]
    cases: tuple[tuple[str, str], ...]
    """Test cases (call, value). Every bug changes the value of the first one."""


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


@cache
def list_bugs() -> list[tuple[str, Function, Bug]]:
    """All bugs, with the module and the function of each."""
    return [(module, f, bug) for module, functions in MODULES.items() for f in functions for bug in f.bugs]


def evaluate_call(function: Function, line: str, call: str) -> str:
    """The `repr` of the value of a call, with this line in the function, or the name of the exception that it raises."""
    from datetime import date

    namespace: dict[str, Any] = {"date": date}
    exec(function.code.format(line=line), namespace)
    try:
        return repr(eval(call, namespace))
    except Exception as error:
        return f"{type(error).__name__}"
