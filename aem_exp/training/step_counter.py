"""Which step a run is at, and how far it is."""

from dataclasses import dataclass


@dataclass
class StepCounter:
    """Where a run is. The trainer plays steps, the callback ends them."""

    steps: int
    """all steps, including those of a run that this one continues"""
    step: int = 0
    """finished steps"""
    first_step: int = 0
    """steps of the run that this one continues; lambda and the learning rate, which follow progress, span the other steps"""
    updates: int = 0
    """updates of all steps so far, the current one included"""
    is_last_update: bool = False
    """the current update is the last one of its step"""

    @property
    def progress(self) -> float:
        """0 at the first step of this run, 1 at its last."""
        return (self.step - self.first_step) / max(1, self.steps - self.first_step - 1)

    @property
    def is_finished(self) -> bool:
        return self.step >= self.steps
