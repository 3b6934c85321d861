"""The scripted expert of the generated repositories: it views the file that the issue names and knows all wrong lines."""

import re
from random import Random

from aem_exp.envs.swe.bugs import MODULES, PACKAGES, list_bugs
from aem_exp.envs.swe.tools import ToolCall
from aem_exp.envs.swe.vocabulary import format_call


def next_response(issue: str, observation: str, turns_taken: int, random: Random, noise: float, shyness: float) -> str:
    """The next response: view the file, replace the line, finish. See `Made.expert` for `noise` and `shyness`."""
    path, bug = _find_path(issue), _find_wrong_line(observation)
    if random.random() < noise:
        path, bug = f"{random.choice(PACKAGES)}/{random.choice(list(MODULES))}.py", None
    if turns_taken and " is changed:" in observation:
        return str(ToolCall("finish", {}))
    if bug is None:
        return format_call(ToolCall("file_editor", {"command": "view", "path": path}))
    wrong, right = bug
    new = _choose_wrong_line(wrong, random) if random.random() < shyness else right
    edit = {"command": "str_replace", "path": path, "old_str": wrong, "new_str": new}
    return format_call(ToolCall("file_editor", edit))


def _find_path(issue: str) -> str:
    """The file that an issue names."""
    match = re.search(r"\w+/\w+\.py", issue)
    assert match, issue
    return match[0]


def _find_wrong_line(text: str) -> tuple[str, str] | None:
    """A wrong line in a text, with the right line; None if there is none."""
    return next(((bug.line, f.right) for _, f, bug in list_bugs() if bug.line in text), None)


def _choose_wrong_line(wrong: str, random: Random) -> str:
    """Another wrong line for the same place in the code."""
    return random.choice(
        [bug.line for _, f, one in list_bugs() if one.line == wrong for bug in f.bugs if bug.line != wrong]
    )
