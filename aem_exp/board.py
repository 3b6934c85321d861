"""What a person sees of many runs: a table of states that lives while they do. It decides nothing."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aem_exp.progress import clock
from aem_exp.state import DONE, FAILED, NEW, QUEUED, RUNNING, STATES, STOPPED, State

COLOURS: Mapping[str, str] = {DONE: "green", RUNNING: "blue", QUEUED: "cyan", STOPPED: "yellow", FAILED: "red", NEW: ""}
EVERY = 5.0  # seconds between looks
MOST = 60  # rows; of larger sweeps only those that need a look


@dataclass(frozen=True)
class Line:
    """A run on the board: what it is called there, and how it is."""

    name: str
    seed: str
    state: State


def watch(look: Callable[[], Sequence[Line]], title: str, console: Console | None = None, every: float = EVERY) -> None:
    """Show the runs until none of them is live; once where there is no terminal."""
    console = console or Console(highlight=False)
    lines = look()
    if not console.is_terminal:
        console.print(board(lines, title))
        return
    with Live(board(lines, title), console=console, auto_refresh=False) as live:
        while any(line.state.what in (RUNNING, QUEUED) for line in lines):
            time.sleep(every)
            lines = look()
            live.update(board(lines, title), refresh=True)


def board(lines: Sequence[Line], title: str) -> Group:
    """A row per run, and the sum of them."""
    shown = list(lines)
    if len(shown) > MOST:
        shown = [line for line in lines if line.state.what not in (DONE, NEW)][:MOST]
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in ("run", "seed", "state", "step", "left", "success", "starts", "job", ""):
        right = heading in ("seed", "step", "left", "success", "starts")
        table.add_column(heading, header_style="bold", justify="right" if right else "left", no_wrap=bool(heading))
    for line in shown:
        table.add_row(*_row(line))
    return Group(table, Text(f"\n{counted(lines)}" + (f"; {len(shown)} shown" if len(shown) < len(lines) else "")))


def counted(lines: Sequence[Line]) -> str:
    """The sum of a board: `4 done, 2 running`."""
    counts = Counter(line.state.what for line in lines)
    return ", ".join(f"{counts[what]} {what}" for what in STATES if counts[what]) or "no runs"


def _row(line: Line) -> list[Text | str]:
    state = line.state
    what = Text(f"{state.what}{f' ({state.kind})' if state.kind else ''}", COLOURS[state.what])
    left = "" if math.isnan(state.left) else clock(state.left)
    score = f"{state.score[0].partition('/')[0]} {state.score[1]:.0%}" if state.score else ""
    step = f"{state.step}/{state.steps}" if state.steps else ""
    starts = str(state.starts) if state.starts else ""
    return [line.name, line.seed, what, step, left, score, starts, state.job, Text(state.sentence, "bright_black")]
