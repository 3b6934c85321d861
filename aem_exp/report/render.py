"""Render a report as one self-contained HTML page, as Markdown, and as one CSV file per table."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aem_exp.core import disk

TEMPLATE: Final = "report.html"
MANIFEST: Final = ".written"  # in the folder of tables: the names of the files that the last report wrote
CODE_COLUMNS: Final = ("command",)  # columns that are shown as code


@dataclass(frozen=True)
class Table:
    """A table with a note below it. A column is right-aligned if all its cells are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all its cells are numbers."""
        return [
            bool(self.rows) and all(re.fullmatch(r"[-+]?[\d,.]+(e[-+]\d+)?( ± \S+)?|-?", row[i]) for row in self.rows)
            for i in range(len(self.columns))
        ]

    @property
    def name(self) -> str:
        """The name of its CSV file, without suffix."""
        return re.sub(r"[^a-z0-9]+", "_", self.title.lower()).strip("_")


@dataclass(frozen=True)
class Figure:
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph, or preformatted text if `code` is true."""

    text: str
    code: bool = False


Block = Table | Figure | Text


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    title: str
    question: str
    sections: Sequence[Section]

    def tables(self) -> Iterator[Table]:
        for section in self.sections:
            yield from (block for block in section.blocks if isinstance(block, Table))


def render_html(report: Report) -> str:
    """The page; whatever runs are called, they cannot add to it."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("aem_exp.report", ""), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    kinds = {"Table": Table, "Figure": Figure, "Text": Text}
    environment.tests |= {
        name.lower(): lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()
    }
    return environment.get_template(TEMPLATE).render(report=report, code=CODE_COLUMNS)


def render_markdown(report: Report) -> str:
    """The report as Markdown, without figures."""
    lines = [f"# {_escape_markdown(report.title)}", "", _escape_markdown(report.question), ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_markdown_lines(block), ""]
    return "\n".join(lines)


def _markdown_lines(block: Block) -> list[str]:
    match block:
        case Text(text, True):
            fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
            return [fence, text, fence]
        case Text(text):
            return [_escape_markdown(text)]
        case Figure(title):
            return [f"(In the HTML page: a figure, {title}.)"]
    rules = ["---:" if numeric else "---" for numeric in block.numeric]
    body = [
        [
            _markdown_code(cell) if c in CODE_COLUMNS and cell else _escape_markdown(cell)
            for c, cell in zip(block.columns, row, strict=True)
        ]
        for row in block.rows
    ]
    rows = [f"| {' | '.join(row)} |" for row in (map(_escape_markdown, block.columns), rules, *body)]
    return [
        f"**{_escape_markdown(block.title)}**",
        "",
        *rows,
        *(["", _escape_markdown(block.note)] if block.note else []),
    ]


def _escape_markdown(text: str) -> str:
    """Escape the special characters of Markdown."""
    return re.sub(r"([\\`*_|<>&\[\]])", r"\\\1", text).replace("\n", " ")


def _markdown_code(text: str) -> str:
    return f"`{text.replace('`', '').replace('|', chr(92) + '|')}`"


def _escape_csv(cell: str) -> str:
    """Escape a cell that a spreadsheet would read as a formula. Numbers are not changed."""
    return f"'{cell}" if re.match(r"[=+@\t\r-](?![\d.]+$)", cell) and cell != "-" else cell


def write(report: Report, folder: Path, curves: Sequence[Sequence[object]]) -> list[Path]:
    """Write `index.html`, `report.md`, `tables/*.csv` and `tables/curves.csv`; return the files, the page first.

    Tables of an earlier report that this report does not have are removed. No other file is removed.
    """
    tables: dict[str, Sequence[Sequence[object]]] = {f"{t.name}.csv": [t.columns, *t.rows] for t in report.tables()}
    tables["curves.csv"] = curves
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    listed = folder / "tables" / MANIFEST
    for name in set(listed.read_text().split() if listed.is_file() else ()) - set(tables):
        if re.fullmatch(r"[a-z0-9_]+\.csv", name):
            (folder / "tables" / name).unlink(missing_ok=True)
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [[_escape_csv(c) if isinstance(c, str) else c for c in r] for r in rows]
        )
        disk.write_atomically(folder / "tables" / name, text.getvalue())
    disk.write_atomically(listed, "".join(f"{name}\n" for name in tables))
    disk.write_atomically(folder / "report.md", render_markdown(report))
    disk.write_atomically(folder / "index.html", render_html(report))
    return [folder / "index.html", folder / "report.md", *(folder / "tables" / name for name in tables)]
