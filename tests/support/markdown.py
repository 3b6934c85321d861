"""The blocks, links and headings of Markdown pages."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->$")
PATH = r"([\w./-]+/[\w.-]+|[\w-]+\.(?:yaml|py|csv))"
FILE_MARKS = (  # what says which file a block is: the title of its fence, the line above it, the comment in its first line
    re.compile(rf'title="{PATH}"'),
    re.compile(rf"^`{PATH}`.*:$"),
    re.compile(rf"^#\s*{PATH}"),
)


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
    file: str
    """The path of the file that it is; empty for others."""

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order; those within lists and notes are dedented."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, above, language, info = 0, "", "", ""
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*```+\s*(\w*)(.*)", line)
        if fence and not start:
            start, (language, info) = number + 1, fence.groups()
        elif fence:
            text = textwrap.dedent("\n".join(lines[start - 1 : number - 1])) + "\n"
            reason = NOT_RUN.search(above)
            marks = zip(FILE_MARKS, (info, above, text.partition("\n")[0]), strict=True)
            file = next((found[1] for mark, place in marks if (found := mark.search(place))), "")
            blocks.append(Block(page, start, language, text, reason[1] if reason else "", file))
            start, above = 0, ""
        elif not start and line.strip():
            above = line
    assert not start, f"{page}: a fence is not closed"
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
