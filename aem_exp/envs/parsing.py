"""Parses a response into an action: in tags as in verl-agent (`<think>..</think><action>..</action>`), or the whole response."""

import re
from collections.abc import Callable
from typing import Final

_CHINESE: Final = re.compile(r"[\u4e00-\u9fff]")


def parse_tagged(response: str, longest: int, tail: int = 30) -> tuple[str, bool]:
    """The action in a response, and whether the response is valid.

    The first action counts. Without action tags, the action is the last `tail` characters, and the response is invalid. A
    response without thinking tags, or with Chinese characters, is invalid too.

    Args:
        longest: the action is cut to this many characters.
    """
    text = response.lower()
    _, opened, rest = text.partition("<action>")
    inside, closed, _ = rest.partition("</action>")
    tagged = bool(opened and closed)
    thought = "<think>" in text and "</think>" in text
    action = " ".join((inside if tagged else text[-tail:]).split())[:longest]
    return action, tagged and thought and _CHINESE.search(text) is None


def parse_spoken(response: str, longest: int, tail: int = 30) -> tuple[str, str, bool]:
    """The thought in front of the action tags, the action, and whether the response has these tags.

    As in `parse_tagged`, the first action counts, and a response with Chinese characters is invalid. Thinking tags are not
    needed, and they are not part of the thought.

    Args:
        longest: the action is cut to this many characters.
    """
    action, _ = parse_tagged(response, longest, tail)
    text = response.lower()
    before, opened, rest = text.partition("<action>")
    thought = " ".join(re.sub("</?think>", " ", before).split()) if opened else ""
    return thought, action, "</action>" in rest and _CHINESE.search(text) is None


def parse_bare(response: str, longest: int) -> tuple[str, bool]:
    """The whole response as the action, and whether it has at most `4 * longest` characters.

    Args:
        longest: the action is cut to this many characters.
    """
    return " ".join(response[: 4 * longest].lower().split())[:longest], len(response) <= 4 * longest


def parse_response(response: str, longest: int, tags: bool) -> tuple[str, bool]:
    """`parse_tagged` if responses must be tagged, else `parse_bare`."""
    return parse_tagged(response, longest) if tags else parse_bare(response, longest)


def write_response(action: str, tags: bool) -> str:
    """A response with this action, without a thought."""
    return f"<think></think><action>{action}</action>" if tags else action


def format_response(parse: Callable[[str], str], action: str) -> str:
    """A response that `parse` reads as this action: in tags if `parse` expects them, else the bare action."""
    tagged = write_response(action, tags=True)
    return tagged if parse(tagged).casefold() == action.casefold() else action
