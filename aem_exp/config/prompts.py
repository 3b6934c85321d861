"""Checks the prompt templates of an env: which there must be, and which fields each may quote."""

from string import Formatter
from typing import Final

from aem_exp.config.schema import Experiment
from aem_exp.core.errors import ConfigError, unknown_key_error

# `step`: turns taken; `turn`: the number of this one; `left`: turns left.
_TURN_FIELDS: Final = {"task", "observation", "actions", "step", "turn", "left"}
_WINDOW_FIELDS: Final = _TURN_FIELDS | {"history", "length"}
TEMPLATE_FIELDS: Final = {  # history -> template -> what it may quote
    "full": {"first": _TURN_FIELDS, "next": _TURN_FIELDS},
    "window": {"first": _TURN_FIELDS, "window": _WINDOW_FIELDS, "pair": {"n", "observation", "action"}},
}


def check_prompts(e: Experiment) -> None:
    """Refuse a template that is missing, unknown, or quotes a field that its turn does not have."""
    templates = {name: words for history in TEMPLATE_FIELDS.values() for name, words in history.items()}
    for name in TEMPLATE_FIELDS[e.env.history]:
        if name not in e.env.prompt:
            raise ConfigError(f"env.prompt.{name}", None, f"required with env.history={e.env.history}: a template")
    for name, text in e.env.prompt.items():
        field = f"env.prompt.{name}"
        if name not in templates:
            raise unknown_key_error(field, text, templates)
        try:
            quoted = template_fields(text)
        except ValueError as error:
            raise ConfigError(field, text, f"is not a template ({error}); write {{{{ and }}}} for braces") from error
        for word in sorted(quoted - templates[name]):
            raise ConfigError(field, f"{{{word}}}", sorted(f"{{{known}}}" for known in templates[name]))


def template_fields(template: str) -> set[str]:
    """The fields that a template quotes."""
    return {word for _, word, _, _ in Formatter().parse(template) if word is not None}
