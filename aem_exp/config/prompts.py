"""Checks the prompt templates of an env: the required templates, and the fields that each may use."""

from string import Formatter
from typing import Final

from aem_exp.config.schema import Experiment
from aem_exp.core.errors import ConfigError, unknown_key_error

# `step`: number of past turns; `turn`: number of this turn; `left`: remaining turns.
_TURN_FIELDS: Final = {"task", "observation", "actions", "step", "turn", "left"}
_WINDOW_FIELDS: Final = _TURN_FIELDS | {"history", "length"}
TEMPLATE_FIELDS: Final = {  # history -> template -> allowed fields
    "full": {"first": _TURN_FIELDS, "next": _TURN_FIELDS},
    "window": {"first": _TURN_FIELDS, "window": _WINDOW_FIELDS, "pair": {"n", "observation", "action"}},
}


def check_prompts(e: Experiment) -> None:
    """Refuse a template that is missing or unknown, or that uses a field which its turn does not have."""
    templates = {name: allowed for history in TEMPLATE_FIELDS.values() for name, allowed in history.items()}
    for name in TEMPLATE_FIELDS[e.env.history]:
        if name not in e.env.prompt:
            raise ConfigError(f"env.prompt.{name}", None, f"a template is required with env.history={e.env.history}")
    for name, text in e.env.prompt.items():
        field = f"env.prompt.{name}"
        if name not in templates:
            raise unknown_key_error(field, text, templates)
        try:
            used = template_fields(text)
        except ValueError as error:
            raise ConfigError(
                field, text, f"is not a valid template ({error}); write {{{{ and }}}} for literal braces"
            ) from error
        for word in sorted(used - templates[name]):
            raise ConfigError(field, f"{{{word}}}", sorted(f"{{{known}}}" for known in templates[name]))


def template_fields(template: str) -> set[str]:
    """The fields that a template uses."""
    return {word for _, word, _, _ in Formatter().parse(template) if word is not None}
