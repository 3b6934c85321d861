"""Safe reading of a user's YAML: files that would hang or overflow the loader, call functions or expose environment
variables are refused.

Only parser events are read; an alias is counted as what it expands to.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from aem_exp.core.errors import ConfigError

MAX_BYTES: Final = 2**20  # bytes of a file
MAX_DEPTH: Final = 50  # blocks inside of each other
MAX_VALUES: Final = 20_000  # values, each alias counted as what it stands for
PLAIN_TAGS: Final = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_Loader: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(file: Path, field: str) -> str:
    """Return the text of a YAML file that is safe to load; `field` is what named it.

    Raises:
        ConfigError: it is not.
    """
    if not file.is_file():
        raise ConfigError(field, str(file), "must be an ordinary file")
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content[:MAX_BYTES].decode()
        check_text(text)
    except OSError as error:
        raise ConfigError(field, str(file), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(field, str(file), f"must be UTF-8 text; byte {error.start + 1} is not") from error
    except (yaml.YAMLError, UnsafeYAMLError) as error:
        why = str(error) if isinstance(error, UnsafeYAMLError) else f"is not YAML: {format_error(error)}"
        raise ConfigError(field, str(file), why) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(field, str(file), f"is too large; such a file has at most {MAX_BYTES >> 20} MB")
    return text


def format_error(error: Exception) -> str:
    """Return what a parser says in one line, without the name that it has for a text."""
    return " ".join(str(error).replace(' in "<unicode string>",', " at").split())


class UnsafeYAMLError(ValueError):
    """What is wrong with a text, in words that follow its name."""


def check_text(text: str) -> None:
    """Refuse a YAML text that grows without measure when it is loaded, or that calls a function.

    Raises:
        Refused: it does.
        yaml.YAMLError: it is not YAML.
    """
    sizes: dict[str, int | None] = {}  # anchor -> values below it; None while it is open
    blocks: list[tuple[str | None, int]] = [(None, 0)]  # anchor and values so far of each open block
    for event in yaml.parse(text, Loader=_Loader):
        _check_tag(event)
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
            if size is None:
                raise UnsafeYAMLError(f"holds itself: *{event.anchor} stands inside of &{event.anchor}")
        elif isinstance(event, yaml.ScalarEvent):
            check_value(event.value)
            size, sizes[event.anchor] = 1, 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes[event.anchor] = None
            blocks.append((event.anchor, 1))
            if len(blocks) > MAX_DEPTH:
                raise UnsafeYAMLError(f"is nested too deeply: more than {MAX_DEPTH} blocks inside of each other")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = blocks.pop()
            sizes[anchor] = size  # type: ignore[index]  # None is a key like any other
        else:
            continue
        anchor, before = blocks.pop()
        blocks.append((anchor, before + size))
        if before + size > MAX_VALUES:
            raise UnsafeYAMLError(
                f"holds too much: more than {MAX_VALUES:,} values, aliases counted as what they stand for"
            )


def check_value(text: str) -> None:
    """Refuse a value that Python cannot read as a number, or that calls a function: `${function:...}`.

    `${key}` is well, also with keys in keys. `${oc.env:NAME}` would put the value of a variable into names of folders, hashes
    and logs, where a secret must not be.

    Raises:
        Refused: it is one of the two.
    """
    if re.search(r"\d{1000}", text):
        raise UnsafeYAMLError("holds a number of more than a thousand digits")
    depth = 0
    for i, letter in enumerate(text if "${" in text else ""):
        if text.startswith("${", i):
            depth += 1
        elif letter == "}" and depth:
            depth -= 1
        elif letter == ":" and depth:
            raise UnsafeYAMLError(
                "must not call a function in ${...}, only name keys as in ${env.name}; the shell can fill in a variable: "
                "outputs=$SCRATCH/runs"
            )


def check_nesting(text: str) -> None:
    """Refuse an override that is nested too deeply for its parser.

    Raises:
        Refused: it is.
    """
    depth = 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth > MAX_DEPTH:
            raise UnsafeYAMLError(f"is nested too deeply: more than {MAX_DEPTH} brackets inside of each other")


def _check_tag(event: Any) -> None:
    tag = getattr(event, "tag", None)
    if tag not in (None, "!") and tag not in PLAIN_TAGS:
        raise UnsafeYAMLError(f"must not have tags such as !{tag.rpartition(':')[2]}")
