"""The vocabulary of a small policy for the generated repositories: words, and whole lines that are one token each."""

import re

from aem_exp.envs.swe.bugs import ISSUES, MODULES, PACKAGES, evaluate_call, list_bugs
from aem_exp.envs.swe.tools import ToolCall

OBSERVATION_WORDS = (
    "two levels deep CHANGES md README gitignore tests test is changed ERROR Helpers for Small helpers init"
)


def words() -> list[str]:
    """All words, and the lines and paths that are one token each."""
    lines = [line for _, f, bug in list_bugs() for line in (bug.line, f.right)]
    paths = [f"{package}/{module}.py" for package in PACKAGES for module in MODULES]
    single_words = [
        word
        for text in (*_texts(), *ISSUES, OBSERVATION_WORDS, *MODULES, *PACKAGES)
        for word in re.findall(r"[^\W\d_]+|\d+|[^\w\s]", text)
    ]
    return [*_call_lines(lines, paths), *dict.fromkeys(lines), *paths, *single_words, *(str(n) for n in range(200))]


def format_call(call: ToolCall) -> str:
    """A call as a small policy writes it: one element per line, and each line is one of `words`."""
    parameters = [_format_parameter(name, value) for name, value in call.arguments.items()]
    return "\n".join([f"<function={call.tool}>", *parameters, "</function>"])


def _call_lines(lines: list[str], paths: list[str]) -> list[str]:
    """All lines of the calls that the expert makes."""
    view = ToolCall("file_editor", {"command": "view", "path": "x"})
    return [
        *(line for line in format_call(view).split("\n") if "path" not in line),
        "<parameter=command>str_replace</parameter>",
        *format_call(ToolCall("finish", {})).split("\n"),
        *(_format_parameter("path", path) for path in paths),
        *(_format_parameter(name, line) for line in lines for name in ("old_str", "new_str")),
    ]


def _texts() -> list[str]:
    """The code of all functions, their test cases, and the values that bugs give."""
    functions = [f for own in MODULES.values() for f in own]
    return [
        *(f.code.format(line=f.right) for f in functions),
        *(text for f in functions for case in f.cases for text in case),
        *(evaluate_call(f, bug.line, f.cases[0][0]) for _, f, bug in list_bugs()),
    ]


def _format_parameter(name: str, value: str) -> str:
    return f"<parameter={name}>{value}</parameter>"
