"""Prompt templates: required names and allowed fields."""

import pytest
from support.configs import assert_refused

pytestmark = pytest.mark.usefixtures("clean")


REFUSED = [  # overrides, the field of the error, and a fact that the error must state
    ("env.prompt={next: hi}", "env.prompt.first", "env.history=full"),
    ("env.prompt={first: hi}", "env.prompt.next", "env.history=full"),
    ("env.prompt.second=hi", "env.prompt.second", "first"),
    ("env.prompt.next='{obs}'", "env.prompt.next", "{observation}"),
    ("env.prompt.next='{history}'", "env.prompt.next", "{observation}"),
    ("env.prompt.next='a { b'", "env.prompt.next", "{{"),
]


@pytest.mark.parametrize(("overrides", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_templates_are_checked(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)
