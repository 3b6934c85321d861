"""Terminal output: tables, texts, live lines, progress bars, log lines; and settings that silence other libraries.

It is the only module that imports rich. The import is delayed until something is shown, so that `--help` is fast.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

PRINT_SECONDS = 10.0  # seconds between progress lines when the output is not a terminal
NOTE = logging.INFO + 5  # log level of a fact for the user; a message at INFO says what the program waits for

_ENVIRONMENT = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",  # of transformers: TRL would import MLflow for it; `tracking` imports MLflow itself
}
_NOISY_LIBRARIES = (
    *("transformers", "trl", "datasets", "accelerate", "peft", "huggingface_hub", "torch", "mlflow", "alembic"),
    *("sqlalchemy", "matplotlib", "PIL", "httpx", "urllib3", "filelock", "git", "fsspec"),
)


def silence_libraries() -> None:
    """Silence the log and warnings of libraries. Call it before they are imported. Variables that the user has set are kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    for kind in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)


@contextmanager
def forward_log(
    show: Callable[[str], None], warn: Callable[[str], None], note: Callable[[str], None]
) -> Iterator[None]:
    """Send the log of `aem_exp` only to `show` (INFO), `note` (`NOTE`) and `warn` (warnings)."""
    log, handler = logging.getLogger("aem_exp"), logging.Handler(logging.INFO)

    def emit(record: logging.LogRecord) -> None:
        to = warn if record.levelno >= logging.WARNING else note if record.levelno >= NOTE else show
        to(record.getMessage())

    handler.emit = emit  # type: ignore[method-assign]
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def format_duration(seconds: float) -> str:
    """Format a duration: `45 s`, `3:20 min`, `2:05 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


def make_console(stderr: bool = False, quiet: bool = False) -> "Console":
    """A console without automatic highlighting. It becomes quiet when its reader ends, such as `| tee` after Ctrl-C."""
    from rich.console import Console

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program, which may have steps to save
            self.quiet = True
            stream = sys.stderr if self.stderr else sys.stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    return LastingConsole(stderr=stderr, quiet=quiet, highlight=False)


def make_table(
    headings: Sequence[str],
    rows: "Iterable[Sequence[RenderableType]]",
    left: Collection[str] = (),
    gap: int = 2,
    indent: int = 0,
    no_wrap: bool = False,
    fold: Mapping[str, int] | None = None,
) -> "Table":
    """A table without lines, with bold headings and right-aligned columns.

    Args:
        left: columns that are aligned left.
        gap: spaces after each column.
        indent: spaces before each column.
        no_wrap: cut long cells instead of wrapping them.
        fold: columns that are wrapped in any case, and their minimum width.
    """
    from rich.table import Table

    fold = fold or {}
    table = Table(box=None, padding=(0, gap, 0, indent))
    for heading in headings:
        table.add_column(
            heading,
            header_style="bold",
            justify="left" if heading in left else "right",
            overflow="fold" if heading in fold else "ellipsis",
            no_wrap=no_wrap and heading not in fold,
            min_width=fold.get(heading),
        )
    for row in rows:
        table.add_row(*row)
    return table


def style_text(text: str, style: str = "") -> "Text":
    """A text in one style."""
    from rich.text import Text

    return Text(text, style)


def join_texts(*parts: str | tuple[str, str]) -> "Text":
    """Join texts in one line; a pair is a text and its style."""
    from rich.text import Text

    return Text.assemble(*parts)


def stack_lines(*lines: str | tuple[str, str]) -> "Text":
    """Put each text on its own line; a pair is a text and its style."""
    from rich.text import Text

    return Text("\n").join([Text(line) if isinstance(line, str) else Text(*line) for line in lines])


def cut_line() -> "Text":
    """An empty line to append to; it is cut at the width of the terminal."""
    from rich.text import Text

    return Text(no_wrap=True, overflow="ellipsis")


def stack(*parts: "RenderableType") -> "Group":
    """Put parts below each other."""
    from rich.console import Group

    return Group(*parts)


def side_by_side(parts: "Sequence[RenderableType]") -> "Columns":
    """Put parts next to each other, as many as fit in the width."""
    from rich.columns import Columns

    return Columns(parts, padding=(1, 3))


def live_line(console: "Console", render: "Callable[[], RenderableType]") -> "Live":
    """A line that is rendered 4 times a second while it is live."""
    from rich.live import Live

    return Live(console=console, get_renderable=render, refresh_per_second=4)


def live_table(console: "Console", first: "RenderableType") -> "Live":
    """A table that the caller updates."""
    from rich.live import Live

    return Live(first, console=console, auto_refresh=False)


def counting_bar(console: "Console") -> "Progress":
    """A progress bar with the task field `count` and the remaining time; it disappears at the end."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.fields[count]}", markup=False)
    return Progress(description, BarColumn(20), count, TimeRemainingColumn(), console=console, transient=True)


@contextmanager
def progress_bar(name: str, console: "Console | None" = None) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a long task: a bar on a terminal, otherwise a line every 10 s.

    Yields:
        advance(done, total): the function that updates the progress.
    """
    from rich.progress import Progress

    console = console or make_console(stderr=True)
    printed = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def advance(done: int, total: int) -> None:
            nonlocal printed
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - printed >= PRINT_SECONDS:
                printed = time.monotonic()
                console.print(f"{name}: {done / max(1, total):.0%}", soft_wrap=True)

        yield advance
