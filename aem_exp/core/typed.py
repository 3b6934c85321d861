"""Converts plain data (YAML, JSON) to typed values; an error names the field, the value, the choices and the remedy.

Types are ordinary annotations. A number with a range is annotated as `Annotated[float, POSITIVE]`.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from aem_exp.core.errors import ConfigError, unknown_key_error

T = TypeVar("T")
LARGEST_INT = 2**63 - 1  # the largest whole number in JSON readers and MLflow
LARGEST_SIZE = 2**32 - 1  # the largest size or seed; numpy's limit for seeds


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of allowed numbers, and its description for error messages."""

    description: str
    contains: Callable[[float], bool]


POSITIVE = Range("above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("of at least 0", lambda x: x >= 0)
AT_LEAST_1 = Range("of at least 1", lambda x: x >= 1)
AT_LEAST_2 = Range("of at least 2", lambda x: x >= 2)
FRACTION = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
FROM_0_TO_1 = Range("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_1 = Range("of at least 0 and below 1", lambda x: 0 <= x < 1)
PositiveInt = Annotated[int, AT_LEAST_1]
NonNegativeInt = Annotated[int, NOT_NEGATIVE]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeFloat = Annotated[float, NOT_NEGATIVE]
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (in quotes?)",
    type(None): "null",
}


def convert(hint: Any, value: Any, field: str) -> Any:
    """Convert a value to the type `hint`; `field` names it in errors.

    Raises:
        ConfigError: the value does not have this type, or is out of range.
    """
    origin, args = get_origin(hint), get_args(hint)
    limit = LARGEST_SIZE if any(get_origin(part) is Annotated for part in (hint, *args)) else LARGEST_INT
    if hint is not Any and isinstance(value, int) and abs(value) > limit:
        raise ConfigError(field, value, f"must be at most {limit:,}")
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or is_typeddict(hint)):
        return build_from_mapping(hint, value, field)
    if origin is Annotated:
        if not _is_number(value) or not all(allowed.contains(value) for allowed in args[1:]):
            raise ConfigError(field, value, f"must be {describe_type(hint)}")
        return convert(args[0], value, field)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, field)
    if origin is Literal:
        return _convert_literal(args, value, field)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): convert(args[1], item, f"{field}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [convert(args[0], item, f"{field}[{i}]") for i, item in enumerate(value)]
    if hint is Any:
        return _convert_untyped(value, field)
    if hint is float and _is_number(value):
        return float(value)
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    raise ConfigError(field, value, f"must be {describe_type(hint)}")


def build_from_mapping(cls: type[T], data: Any, field: str = "") -> T:
    """Build a dataclass, or a typed dict of the given keys, from a mapping of its fields."""
    return cls(**convert_fields(cls, data, field))


def convert_fields(cls: type, data: Any, field: str = "") -> dict[str, Any]:
    """Convert the given fields of a dataclass or typed dict to their types; unknown keys are refused."""
    hints = type_hints(cls)
    if not isinstance(data, Mapping):
        raise ConfigError(field, data, f"must be a mapping with the keys {', '.join(hints)}")
    at = f"{field}." if field else ""
    for key, value in data.items():
        if key not in hints:
            raise unknown_key_error(f"{at}{key}", value, hints)
    return {key: convert(hints[key], value, f"{at}{key}") for key, value in data.items()}


def describe_type(hint: Any) -> str:
    """Describe a type in words, as the end of `must be ...`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe_type(args[0])} {' and '.join(allowed.description for allowed in args[1:])}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin is list:
        return f"a list, each item {describe_type(args[0])}"
    return "a mapping" if origin is dict else _TYPE_NAMES.get(hint, str(hint))


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Field name -> type of a dataclass or typed dict, including the ranges."""
    return get_type_hints(cls, include_extras=True)


def _convert_union(hint: Any, args: tuple[Any, ...], value: Any, field: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return convert(options[0], value, field)
    for option in options:
        try:
            return convert(option, value, field)
        except ConfigError:
            continue
    raise ConfigError(field, value, f"must be {describe_type(hint)}")


def _convert_literal(choices: tuple[Any, ...], value: Any, field: str) -> Any:
    if isinstance(value, bool) and {"on", "off"} <= set(choices):  # YAML reads an unquoted `on` as true
        return "on" if value else "off"
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ConfigError(field, value, choices)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _convert_untyped(value: Any, field: str) -> Any:
    """Convert to lists, dicts and scalars only, so that a JSON round trip returns the same value."""
    if isinstance(value, Mapping):
        return {str(key): convert(Any, item, f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [convert(Any, item, f"{field}[{i}]") for i, item in enumerate(value)]
    return value
