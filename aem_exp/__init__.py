"""Declarative experiments in multi-turn agentic reinforcement learning, with Adaptive Entropy Modulation."""

from typing import Final

__version__ = "0.1.0"

# The revision of the method: raise it when the same experiment would train differently, though its signature is the same.
# Runs of different revisions are not pooled or compared unless that is asked for. What each one changed is said here.
#   0: runs that record none.
#   1: equal values have no advantage (statistics in float64), nor has a trajectory that is alone in its group; a step whose
#      loss is zero has no update; schedules of a continued run span the steps that it adds.
METHOD: Final = 1
