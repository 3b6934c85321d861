"""The strength lambda as a function of progress.

The paper uses a constant 1; every other shape is this project's extension. A schedule is a frozen callable of progress in
[0, 1] (0 at the first step of a run, 1 at its last), so it has no state to lose when a run resumes. A run that continues
another (`from=`) has a schedule of its own, over the steps that it adds.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The same lambda in every step."""

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
    """Half a cosine from `start` to `end`: flat at both ends."""

    start: float
    """Lambda at the first step."""
    end: float
    """Lambda at the last step."""

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
