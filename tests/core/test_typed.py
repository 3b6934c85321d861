"""Plain data becomes typed values."""

from typing import Literal

from aem_exp.core.typed import convert, describe_type


def test_types_are_described_in_words():
    assert describe_type(list[str]) == "a list, each item text (in quotes?)"
    assert describe_type(Literal["all"] | int | None) == "all or a whole number or null"


def test_an_unquoted_on_is_read_as_the_choice():
    assert convert(Literal["on", "off"], True, "x") == "on"
