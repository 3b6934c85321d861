"""The errors that users see, each as one sentence and without credentials."""

import json
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class ConfigError(Exception):
    """A mistake of the user, found before any work. `str()` is one sentence; commands print it and exit with code 2.

    Args:
        field: dotted key or option.
        value: the given value.
        choices: the allowed values. A text is taken as the remedy.
        remedy: what is wrong, and how to correct it.
    """

    def __init__(self, field: str, value: Any, choices: Iterable[Any] | str = (), remedy: str = ""):
        is_text = isinstance(choices, str)
        self.field, self.value = field, value
        self.choices: list[str] = [] if is_text else [str(choice) for choice in choices]
        self.remedy = remedy or (str(choices) if is_text else "")
        super().__init__(field, value, self.choices, self.remedy)

    def __str__(self) -> str:
        close = closest_match(self.value, self.choices) if self.choices else None
        hint = f"did you mean {close}?" if close else ""
        choices = f"choose from {', '.join(self.choices)}" if self.choices else ""
        explanation = "; ".join(part for part in (choices, self.remedy) if part)
        return " ".join(f"{self.field}={format_value(self.value)}: {hint} {explanation}".split())


class MissingResource(ConfigError):
    """The request is valid, but something is missing that can be downloaded, installed or started."""


class MissingOnThisMachine(MissingResource):
    """A program or a server is missing on this machine; the machine of a job may have it."""


class RunError(Exception):
    """A run cannot continue. `str()` gives the reason in one sentence, `kind` its failure class. Saved files stay valid."""

    def __init__(self, sentence: str, kind: str = "crash"):
        super().__init__(sentence)
        self.kind = kind


def format_value(value: Any) -> str:
    """A value as on the command line, cut to 120 characters."""
    try:
        text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 120 else text[:117] + "..."


def closest_match(word: Any, choices: Iterable[str]) -> str | None:
    """The choice that the user probably meant: one with these initials (`lr`), else the most similar spelling."""
    choices = list(choices)
    same_initials = [full for full in choices if len(str(word)) > 1 and word == _initials(full.rpartition(".")[2])]
    return next(iter(same_initials or get_close_matches(str(word), choices, 1)), None)


def _initials(name: str) -> str:
    return "".join(re.findall("(?<![a-z0-9])[a-z]", name))


def unknown_key_error(field: str, value: Any, keys: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist; `keys` are the existing keys of its block."""
    keys = sorted(keys)
    close = closest_match(field.rpartition(".")[2], keys)
    siblings = f"available keys: {', '.join(keys)}" if keys else "no keys are available"
    return ConfigError(field, value, "no such key; " + (f"did you mean {close}?" if close else siblings))


SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")


def redact(text: str) -> str:
    """Replace credentials by ***: those in URIs, and those of the tracker from the environment."""
    text = re.sub(r"(\w://)[^\s/]*@", r"\1***@", text)
    text = re.sub(r"([?&](?:password|pwd|token|secret)=)[^&\s'\"]+", r"\1***", text, flags=re.IGNORECASE)
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return text
