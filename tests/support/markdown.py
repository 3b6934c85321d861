"""The blocks, links and headings of Markdown pages."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->$")
FILE_COMMENT = re.compile(r"#\s*([\w./-]+\.(?:yaml|py|csv))\b")  # in the first line of a block: the file that it is


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    """The number of its first line in the page, from 1."""
    language: str
    text: str
    reason: str
    """Why it is not run, by a comment above it: `<!-- not run: needs a GPU -->`; mostly empty."""

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The path that the comment in its first line names."""
        found = FILE_COMMENT.match(self.text)
        return found[1] if found else None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order; those within lists and notes are dedented."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, before = None, ""
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*(```+)\s*(\w*)", line)
        if fence and start is None:
            start, language = number + 1, fence[2]
        elif fence:
            text = textwrap.dedent("\n".join(lines[start - 1 : number - 1])) + "\n"
            reason = NOT_RUN.search(before)
            blocks.append(Block(page, start, language, text, reason[1] if reason else ""))
            start = None
        elif start is None and line.strip():
            before = line
        if fence and start is None:
            before = ""
    assert start is None, f"{page}: a fence is not closed"
    return blocks


def code_spans(page: Path) -> list[str]:
    """What stands between single backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", _without_blocks(page))


def _without_blocks(page: Path) -> str:
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _without_blocks(page))


def links(page: Path) -> list[str]:
    """The targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose(page)) + re.findall(r"<(https?:[^>]+)>", prose(page))


def anchors(page: Path) -> set[str]:
    """The ids of the headings, as MkDocs and GitHub make them."""
    text = _without_blocks(page)
    found, out = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE), set()
    for title in found:
        own = re.search(r"\{ ?#([\w-]+) ?\}$", title)
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\s-]", "", title).strip().lower()
        out.add(own[1] if own else re.sub(r"[\s]+", "-", slug))
    return out | set(re.findall(r"<a id=\"([\w-]+)\"", text))
