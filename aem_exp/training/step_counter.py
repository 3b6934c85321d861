"""Counts the steps and updates of a run."""

from dataclasses import dataclass


@dataclass
class StepCounter:
    """The progress of a run. The trainer counts updates; the callback counts finished steps."""

    steps: int
    """total number of steps, including the steps of the parent run that this run continues"""
    step: int = 0
    """number of finished steps"""
    first_step: int = 0
    """number of steps of the parent run; the schedules of lambda and of the learning rate span the steps after it"""
    updates: int = 0
    """number of updates of all steps so far, including all updates of the current step"""
    is_last_update: bool = False
    """whether the current update is the last one of its step"""

    @property
    def progress(self) -> float:
        """Progress of the schedules: 0 at the first step of this run, 1 at its last step."""
        return (self.step - self.first_step) / max(1, self.steps - self.first_step - 1)

    @property
    def is_finished(self) -> bool:
        return self.step >= self.steps
