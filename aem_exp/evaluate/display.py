"""Terminal display of an evaluation: a progress line while it runs, and the result tables at the end."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from aem_exp.core.console import (
    PRINT_SECONDS,
    counting_bar,
    format_duration,
    forward_log,
    join_texts,
    make_console,
    make_table,
    style_text,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

REFRESH_SECONDS = 0.1  # seconds between two updates of the number of tokens
ENDINGS = {"over": "finished", "turns": "out of turns", "context": "out of context", "stopped": "truncated"}
Results = Mapping[str, Mapping[str, Any]]  # agent -> content of its result.json


class ProgressLine:
    """Shows the progress of an evaluation on stderr: one live line in a terminal, plain lines elsewhere. A context manager."""

    def __init__(self, console: "Console | None" = None, every: float = PRINT_SECONDS) -> None:
        self.console = console or make_console(stderr=True)
        self.bar = counting_bar(self.console)
        self.every, self.printed, self.shown = every, time.monotonic(), -math.inf
        self.task: Any = None
        self.open = ExitStack()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        self.open.enter_context(forward_log(self.show_stage, self.warn, self.note))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()
        if self.console.is_terminal:
            self.bar.stop()

    def show_stage(self, stage: str) -> None:
        """Show what happens before episodes are played, such as loading."""
        self._remove_task()
        if self.console.is_terminal:
            self.task = self.bar.add_task(f"{stage} …", total=None, count="")
        else:
            self.console.print(stage, soft_wrap=True, markup=False)

    def warn(self, sentence: str) -> None:
        """Print a warning above the live line."""
        self.console.print(sentence, soft_wrap=True, markup=False, style="yellow")

    def note(self, sentence: str) -> None:
        """Print a fact above the live line."""
        self.console.print(sentence, soft_wrap=True, markup=False)

    def start_count(self, name: str, total: int, unit: str) -> None:
        """Start a line that counts finished pieces of work; see `show_count`."""
        self._remove_task()
        self.task, self.unit = self.bar.add_task(name, total=total, count=f"0/{total} {unit}"), unit

    def show_count(self, done: int) -> None:
        """Show that `done` pieces of work are finished, and the remaining time."""
        task = self.bar.tasks[-1]
        count = f"{done}/{task.total} {self.unit}"
        self.bar.update(self.task, completed=done, count=count)
        self._print_line(task, count)

    def start_agent(self, agent: str, done: int, episodes: int, max_turns: int) -> None:
        """Start the line of an agent that has played `done` of its episodes."""
        self._remove_task()
        self.task = self.bar.add_task(agent, total=episodes, completed=done, count="")
        self.max_turns, self.over, self.slots = max_turns, done, dict[int, int]()
        self.start_chunk(done, 0)

    def start_chunk(self, done: int, size: int) -> None:
        """Show that the next `size` episodes are being played."""
        self.done, self.size, self.turns, self.tokens = done, size, 0, 0
        self._refresh(done)

    def turn(self, live: int) -> None:
        """Show that `live` episodes of the chunk have played another turn. A live episode counts as played in part."""
        self.turns, self.live, self.tokens = self.turns + 1, live, 0
        self._refresh(self._episodes_played())

    def token(self, count: int) -> None:
        """Show the number of tokens generated in the current turn."""
        self.tokens = count
        if time.monotonic() - self.shown >= REFRESH_SECONDS:
            self._refresh(self._episodes_played())

    def _episodes_played(self) -> float:
        """Return how many episodes are played, with fractions for live episodes."""
        live = self.live if self.turns else self.size
        return self.done + self.size - live * (1 - min(1.0, self.turns / self.max_turns))

    def slot_turn(self, slot: int, turn: int) -> None:
        """Show that the episode in a slot has played this turn. Turn 1 means that the slot has a new episode."""
        self.over += turn == 1 and slot in self.slots
        self.slots[slot] = turn
        self._refresh(self.over + sum(min(1.0, t / self.max_turns) for t in list(self.slots.values())))

    def _refresh(self, done: float) -> None:
        done = max(done, self.over)
        task = self.bar.tasks[-1]
        count = f"{int(done)}/{task.total} episodes{self._format_turn()}"
        self.shown = time.monotonic()
        self.bar.update(self.task, completed=done, count=count)
        self._print_line(task, count)

    def _print_line(self, task: Any, count: str) -> None:
        """Print the line from time to time if the output is not a terminal."""
        if not self.console.is_terminal and time.monotonic() - self.printed >= self.every:
            self.printed = time.monotonic()
            left = f"  {format_duration(task.time_remaining)} left" if task.time_remaining is not None else ""
            self.console.print(f"{task.description} {count}{left}", markup=False)

    def _format_turn(self) -> str:
        """Format the current turn and its tokens, if all episodes of the chunk play in step."""
        if self.slots or not self.size or self.turns >= self.max_turns or not (self.turns or self.tokens):
            return ""
        tokens = f", {self.tokens} token{'s' if self.tokens > 1 else ''}" if self.tokens else ""
        return f", turn {self.turns + 1}/{self.max_turns}{tokens}"

    def _remove_task(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


def print_results(title: str, results: Results, left_out: Mapping[str, str], facts: list[tuple[str, str]]) -> None:
    """Print the scores (also by kind of task, if there are several), why agents are left out, and where the results are."""
    console = make_console()
    console.print(f"\n[italic]{title}[/italic]", soft_wrap=True)
    console.print(_score_table(results))
    if len(kinds := next(iter(results.values()))["by_kind"]) > 1:
        console.print()
        console.print(_kind_table(kinds, results))
    console.print()
    for name, text in [*_notes(results), *((f"no {agent}", why) for agent, why in left_out.items()), *facts]:
        console.print(f"  [bold]{name:<10}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)  # on one line, so that it can be copied


def _notes(results: Results) -> list[tuple[str, str]]:
    """Return how the episodes of each agent ended (also by the env's own metrics), and the first error of crashed ones."""
    ended = []
    for agent, result in results.items():
        shares = [
            f"{ENDINGS.get(how, how)} {count / result['episodes']:.1%}" for how, count in result["endings"].items()
        ]
        endings = {how.removeprefix("end_"): share for how, share in result["habits"].items() if how.startswith("end_")}
        shares += [f"{how.replace('_', ' ')} {share:.1%}" for how, share in endings.items() if share]
        ended.append(f"{agent}: {', '.join(shares)}")
    crashed = [("crashed", f"{agent}: {r['errors'][0]}") for agent, r in results.items() if r["errors"]]
    return [("ended", "; ".join(ended)), *crashed]


def _score_table(results: Results) -> "Table":
    k = next(iter(results.values()))["repeats"]
    several = [f"pass@{k}", f"pass^{k}"] if k > 1 else []
    scored = ["score"] if any(r.get("score") is not None for r in results.values()) else []
    crashed = ["crashed"] if any(r["crashed"] for r in results.values()) else []
    # An audited grader also reports the verdict of the benchmark's own rule, which papers compare.
    official = ["official"] if any("end_resolved_audited" in r["habits"] for r in results.values()) else []
    headings = ("", "success [95%]", *official, *scored, *several, "turns", "tokens", "invalid", "entropy", *crashed)
    rows: list[Sequence[RenderableType]] = []
    for agent, r in results.items():
        low, high = r["interval"]
        share = join_texts((f"{r['success']:.1%}", "bold"), (f" [{100 * low:.0f}, {100 * high:.0f}]", "bright_black"))
        score = [_number(r["habits"].get("end_resolved"), ".1%") for _ in official]
        score += [_number(r.get("score"), ".1%") for _ in scored]
        passes = [f"{r[name][str(k)]:.1%}" for name in ("pass_at", "pass_hat")] if k > 1 else []
        lengths = [_number(r["turns"], ".1f"), _number(r["tokens"], ".0f"), _number(r["invalid_share"], ".1%")]
        crashes = [style_text(str(r["crashed"]), "red" if r["crashed"] else "") for _ in crashed]
        rows.append((agent, share, *score, *passes, *lengths, _number(r["response_entropy"], ".3f"), *crashes))
    return make_table(headings, rows, left=("",), gap=1, no_wrap=True)


def _kind_table(kinds: Mapping[str, float], results: Results) -> "Table":
    tasks = next(iter(results.values()))["tasks_by_kind"]
    rows = [(kind or "-", str(tasks[kind]), *(f"{r['by_kind'][kind]:.1%}" for r in results.values())) for kind in kinds]
    return make_table(("success by kind", "tasks", *results), rows, left=("success by kind",))


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
