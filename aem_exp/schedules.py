"""Schedules of the strength lambda, as functions of the progress of a run.

The paper uses a constant 1; all other shapes are extensions of this project. A schedule is a frozen callable of the progress in
[0, 1]: 0 at the first step of a run, 1 at its last. It has no state, so a resumed run continues it exactly. A run that
continues another run (`from=`) has its own schedule over the steps that it adds.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The same lambda at every step."""

    value: float = 1.0
    """Lambda."""

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end`."""

    start: float
    """Lambda at the first step."""
    end: float
    """Lambda at the last step."""

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine:
    """Half a cosine wave from `start` to `end`, flat at both ends."""

    start: float
    """Lambda at the first step."""
    end: float
    """Lambda at the last step."""

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
