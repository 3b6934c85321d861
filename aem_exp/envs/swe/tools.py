"""The agent's tools on a repository (file_editor, search, execute_bash, finish), in R2E-Gym's text format: one call per
response.

    <function=file_editor>
    <parameter=command>view</parameter>
    <parameter=path>/testbed/setup.py</parameter>
    </function>

This module decides how a response is parsed into a call, and what each tool does and answers. Text before and after the call is
ignored. Parsing is strict where a guess could do harm: an incomplete parameter or an unknown tool is an error. It is lenient
otherwise: `</function>` may be missing at the end, and spaces around names and a line break before and after a value are allowed.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from aem_exp.sandboxes import Sandbox

KEPT_LINES: Final = 40  # lines kept at each end of a long output, as in rLLM
MAX_OUTPUT_CHARACTERS: Final = 12_000  # longest output
MAX_CALL_CHARACTERS: Final = 100_000  # longest call; Linux limits an argument of a program to 128 KiB
MAX_MATCHES: Final = 100  # files or lines that a search lists
MAX_FILE_BYTES: Final = 1 << 20  # largest file that the editor opens
TOOL_SECONDS: Final = 30.0  # for the commands of the tools themselves

TOOLS: Final[Mapping[str, Mapping[str, bool]]] = {  # tool -> its parameters, and whether each is required
    "file_editor": {
        "command": True,
        "path": True,
        "file_text": False,
        "old_str": False,
        "new_str": False,
        "insert_line": False,
        "view_range": False,
    },
    "search": {"search_term": True, "path": False},
    "execute_bash": {"command": True},
    "finish": {"result": False},
}
EDITOR_COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {  # command of the editor -> other parameters that it needs
    "view": (),
    "create": ("file_text",),
    "str_replace": ("old_str",),
    "insert": ("insert_line", "new_str"),
    "undo_edit": (),
}
_CALL: Final = re.compile(r"<function\s*=\s*([\w.-]*)\s*>(.*?)(?:</function\s*>|\Z)", re.DOTALL)
_PARAMETER: Final = re.compile(r"\s*<parameter\s*=\s*([\w.-]*)\s*>(.*?)</parameter\s*>", re.DOTALL)


class ToolCall(NamedTuple):
    """A tool and its arguments."""

    tool: str
    arguments: dict[str, str]

    def __str__(self) -> str:
        arguments = {
            name: f"\n{value}\n" if value != value.strip("\n") else value for name, value in self.arguments.items()
        }
        parameters = "".join(f"<parameter={name}>{value}</parameter>\n" for name, value in arguments.items())
        return f"<function={self.tool}>\n{parameters}</function>"


class InvalidCall(ValueError):
    """A response without a valid call. The agent reads the message."""


def parse_call(response: str) -> ToolCall:
    """The call in a response. Raises InvalidCall."""
    text = response.rpartition("</think>")[2]
    if len(text) > MAX_CALL_CHARACTERS or "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidCall(f"a call is text of at most {MAX_CALL_CHARACTERS:,} characters")
    if "<think>" in text:
        raise InvalidCall("your thinking did not end with </think>, so there is no call")
    match = _CALL.search(text)
    if not match:
        raise InvalidCall("there is no call: write <function=NAME>, its parameters, and </function>")
    tool, body = match.groups()
    if tool not in TOOLS:
        raise InvalidCall(f"there is no tool {tool!r}: the tools are {', '.join(TOOLS)}")
    arguments: dict[str, str] = {}
    end = 0
    while parameter := _PARAMETER.match(body, end):
        name, value = parameter.groups()
        if name not in TOOLS[tool]:
            raise InvalidCall(f"{tool} has no parameter {name!r}: it takes {', '.join(TOOLS[tool])}")
        if name in arguments:
            raise InvalidCall(f"{tool} was given {name} twice")
        arguments[name] = _unwrap(value)
        end = parameter.end()
    if body[end:].strip():
        raise InvalidCall(
            f"{tool}: {_clip(body[end:].strip(), 60)!r} is no parameter, or one that does not end with </parameter>"
        )
    if missing := [name for name, required in TOOLS[tool].items() if required and name not in arguments]:
        raise InvalidCall(f"{tool} needs {' and '.join(missing)}")
    if tool == "file_editor":
        _check_edit(arguments)
    return ToolCall(tool, arguments)


def _check_edit(arguments: Mapping[str, str]) -> None:
    command = arguments["command"].strip()
    if command not in EDITOR_COMMANDS:
        raise InvalidCall(f"file_editor has no command {command!r}: choose {', '.join(EDITOR_COMMANDS)}")
    if missing := [name for name in EDITOR_COMMANDS[command] if name not in arguments]:
        raise InvalidCall(f"file_editor {command} needs {' and '.join(missing)}")


def _unwrap(value: str) -> str:
    """A value without the line break after its opening tag and before its closing tag."""
    return value.removeprefix("\n").removesuffix("\n")


def clip(text: str, lines: int = KEPT_LINES, characters: int = MAX_OUTPUT_CHARACTERS) -> str:
    """The start and end of a long output, with the number of omitted lines or characters between them."""
    parts = text.split("\n")
    if len(parts) > 2 * lines:
        parts = [*parts[:lines], f"... {len(parts) - 2 * lines} lines left out ...", *parts[-lines:]]
    return _clip("\n".join(parts), characters)


def _clip(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


@dataclass
class Tools:
    """The tools in one sandbox. `seconds` is the time limit of the agent's commands."""

    sandbox: Sandbox
    seconds: float

    def __post_init__(self) -> None:
        # file -> its content before each edit; None if there was no file
        self._earlier_versions: dict[str, list[bytes | None]] = {}

    def execute(self, call: ToolCall, left: float) -> str:
        """Carry out a call and return the observation. `left` is the rest of the episode in seconds; `finish` does nothing."""
        match call.tool:
            case "execute_bash":
                return self._bash(call.arguments["command"], min(self.seconds, left))
            case "search":
                return self._search(call.arguments["search_term"], call.arguments.get("path") or ".")
            case "file_editor":
                return self._edit(call.arguments)
        return ""

    def _bash(self, command: str, seconds: float) -> str:
        ran = self.sandbox.run(command, seconds)
        output = clip(ran.text.rstrip("\n"))
        ended = {
            "time": f"stopped after {seconds:g} s",
            "output": f"stopped after {self.sandbox.limits.output_mb} MB of output",
            "memory": f"stopped: all its processes used more than {self.sandbox.limits.memory_mb} MB",
        }.get(ran.stop_reason, f"exit code {ran.code}")
        return f"{output}\n[{ended}]" if output else f"[{ended}]"

    def _search(self, term: str, path: str) -> str:
        quoted_path, quoted_term = shlex.quote(path), shlex.quote(term)
        script = (
            f"if [ -d {quoted_path} ]; then"
            f" grep -rcIF --exclude-dir=.git -e {quoted_term} -- {quoted_path} | grep -v ':0$' | sort; exit 0;"
            f" elif [ -f {quoted_path} ]; then grep -nF -e {quoted_term} -- {quoted_path}; exit 0; fi; exit 3"
        )
        ran = self.sandbox.run(script, TOOL_SECONDS)
        if ran.code:
            return f"ERROR: {(ran.stop_reason and 'the search took too long') or f'there is no {path}'}"
        matches = ran.text.splitlines()
        if not matches:
            return f"{term!r} does not occur in {path}"
        rest = [f"... and {len(matches) - MAX_MATCHES} more"] if len(matches) > MAX_MATCHES else []
        return clip("\n".join([f"{term!r} in {path}:", *matches[:MAX_MATCHES], *rest]), MAX_MATCHES)

    def _edit(self, arguments: Mapping[str, str]) -> str:
        command, path = arguments["command"].strip(), arguments["path"].strip()
        place = str(PurePosixPath(self.sandbox.workdir) / path)
        actions: Mapping[str, Callable[[str, Mapping[str, str]], str]] = {
            "view": self._view,
            "create": self._create,
            "str_replace": self._replace,
            "insert": self._insert,
            "undo_edit": self._undo,
        }
        try:
            return actions[command](place, arguments)
        except (OSError, InvalidCall) as error:
            return f"ERROR: {error}"

    def _view(self, path: str, arguments: Mapping[str, str]) -> str:
        name = shlex.quote(path)
        ran = self.sandbox.run(
            f"[ -d {name} ] && cd {name} && find . -maxdepth 2 -not -path '*/.*' | sort && exit 0; exit 3", TOOL_SECONDS
        )
        if not ran.code:
            return f"{path}, two levels deep:\n{clip(ran.text.rstrip(), MAX_MATCHES)}"
        lines = self._read_text(path).split("\n")
        if lines[-1] == "":
            lines.pop()
        first, last = _parse_range(arguments.get("view_range"), len(lines))
        return clip("\n".join(f"{number:6}\t{lines[number - 1]}" for number in range(first, last + 1)), 5 * KEPT_LINES)

    def _create(self, path: str, arguments: Mapping[str, str]) -> str:
        self._write(path, arguments["file_text"] + "\n" * (not arguments["file_text"].endswith("\n")))
        return f"{path} is written"

    def _replace(self, path: str, arguments: Mapping[str, str]) -> str:
        text, old, new = self._read_text(path), arguments["old_str"], arguments.get("new_str", "")
        if not old:
            raise InvalidCall("old_str is empty")
        if old not in text and "\r\n" in text:  # the agent does not see the line endings of the file
            old, new = (re.sub(r"\r?\n", "\r\n", part) for part in (old, new))
        if (count := text.count(old)) != 1:
            raise InvalidCall(f"old_str occurs {count} times in {path}, not once; nothing was changed")
        self._write(path, text.replace(old, new))
        line = text[: text.index(old)].count("\n") + 1
        return self._describe_change(path, line, line + new.count("\n"))

    def _insert(self, path: str, arguments: Mapping[str, str]) -> str:
        lines = self._read_text(path).split("\n")
        after = _parse_line_number(arguments["insert_line"], "insert_line", 0, len(lines))
        added = arguments["new_str"].split("\n")
        self._write(path, "\n".join([*lines[:after], *added, *lines[after:]]))
        return self._describe_change(path, after + 1, after + len(added))

    def _undo(self, path: str, arguments: Mapping[str, str]) -> str:
        if not self._earlier_versions.get(path):
            raise InvalidCall(f"there is no edit of {path} to undo")
        before = self._earlier_versions[path].pop()
        if before is None:
            self.sandbox.run(f"rm -f -- {shlex.quote(path)}", TOOL_SECONDS)
        else:
            self.sandbox.put(path, before)
        return f"the last edit of {path} is undone"

    def _describe_change(self, path: str, first: int, last: int) -> str:
        """The lines that an edit changed, with a few lines of context."""
        lines = self._read_text(path).split("\n")
        rows = range(max(1, first - 4), min(len(lines), last + 4) + 1)
        return f"{path} is changed:\n" + clip("\n".join(f"{row:6}\t{lines[row - 1]}" for row in rows))

    def _read_text(self, path: str) -> str:
        data = self.sandbox.get(path)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidCall(f"{path} is too large to edit ({len(data):,} bytes); use execute_bash")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise InvalidCall(f"{path} is not a text file") from None

    def _write(self, path: str, text: str) -> None:
        try:
            before: bytes | None = self.sandbox.get(path)
        except OSError:
            before = None
        self.sandbox.put(path, text.encode())
        self._earlier_versions.setdefault(path, []).append(before)


def _parse_range(text: str | None, count: int) -> tuple[int, int]:
    """First and last line of a view, from a text such as `[10, 20]`; -1 is the last line of the file."""
    if not text:
        return 1, count
    numbers = re.findall(r"-?\d{1,9}", text)
    if len(numbers) != 2:
        raise InvalidCall(f"view_range={text}: two line numbers, as in [10, 20]")
    first, last = int(numbers[0]), int(numbers[1])
    last = count if last == -1 else min(last, count)
    if not 1 <= first <= max(last, 1):
        raise InvalidCall(f"view_range={text}: the file has {count} lines")
    return first, last


def _parse_line_number(text: str, name: str, least: int, most: int) -> int:
    try:
        number = int(text[:9])
    except ValueError:
        number = -1
    if not least <= number <= most:
        raise InvalidCall(f"{name}={text}: must be a line from {least} to {most}")
    return number
