"""How environments parse a response into an action: in tags, as verl-agent does (`<think>..</think><action>..</action>`),
or as the whole response.
"""

import re
from collections.abc import Callable
from typing import Final

_CHINESE: Final = re.compile(r"[\u4e00-\u9fff]")


def parse_tagged(response: str, longest: int, tail: int = 30) -> tuple[str, bool]:
    """The action that a response asks for, and whether it has the form.

    Of several actions the first counts; without tags it is the end of the response, `tail` characters of it, and invalid.
    Invalid too: no thinking, or Chinese.
    """
    text = response.lower()
    _, opened, rest = text.partition("<action>")
    inside, closed, _ = rest.partition("</action>")
    tagged = bool(opened and closed)
    thought = "<think>" in text and "</think>" in text
    action = " ".join((inside if tagged else text[-tail:]).split())[:longest]
    return action, tagged and thought and _CHINESE.search(text) is None


def parse_bare(response: str, longest: int) -> tuple[str, bool]:
    """The whole response as the action, and whether it is short enough for one."""
    return " ".join(response[: 4 * longest].lower().split())[:longest], len(response) <= 4 * longest


def format_response(parse: Callable[[str], str], action: str) -> str:
    """A response that a world reads as the action, by its `parse`: in tags where it looks for those, else bare."""
    tags = f"<think></think><action>{action}</action>"
    return tags if parse(tags).casefold() == action.casefold() else action
