"""Terminal output, the only module that imports rich: tables, texts, live lines, progress bars; and silenced libraries.

rich is imported when something is shown, so that `--help` is instant. `forward_log` shows what the logger `aem_exp` logs.
"""

import logging
import os
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

PRINT_SECONDS = 10.0  # seconds between lines where there is no terminal

_ENVIRONMENT = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",  # of transformers, which TRL would import MLflow for; the package `tracking` imports it
}
_NOISY_LIBRARIES = (
    *("transformers", "trl", "datasets", "accelerate", "peft", "huggingface_hub", "torch", "mlflow", "alembic"),
    *("sqlalchemy", "matplotlib", "PIL", "httpx", "urllib3", "filelock", "git", "fsspec"),
)


def silence_libraries() -> None:
    """Silence the libraries; call it before they are imported. What a user has set in the environment stands."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    for kind in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)


@contextmanager
def forward_log(show: Callable[[str], None], warn: Callable[[str], None]) -> Iterator[None]:
    """Show what `aem_exp` logs, and nowhere else: INFO, which is being waited for, by `show`; warnings by `warn`."""
    log, handler = logging.getLogger("aem_exp"), logging.Handler(logging.INFO)
    handler.emit = lambda record: (warn if record.levelno >= logging.WARNING else show)(record.getMessage())  # type: ignore[method-assign]
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
    """Spell a duration as a person would: `45 s`, `3:20 min`, `2:05 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


def make_console(stderr: bool = False, quiet: bool = False) -> "Console":
    """A console that colours nothing by itself."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, highlight=False)


def make_table(
    headings: Sequence[str],
    rows: "Iterable[Sequence[RenderableType]]",
    left: Collection[str] = (),
    gap: int = 2,
    indent: int = 0,
    no_wrap: bool = False,
    fold: Mapping[str, int] | None = None,
) -> "Table":
    """A table without lines, its headings bold, its columns aligned right.

    Args:
        left: the columns that are aligned left.
        gap: spaces after a column.
        indent: spaces before a column.
        no_wrap: no cell goes on in the next line.
        fold: the columns whose cells do all the same, and their least width.
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
    from rich.text import Text

    return Text(text, style)


def join_texts(*parts: str | tuple[str, str]) -> "Text":
    """Texts in one line, those of a pair in its style."""
    from rich.text import Text

    return Text.assemble(*parts)


def stack_lines(*lines: str | tuple[str, str]) -> "Text":
    """Texts in lines, those of a pair in its style."""
    from rich.text import Text

    return Text("\n").join([Text(line) if isinstance(line, str) else Text(*line) for line in lines])


def cut_line() -> "Text":
    """An empty line to append to, which is cut where the terminal ends."""
    from rich.text import Text

    return Text(no_wrap=True, overflow="ellipsis")


def stack(*parts: "RenderableType") -> "Group":
    """One under another."""
    from rich.console import Group

    return Group(*parts)


def side_by_side(parts: "Sequence[RenderableType]") -> "Columns":
    """One beside another, as far as the width goes."""
    from rich.columns import Columns

    return Columns(parts, padding=(1, 3))


def live_line(console: "Console", render: "Callable[[], RenderableType]") -> "Live":
    """A line that is rendered 4 times a second, from its start to its stop."""
    from rich.live import Live

    return Live(console=console, get_renderable=render, refresh_per_second=4)


def live_table(console: "Console", first: "RenderableType") -> "Live":
    """A table that is updated by its caller."""
    from rich.live import Live

    return Live(first, console=console, auto_refresh=False)


def counting_bar(console: "Console") -> "Progress":
    """A bar with its task's field `count` and the time that is left, gone when it stops."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.fields[count]}", markup=False)
    return Progress(description, BarColumn(20), count, TimeRemainingColumn(), console=console, transient=True)


@contextmanager
def progress_bar(what: str, console: "Console | None" = None) -> Iterator[Callable[[int, int], None]]:
    """Show how far something long has got, `advance(done, of)`: a bar with the time left, or a line now and then."""
    from rich.progress import Progress

    console = console or make_console(stderr=True)
    printed = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, of: int) -> None:
            nonlocal printed
            bar.update(task, completed=done, total=of)
            if not console.is_terminal and time.monotonic() - printed >= PRINT_SECONDS:
                printed = time.monotonic()
                console.print(f"{what}: {done / max(1, of):.0%}", soft_wrap=True)

        yield advance
