"""The progress of an active run in the terminal: one line with the remaining time. It has no effect on the run."""

import math
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from aem_exp.core.console import PRINT_SECONDS, cut_line, format_duration, forward_log, live_line, make_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

RECENT_STEPS = 10  # window of the moving means, in steps
SLOW_SECONDS = 2.0  # after this time, the live line also shows the progress inside a step or panel
SUCCESS, ENTROPY, GATED = "train/success", "train/response_entropy", "aem/gated_share"
CRASHED = "train/ended_crashed"


class Progress:
    """Shows one live line in a terminal, or plain lines elsewhere. Use it as a context manager, and call it after each step."""

    def __init__(self, enabled: bool = True, console: "Console | None" = None, every: float = PRINT_SECONDS) -> None:
        self.console = console or make_console(quiet=not enabled)
        self.live: Any = None
        self.every = every
        self.step, self.steps = 0, 0
        self.stage, self.stage_since = "starting", time.monotonic()
        self.held_out = math.nan
        self.recent = {name: deque[float](maxlen=RECENT_STEPS) for name in (SUCCESS, ENTROPY, GATED)}
        self.times = deque[float](maxlen=RECENT_STEPS + 1)
        self.crashed = deque[float](maxlen=RECENT_STEPS)
        self.printed, self.ended = -math.inf, False
        self.turns, self.play, self.played = 0, "", -math.inf
        self.slots = dict[int, int]()
        self.open = ExitStack()

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.quiet:
            self.live = live_line(self.console, self.render)
            self.live.start()
        self.open.enter_context(forward_log(self.show_stage, self.warn, self.note))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()
        if self.live is not None:
            self.stage = ""
            self.live.transient = not self.steps
            self.live.stop()

    def __call__(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Show that `step` of `steps` is finished, with its metrics."""
        self.step, self.steps, self.stage, self.stage_since = step, steps, "", time.monotonic()
        self._show_play("")
        for name, values in self.recent.items():
            if not math.isnan(value := metrics.get(name, math.nan)):
                values.append(value)
        self.held_out = metrics.get("eval/success", self.held_out)
        if SUCCESS in metrics:
            self.times.append(time.monotonic())
            self.crashed.append(metrics.get(CRASHED, 0.0))
        last = step == steps and not self.ended
        if self.live is None and (time.monotonic() - self.printed >= self.every or last):
            self.printed, self.ended = time.monotonic(), self.ended or last
            self.console.print(self._plain_line(), soft_wrap=True)

    def show_stage(self, stage: str) -> None:
        """Show what the run does outside of training steps, such as loading or evaluating."""
        self.stage, self.stage_since = stage, time.monotonic()
        self._show_play("")
        if self.live is None:
            self.played = self.stage_since
            self.console.print(stage, soft_wrap=True, markup=False)

    def warn(self, sentence: str) -> None:
        """Print a warning above the live line."""
        self.console.print(sentence, soft_wrap=True, markup=False, style="yellow")

    def note(self, sentence: str) -> None:
        """Print a fact above the live line."""
        self.console.print(sentence, soft_wrap=True, markup=False)

    def turn(self, live: int) -> None:
        """Show that `live` parallel episodes have finished another turn; 0 if all are over."""
        self.turns = self.turns + 1 if live else 0
        self._show_play(f"turn {self.turns}, {_count(live, 'episode')}" if live else "")

    def token(self, count: int) -> None:
        """Show the number of tokens generated in the current turn."""
        self._show_play(f"turn {self.turns + 1}, {_count(count, 'token')}")

    def slot_turn(self, slot: int, turn: int) -> None:
        """Show that the episode in a slot has finished a turn, independently of the others."""
        self.slots[slot] = turn
        self._show_play(f"{_count(sum(self.slots.values()), 'turn')}, {_count(len(self.slots), 'episode')} at a time")

    def _show_play(self, text: str) -> None:
        """Set the progress inside a step or panel. Without a terminal, print it if nothing was printed for `every` seconds."""
        self.play = text
        if not text:
            self.turns, self.slots = 0, {}
        elif self.live is None and (now := time.monotonic()) - max(self.printed, self.played) >= self.every:
            self.played = now
            stage = self.stage or f"step {self.step + 1}/{self.steps} in progress"
            self.console.print(f"{stage}: {text}", soft_wrap=True, markup=False)

    def _facts(self) -> list[str]:
        names = {SUCCESS: "success {:.0%}", ENTROPY: "entropy {:.2f}", GATED: "gated {:.0%}"}
        facts = [names[name].format(sum(v) / len(v)) for name, v in self.recent.items() if v]
        if any(self.crashed):
            facts.append(f"crashed {sum(self.crashed) / len(self.crashed):.0%}")
        if not math.isnan(self.held_out):
            facts.append(f"held-out {self.held_out:.0%}")
        if len(self.times) > 1:
            pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            left = pace * (self.steps - self.step)
            facts += [f"{pace:.{2 if pace < 1 else 1}f} s/step", *([f"{format_duration(left)} left"] if left else [])]
        return facts

    def _plain_line(self) -> str:
        return "  ".join([f"step {self.step}/{self.steps}", *self._facts()])

    def render(self) -> "RenderableType":
        line, slow = cut_line(), time.monotonic() - self.stage_since >= SLOW_SECONDS
        if self.steps:
            play = [self.play] if slow and self.play and not self.stage else []
            count, facts = f" {self.step}/{self.steps}", "".join(f"  {fact}" for fact in [*play, *self._facts()])
            width = max(0, min(30, self.console.width - len(count) - len(facts) - 8))
            full = round(width * self.step / self.steps)
            line.append("train ", "bold").append("━" * full, "blue").append("─" * (width - full), "bright_black")
            line.append(count, "bold")
            line.append("" if self.stage else facts)
        if self.stage:
            line.append(f"  {self.stage} …  ").append(
                format_duration(time.monotonic() - self.stage_since), "bright_black"
            )
            line.append(f"  {self.play}" if slow else "", "bright_black")
        return line


def _count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 token`, `2 tokens`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
