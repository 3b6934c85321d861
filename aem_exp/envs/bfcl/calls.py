"""Reads function calls from a response. Nothing is evaluated: an argument must be a literal."""

import ast
from dataclasses import dataclass
from typing import Any, Final

MAX_CHARACTERS: Final = 20_000  # longest text of calls


@dataclass(frozen=True)
class Call:
    """A function call."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_text(response: str) -> str:
    """The part of a response that may contain calls: without thinking, and without a code fence."""
    text = response.rpartition("</think>")[2].strip()
    if text.startswith("```"):
        text = text.removeprefix("```").removeprefix("python").removeprefix("json").removesuffix("```")
    return text.strip("`\n ")


def parse_calls(response: str) -> list[Call] | None:
    """The calls in a response such as `[cd(folder='a'), ls()]`, with or without brackets; None if it is no list of calls.

    Unlike in the benchmark, an argument cannot be a call itself.
    """
    text = find_text(response)
    if not text or len(text) > MAX_CHARACTERS or "\0" in text:
        return None
    text = f"{'' if text.startswith('[') else '['}{text}{'' if text.endswith(']') else ']'}"
    try:
        listed = ast.parse(text, mode="eval").body
        assert isinstance(listed, ast.List)
        return [_read_call(node) for node in listed.elts]
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
        return None


def _read_call(node: ast.expr) -> Call:
    """Raises: AssertionError, ValueError: it is no call, or an argument is no literal."""
    assert isinstance(node, ast.Call)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    assert name and all(keyword.arg for keyword in node.keywords)
    kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return Call(name, tuple(ast.literal_eval(value) for value in node.args), kwargs)
