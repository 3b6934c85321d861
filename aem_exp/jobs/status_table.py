"""The status table of many runs, updated on a terminal until none of them is running or queued."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aem_exp.cluster.run_state import RunState, RunStatus
from aem_exp.core.console import format_duration

COLOURS: Mapping[str, str] = {
    RunStatus.DONE: "green",
    RunStatus.RUNNING: "blue",
    RunStatus.QUEUED: "cyan",
    RunStatus.STOPPED: "yellow",
    RunStatus.FAILED: "red",
    RunStatus.NEW: "",
}
REFRESH_SECONDS = 5.0  # seconds between looks
HEADINGS = ("id", "run", "seed", "state", "step", "left", "success", "starts", "job")
OPTIONAL_HEADINGS = ("left", "success", "starts", "job")  # left out where they are empty
MIN_NAME_WIDTH = 10  # columns of a name, which goes on in the next line: so that a table fits into 80
MAX_ROWS = 60  # rows; of larger sweeps only those that need a look


@dataclass(frozen=True)
class StatusRow:
    """A run on the board: the first digits of its signature, what it is called there, and how it is."""

    id: str
    name: str
    seed: str
    state: RunState


def watch_runs(
    look: Callable[[], Sequence[StatusRow]], title: str, console: Console | None = None, every: float = REFRESH_SECONDS
) -> None:
    """Show the runs until none of them is live; once where there is no terminal."""
    console = console or Console(highlight=False)
    lines = look()
    if not console.is_terminal:
        console.print(status_table(lines, title))
        return
    with Live(status_table(lines, title), console=console, auto_refresh=False) as live:
        while any(line.state.what in (RunStatus.RUNNING, RunStatus.QUEUED) for line in lines):
            time.sleep(every)
            lines = look()
            live.update(status_table(lines, title), refresh=True)


def status_table(lines: Sequence[StatusRow], title: str) -> Group:
    """A row per run, and the sum of them."""
    shown = list(lines)
    if len(shown) > MAX_ROWS:
        shown = [line for line in lines if line.state.what not in (RunStatus.DONE, RunStatus.NEW)][:MAX_ROWS]
    rows = [_row_cells(line) for line in shown]
    table = Table(box=None, padding=(0, 1, 0, 0))
    columns = [heading for heading in HEADINGS if heading not in OPTIONAL_HEADINGS or any(row[heading] for row in rows)]
    for heading in columns:
        right = heading in ("seed", "step", "left", "success", "starts")
        how = {"overflow": "fold", "min_width": MIN_NAME_WIDTH} if heading == "run" else {"no_wrap": True}
        table.add_column(heading, header_style="bold", justify="right" if right else "left", **how)
    for row in rows:
        table.add_row(*(row[heading] for heading in columns))
    whole = count_states(lines) + (f"; {len(shown)} shown" if len(shown) < len(lines) else "")
    return Group(Text(title, "italic"), table, *_reason_lines(shown), Text(f"\n{whole}"))


def _reason_lines(lines: Sequence[StatusRow]) -> list[Text]:
    """Why runs wait or have failed, below the table: a sentence needs its width."""
    waiting_or_ended = (RunStatus.FAILED, RunStatus.STOPPED, RunStatus.QUEUED)
    notes = [line for line in lines if line.state.sentence and line.state.what in waiting_or_ended]
    said = [Text.assemble((f"{line.id}  ", "bold"), (line.state.sentence, "bright_black")) for line in notes]
    return [Text(), *said] if said else []


def count_states(lines: Sequence[StatusRow]) -> str:
    """The sum of a board: `4 done, 2 running`."""
    counts = Counter(line.state.what for line in lines)
    return ", ".join(f"{counts[what]} {what}" for what in RunStatus if counts[what]) or "no runs"


def _row_cells(line: StatusRow) -> dict[str, Text | str]:
    state = line.state
    what = Text(f"{state.what}{f' ({state.kind})' if state.kind else ''}", COLOURS[state.what])
    left = "" if math.isnan(state.left) else format_duration(state.left)
    score = f"{state.score[0].partition('/')[0]} {state.score[1]:.0%}" if state.score else ""
    step = f"{state.step}/{state.steps}" if state.steps else ""
    starts = str(state.starts) if state.starts > 1 else ""
    cells = (line.id, line.name, line.seed, what, step, left, score, starts, state.job)
    return dict(zip(HEADINGS, cells, strict=True))
