"""Suggestions for misspelt names."""

from aem_exp.core.errors import closest_match


def test_suggestions_use_initials_and_spelling():
    assert closest_match("lr", ["trainer.loss_type", "trainer.learning_rate"]) == "trainer.learning_rate"
    assert closest_match("betta", ["beta", "delta"]) == "beta"
    assert closest_match("zzz", ["beta", "delta"]) is None
