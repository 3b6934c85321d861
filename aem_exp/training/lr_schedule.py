"""Makes the learning rate follow steps, like all schedules: the updates of a step share one learning rate."""

from typing import Any

from aem_exp.training.step_counter import StepCounter


class PerStepScheduler:
    """Wraps a learning rate scheduler so that it advances once per step, not once per update."""

    def __init__(self, scheduler: Any, time: StepCounter):
        self._scheduler, self._time = scheduler, time

    def step(self) -> None:
        if self._time.is_last_update:
            self._scheduler.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the saved state; set the learning rate from the config and the step counter.

        A continued run may have another learning rate or schedule than its parent.
        """
        scheduler = self._scheduler
        scheduler.last_epoch = self._time.step - self._time.first_step
        scheduler._step_count = scheduler.last_epoch + 1
        scheduler._last_lr = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
