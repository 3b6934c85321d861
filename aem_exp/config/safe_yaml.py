"""Safe reading of YAML files of users.

Files are refused that would hang or overflow the loader, call functions, or expose environment variables. Only parser events
are read; an alias counts as its expansion.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from aem_exp.core.errors import ConfigError

MAX_BYTES: Final = 2**20  # of a file
MAX_DEPTH: Final = 50  # nested blocks
MAX_VALUES: Final = 20_000  # values of a file, with aliases expanded
PLAIN_TAGS: Final = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_Loader: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(file: Path, field: str) -> str:
    """Return the text of a YAML file if it is safe to load; `field` names the file in errors.

    Raises:
        ConfigError: the file is not safe, not YAML, or cannot be read.
    """
    if not file.is_file():
        raise ConfigError(field, str(file), "must be a regular file")
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content[:MAX_BYTES].decode()
        check_text(text)
    except OSError as error:
        raise ConfigError(field, str(file), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(field, str(file), f"must be UTF-8 text; byte {error.start + 1} is invalid") from error
    except (yaml.YAMLError, UnsafeYAMLError) as error:
        remedy = str(error) if isinstance(error, UnsafeYAMLError) else f"is not valid YAML: {format_error(error)}"
        raise ConfigError(field, str(file), remedy) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(field, str(file), f"is too large; the limit is {MAX_BYTES >> 20} MB")
    return text


def format_error(error: Exception) -> str:
    """Return the message of a parser error in one line, without the parser's name for the text."""
    return " ".join(str(error).replace(' in "<unicode string>",', " at").split())


class UnsafeYAMLError(ValueError):
    """A YAML text or a value is not safe. The message completes a sentence that begins with its name."""


def check_text(text: str) -> None:
    """Refuse a YAML text that becomes too large when it is loaded, or that calls a function.

    Raises:
        UnsafeYAMLError: the text is not safe.
        yaml.YAMLError: the text is not YAML.
    """
    sizes: dict[str, int | None] = {}  # anchor -> number of values in it; None inside of its block
    blocks: list[tuple[str | None, int]] = [(None, 0)]  # anchor and number of values of each open block
    for event in yaml.parse(text, Loader=_Loader):
        _check_tag(event)
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
            if size is None:
                raise UnsafeYAMLError(f"contains itself: *{event.anchor} is inside of &{event.anchor}")
        elif isinstance(event, yaml.ScalarEvent):
            check_value(event.value)
            size, sizes[event.anchor] = 1, 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes[event.anchor] = None
            blocks.append((event.anchor, 1))
            if len(blocks) > MAX_DEPTH:
                raise UnsafeYAMLError(f"is nested too deeply; the limit is {MAX_DEPTH} blocks")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = blocks.pop()
            sizes[anchor] = size  # type: ignore[index]  # None is a valid key
        else:
            continue
        anchor, before = blocks.pop()
        blocks.append((anchor, before + size))
        if before + size > MAX_VALUES:
            raise UnsafeYAMLError(f"has too many values; the limit is {MAX_VALUES:,}, with aliases expanded")


def check_value(text: str) -> None:
    """Refuse a number that is too long for Python, and a function call `${function:...}`.

    `${key}` is allowed, also nested. `${oc.env:NAME}` is not: it would write the value of an environment variable, possibly a
    secret, into folder names, hashes and logs.

    Raises:
        UnsafeYAMLError: the value is not safe.
    """
    if re.search(r"\d{1000}", text):
        raise UnsafeYAMLError("has a number of more than a thousand digits")
    depth = 0
    for i, letter in enumerate(text if "${" in text else ""):
        if text.startswith("${", i):
            depth += 1
        elif letter == "}" and depth:
            depth -= 1
        elif letter == ":" and depth:
            raise UnsafeYAMLError(
                "must not call a function in ${...}; only keys are allowed, as in ${env.name}. Let the shell expand variables: "
                "outputs=$SCRATCH/runs"
            )


def check_nesting(text: str) -> None:
    """Refuse an override that is nested too deeply for its parser.

    Raises:
        UnsafeYAMLError: the override is nested too deeply.
    """
    depth = 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth > MAX_DEPTH:
            raise UnsafeYAMLError(f"is nested too deeply; the limit is {MAX_DEPTH} brackets")


def _check_tag(event: Any) -> None:
    tag = getattr(event, "tag", None)
    if tag not in (None, "!") and tag not in PLAIN_TAGS:
        raise UnsafeYAMLError(f"must not have tags such as !{tag.rpartition(':')[2]}")
