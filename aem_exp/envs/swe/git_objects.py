"""Writes git's formats without git: a history as a `git fast-import` stream with its commit id, and patches."""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final

FIRST_COMMIT_SECONDS: Final = 1_700_000_000  # Unix time of the first commit
AUTHOR: Final = "Robin <robin@example.org>"


def diff(path: str, old: str, new: str) -> str:
    """A patch of one file, as git writes it. An empty text stands for no file."""
    mode = "new file mode 100644\n" if not old else "deleted file mode 100644\n" if not new else ""
    names = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    lines = difflib.unified_diff(_split_lines(old), _split_lines(new), *names)
    whole = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return f"diff --git a/{path} b/{path}\n{mode}" + "".join(whole)


def _split_lines(text: str) -> list[str]:
    """The lines of a text, as git counts them: only a line feed ends a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def build_history(commits: Sequence[tuple[Mapping[str, str], str]]) -> tuple[bytes, str]:
    """A stream of commits (files, message), one day apart, and the id of the last commit.

    No commit may remove a file.
    """
    stream, parent = b"", ""
    for number, (files, message) in enumerate(commits):
        signature = f"{AUTHOR} {FIRST_COMMIT_SECONDS + 86_400 * number} +0000"
        parents = f"parent {parent}\n" if parent else ""
        header = f"tree {_tree_id(files)}\n{parents}author {signature}\ncommitter {signature}\n"
        parent = _object_id("commit", f"{header}\n{message}".encode())
        changes = b"".join(
            b"M 100644 inline %s\n%s" % (name.encode(), _data_block(text)) for name, text in sorted(files.items())
        )
        stream += f"commit refs/heads/main\nauthor {signature}\ncommitter {signature}\n".encode()
        stream += _data_block(message) + changes
    return stream + b"done\n", parent


def _data_block(text: str) -> bytes:
    return b"data %d\n%s\n" % (len(text.encode()), text.encode())


def _tree_id(files: Mapping[str, str]) -> str:
    """The git id of a folder of files."""
    folders: dict[str, dict[str, str]] = {}
    entries = []
    for name, text in files.items():
        head, _, rest = name.partition("/")
        if rest:
            folders.setdefault(head, {})[rest] = text
        else:
            entries.append((name, b"100644 %s\0" % name.encode() + bytes.fromhex(_object_id("blob", text.encode()))))
    entries += [
        (f"{name}/", b"40000 %s\0" % name.encode() + bytes.fromhex(_tree_id(inside)))
        for name, inside in folders.items()
    ]
    return _object_id("tree", b"".join(entry for _, entry in sorted(entries)))


def _object_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content, usedforsecurity=False).hexdigest()
