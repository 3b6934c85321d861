"""The status table of many runs, updated on a terminal until none of them is running or queued."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aem_exp.cluster.run_state import RunState, RunStatus
from aem_exp.core.console import format_duration, join_texts, live_table, make_console, make_table, stack, style_text

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

COLOURS: Mapping[str, str] = {
    RunStatus.DONE: "green",
    RunStatus.RUNNING: "blue",
    RunStatus.QUEUED: "cyan",
    RunStatus.STOPPED: "yellow",
    RunStatus.FAILED: "red",
    RunStatus.NEW: "",
}
REFRESH_SECONDS = 5.0
HEADINGS = ("id", "run", "seed", "state", "step", "left", "success", "starts", "job")
LEFT_HEADINGS = ("id", "run", "state", "job")
OPTIONAL_HEADINGS = ("left", "success", "starts", "job")  # left out if the whole column is empty
MIN_NAME_WIDTH = 10  # a longer name wraps to the next line, so that the table fits into 80 columns
MAX_ROWS = 60  # larger tables show only runs that are running, queued, stopped or failed


@dataclass(frozen=True)
class StatusRow:
    """A row of the table."""

    id: str
    """The first digits of the signature."""
    name: str
    seed: str
    state: RunState


def watch_runs(
    read_rows: Callable[[], Sequence[StatusRow]],
    title: str,
    console: "Console | None" = None,
    every: float = REFRESH_SECONDS,
) -> None:
    """Show the runs until none is running or queued. Without a terminal, print the table once."""
    console = console or make_console()
    rows = read_rows()
    if not console.is_terminal:
        console.print(status_table(rows, title))
        return
    with live_table(console, status_table(rows, title)) as live:
        while any(row.state.what in (RunStatus.RUNNING, RunStatus.QUEUED) for row in rows):
            time.sleep(every)
            rows = read_rows()
            live.update(status_table(rows, title), refresh=True)


def status_table(rows: Sequence[StatusRow], title: str) -> "Group":
    """The table with a row per run, the reasons, and the counts."""
    listed = list(rows)
    if len(listed) > MAX_ROWS:
        listed = [row for row in rows if row.state.what not in (RunStatus.DONE, RunStatus.NEW)][:MAX_ROWS]
    cells = [_row_cells(row) for row in listed]
    headings = [name for name in HEADINGS if name not in OPTIONAL_HEADINGS or any(row[name] for row in cells)]
    table = make_table(
        headings,
        [[row[name] for name in headings] for row in cells],
        left=LEFT_HEADINGS,
        gap=1,
        no_wrap=True,
        fold={"run": MIN_NAME_WIDTH},
    )
    total = count_states(rows) + (f"; {len(listed)} shown" if len(listed) < len(rows) else "")
    return stack(style_text(title, "italic"), table, *_reason_lines(listed), style_text(f"\n{total}"))


def _reason_lines(rows: Sequence[StatusRow]) -> "list[Text]":
    """The reasons of pending, stopped and failed runs, below the table, where a sentence has enough width."""
    waiting_or_ended = (RunStatus.FAILED, RunStatus.STOPPED, RunStatus.QUEUED)
    explained = [row for row in rows if row.state.sentence and row.state.what in waiting_or_ended]
    lines = [join_texts((f"{row.id}  ", "bold"), (row.state.sentence, "bright_black")) for row in explained]
    return [style_text(""), *lines] if lines else []


def count_states(rows: Sequence[StatusRow]) -> str:
    """The number of runs in each state, such as `4 done, 2 running`."""
    counts = Counter(row.state.what for row in rows)
    return ", ".join(f"{counts[what]} {what}" for what in RunStatus if counts[what]) or "no runs"


def _row_cells(row: StatusRow) -> "dict[str, Text | str]":
    state = row.state
    what = style_text(f"{state.what}{f' ({state.kind})' if state.kind else ''}", COLOURS[state.what])
    left = "" if math.isnan(state.left) else format_duration(state.left)
    score = f"{state.score[0].partition('/')[0]} {state.score[1]:.0%}" if state.score else ""
    step = f"{state.step}/{state.steps}" if state.steps else ""
    starts = str(state.starts) if state.starts > 1 else ""
    cells = (row.id, row.name, row.seed, what, step, left, score, starts, state.job)
    return dict(zip(HEADINGS, cells, strict=True))
