"""What a user sees when something is wrong: the error types, in one sentence each, without credentials."""

import json
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class ConfigError(Exception):
    """A user's mistake, found before any work. `str()` is one sentence; commands print it and exit with code 2.

    Args:
        field: dotted key, or what was typed.
        value: what was given.
        choices: what could have been given; or, in words, what is expected.
        remedy: what to do about it.
    """

    def __init__(self, field: str, value: Any, choices: Iterable[Any] | str = (), remedy: str = ""):
        words = isinstance(choices, str)
        self.field, self.value = field, value
        self.choices: list[str] = [] if words else [str(choice) for choice in choices]
        self.remedy = remedy or (str(choices) if words else "")
        super().__init__(field, value, self.choices, self.remedy)

    def __str__(self) -> str:
        close = closest_match(self.value, self.choices) if self.choices else None
        hint = f"did you mean {close}?" if close else ""
        choices = f"choose from {', '.join(self.choices)}" if self.choices else ""
        why = "; ".join(part for part in (choices, self.remedy) if part)
        return " ".join(f"{self.field}={format_value(self.value)}: {hint} {why}".split())


class MissingResource(ConfigError):
    """Nothing is wrong with what was asked: this machine lacks something that can be fetched, installed or started."""


class MissingOnThisMachine(MissingResource):
    """What is missing belongs to a machine, and the one that a job gets may have it: a program, a server that answers."""


class RunError(Exception):
    """A run that cannot go on; `str()` says why in a sentence, `kind` in a word. What was saved stays, and is good."""

    def __init__(self, sentence: str, kind: str = "crash"):
        super().__init__(sentence)
        self.kind = kind


def format_value(value: Any) -> str:
    """A value as the command line would write it, cut to a line."""
    try:
        text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 120 else text[:117] + "..."


def closest_match(word: Any, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant: the one with these initials (`lr`), or the nearest spelling."""
    choices = list(choices)
    meant = [full for full in choices if len(str(word)) > 1 and word == _initials(full.rpartition(".")[2])]
    return next(iter(meant or get_close_matches(str(word), choices, 1)), None)


def _initials(name: str) -> str:
    return "".join(re.findall("(?<![a-z0-9])[a-z]", name))


def unknown_key_error(field: str, value: Any, keys: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist; `keys` are its siblings."""
    keys = sorted(keys)
    close = closest_match(field.rpartition(".")[2], keys)
    siblings = f"the keys here are {', '.join(keys)}" if keys else "nothing can be set here"
    return ConfigError(field, value, "no such key; " + (f"did you mean {close}?" if close else siblings))


SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")


def redact(text: str) -> str:
    """Hide the credentials of any URI in `text`, and those that the environment holds for the tracker."""
    text = re.sub(r"(\w://)[^\s/]*@", r"\1***@", text)
    text = re.sub(r"([?&](?:password|pwd|token|secret)=)[^&\s'\"]+", r"\1***", text, flags=re.IGNORECASE)
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return text
