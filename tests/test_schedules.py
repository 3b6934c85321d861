"""Schedules: frozen functions of progress."""

import pickle

import pytest

from aem_exp.schedules import Constant, Cosine, Linear


@pytest.mark.parametrize("schedule", [Linear(1.0, 0.25), Cosine(1.0, 0.25)])
def test_start_middle_and_end(schedule):
    assert [schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.625, 0.25])


def test_cosine_is_flat_at_both_ends():
    schedule = Cosine(1.0, 0.0)
    assert schedule(0.01) > Linear(1.0, 0.0)(0.01)
    assert schedule(0.99) < Linear(1.0, 0.0)(0.99)


def test_a_schedule_is_a_plain_value():
    assert Constant(1.0) == pickle.loads(pickle.dumps(Constant(1.0)))
    assert repr(Linear(1.0, 0.0)) == "Linear(start=1.0, end=0.0)"
    assert Constant(2.0)(0.3) == 2.0
