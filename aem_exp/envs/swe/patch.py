"""Makes an agent's patch: the files that changed are copied out of its sandbox, and this machine's git compares them.

Nothing in the agent's sandbox decides how the patch is made: no `.git` folder, git configuration, attribute, hook or program
there can hide a change or add one. A file counts as changed if its type, mode, size, inode or change time differs from a listing
that was made before the agent's first turn. Unlike the modification time, the change time cannot be set by a program.
"""

import io
import os
import subprocess
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from aem_exp.sandboxes import Sandbox, SandboxBroken, SandboxLost

READ_SECONDS: Final = 60.0  # to list or copy the files of a repository
GIT_SECONDS: Final = 60.0  # for this machine's git
LIST_COMMAND: Final = "find . -name .git -prune -o \\( -type f -o -type l \\) -printf '%P\\0%y %m %s %i %C@\\0'"
COPY_COMMAND: Final = "tar --create --file=- --no-recursion --hard-dereference --null --files-from=- 2>/dev/null"
# The programs that grading needs. Without this check, every patch of an image without one of them would be empty.
CHECK_COMMAND: Final = (
    "for name in git tar find; do command -v $name > /dev/null || { echo the image has no $name; exit 127; }; done;"
    " test -w /tmp || { echo the image has no writable /tmp; exit 126; }"
)
IGNORED_COMMAND: Final = "git -c core.fsmonitor=false check-ignore -z --stdin 2>/dev/null"
MARK: Final = b"\0\0\n"  # between the outputs of commands that run together
MARK_COMMAND: Final = "printf '\\0\\0\\n'"
MAX_UNFILTERED_BYTES: Final = 1 << 20  # if changed files are larger, those that git ignores are not copied
MAX_NAMES: Final = 50_000  # longest list of names in a command, which has it twice; Linux limits an argument to 128 KiB
DIFF_OPTIONS: Final = (
    *("--binary", "--no-color", "--no-ext-diff", "--no-textconv"),
    *("--no-renames", "--src-prefix=a/", "--dst-prefix=b/"),
)

Listing = Mapping[str, str]  # path -> type, mode, size, inode and change time


class File(NamedTuple):
    """A file of a repository, as git stores it."""

    mode: str
    """`100644`, `100755` (executable) or `120000` (symbolic link)."""
    content: bytes
    """The content, or the target of a link."""


@dataclass(frozen=True)
class Changes:
    """What an agent did to the files of a repository."""

    written: Mapping[str, File]
    """Paths that are new or changed, with their present content."""
    removed: frozenset[str] = frozenset()
    """Paths that no longer exist."""

    @property
    def paths(self) -> list[str]:
        return sorted({*self.written, *self.removed})

    def without(self, paths: Collection[str]) -> "Changes":
        """The changes of all other paths."""
        written = {path: file for path, file in self.written.items() if path not in paths}
        return Changes(written, self.removed.difference(paths))


@dataclass(frozen=True)
class Base:
    """What a fresh repository has at the paths of a change."""

    files: Mapping[str, File]
    """The files there."""
    ignored: frozenset[str] = frozenset()
    """The paths that are not tracked and that git ignores."""


class UnreadableChanges(Exception):
    """The changes cannot be copied: they are too large, or the agent made its repository unreadable."""


def set_up(sandbox: Sandbox, script: str, stdin: bytes, seconds: float) -> Listing:
    """Prepare the repository of an agent with a script, and list its files. See `list_files`."""
    output = _run_or_raise(sandbox, f"{CHECK_COMMAND}\n{script}\n{MARK_COMMAND}\n{LIST_COMMAND}", stdin, seconds)
    return _parse_listing(output.partition(MARK)[2])


def set_up_and_read(sandbox: Sandbox, script: str, stdin: bytes, paths: Collection[str]) -> Base:
    """Prepare a fresh repository with a script, and look up paths in it.

    Raises:
        UnreadableChanges: see `read_files`.
    """
    names = printf_names(paths)
    if len(names) > MAX_NAMES:
        sandbox.run(script, READ_SECONDS, stdin)
        return Base(read_files(sandbox, paths), read_ignored(sandbox, paths))
    ignored, copied = f"printf '{names}' | {IGNORED_COMMAND} || true", f"printf '{names}' | {COPY_COMMAND}"
    command = "\n".join([script, MARK_COMMAND, ignored, MARK_COMMAND, copied])
    _, _, outputs = _run_or_raise(sandbox, command, stdin, check=False).partition(MARK)
    ignored_names, _, archive = outputs.partition(MARK)
    return Base(parse_archive(archive, paths), _parse_names(ignored_names))


def printf_names(paths: Collection[str]) -> str:
    """The paths in the form that `COPY_COMMAND` reads, as an argument of the shell's `printf`."""
    return "".join(f"\\{byte:03o}" for byte in _list_names(paths))


def list_files(sandbox: Sandbox) -> Listing:
    """List the files and links of the repository, without those in folders named `.git`.

    Raises:
        UnreadableChanges: the sandbox has no repository or no `find`, or the list is longer than its output may be.
        SandboxLost: the sandbox was lost.
    """
    return _parse_listing(_run_or_raise(sandbox, LIST_COMMAND))


def _parse_listing(output: bytes) -> Listing:
    fields = output.split(b"\0")
    pairs = zip(fields[0:-1:2], fields[1:-1:2], strict=False)
    return {os.fsdecode(path): status.decode("ascii", "replace") for path, status in pairs}


def read_changes(sandbox: Sandbox, before: Listing) -> Changes:
    """Compare the repository with a listing made before, and copy the changed files.

    Raises:
        UnreadableChanges: see there.
        SandboxLost: the sandbox was lost.
    """
    after = list_files(sandbox)
    changed = [path for path, status in after.items() if before.get(path) != status and is_safe_path(path)]
    if sum(_size(after[path]) for path in changed) > MAX_UNFILTERED_BYTES:  # such as installed packages
        ignored = read_ignored(sandbox, changed)
        changed = [path for path in changed if path not in ignored]
    return Changes(read_files(sandbox, changed), frozenset(before.keys() - after.keys()))


def read_files(sandbox: Sandbox, paths: Collection[str]) -> dict[str, File]:
    """Copy files and links out of a sandbox. Paths that do not exist or cannot be read there are left out.

    Raises:
        UnreadableChanges: the files are larger than an output of the sandbox may be, or `tar` does not work there.
    """
    if not paths:
        return {}
    return parse_archive(_run_or_raise(sandbox, COPY_COMMAND, _list_names(paths), check=False), paths)


def read_ignored(sandbox: Sandbox, paths: Collection[str]) -> frozenset[str]:
    """The untracked paths that git ignores there. Empty if git cannot tell, so that its failure hides no change."""
    try:
        return _parse_names(sandbox.run(IGNORED_COMMAND, READ_SECONDS, _list_names(paths)).output)
    except SandboxBroken:
        return frozenset()


def _list_names(paths: Collection[str]) -> bytes:
    return b"".join(b"./%s\0" % os.fsencode(path) for path in paths)


def _parse_names(output: bytes) -> frozenset[str]:
    return frozenset(os.fsdecode(name.removeprefix(b"./")) for name in output.split(b"\0") if name)


def _size(status: str) -> int:
    """The size in an entry of a listing; 0 if it has none."""
    fields = status.split(" ")
    return int(fields[2]) if len(fields) > 2 and fields[2].isdecimal() else 0


def parse_archive(archive: bytes, paths: Collection[str]) -> dict[str, File]:
    """The files with these paths in the output of `COPY_COMMAND`. Raises UnreadableChanges."""
    wanted, files = set(paths), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            for member in members:
                path = member.name.removeprefix("./")
                if path not in wanted or member.size > len(archive):  # a sparse file may state any size
                    continue
                if member.issym():
                    files[path] = File("120000", os.fsencode(member.linkname))
                elif member.isreg() and (content := members.extractfile(member)):
                    files[path] = File("100755" if member.mode & 0o100 else "100644", content.read(len(archive)))
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise UnreadableChanges(f"the copy of the changed files cannot be read: {error}") from error
    return files


def drop_irrelevant(changes: Changes, base: Base) -> Changes:
    """Drop files whose content is as before, and untracked files that git ignores, such as compiled ones."""
    unchanged = {path for path, file in base.files.items() if changes.written.get(path) == file}
    return changes.without(unchanged | base.ignored)


def diff(base: Mapping[str, File], changes: Changes) -> bytes:
    """The patch that turns the base into the changed files; empty if their contents are equal.

    Args:
        base: the original files of the changed paths.

    Raises:
        UnreadableChanges: git does not accept a path, such as `a//b`.
        SandboxLost: git does not work on this machine.
    """
    if not changes.paths:
        return b""
    with TemporaryDirectory(prefix="aem-exp-patch-") as folder:
        _git(folder, "init", "-q", "--bare", ".")
        original = {path: file for path, file in base.items() if path in changes.written or path in changes.removed}
        stream = _commit("base", original) + _commit("changed", changes.written) + b"done\n"
        try:
            _git(folder, "fast-import", "--quiet", "--done", stdin=stream)
        except SandboxLost as error:  # the stream is the agent's, so this is its failure
            raise UnreadableChanges(str(error)) from error
        return _git(folder, "diff", *DIFF_OPTIONS, "base", "changed")


def is_safe_path(path: str) -> bool:
    """Whether a path lies in the repository and outside of every `.git` folder."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts) and not path.startswith("/") and not any(part == ".." or part.lower() == ".git" for part in parts)
    )


def _run_or_raise(
    sandbox: Sandbox, command: str, stdin: bytes = b"", seconds: float = READ_SECONDS, check: bool = True
) -> bytes:
    try:
        ran = sandbox.run(command, seconds, stdin)
    except SandboxBroken as broken:
        raise UnreadableChanges(f"no command can run in the repository: {broken}") from broken
    if ran.stop_reason or (check and ran.code):
        raise UnreadableChanges(ran.stop_reason or ran.text.strip()[-300:])
    return ran.output


def _commit(branch: str, files: Mapping[str, File]) -> bytes:
    """A commit without a parent, for `git fast-import`."""
    changes = b"".join(
        b"M %s inline %s\ndata %d\n%s\n" % (file.mode.encode(), _quote(path), len(file.content), file.content)
        for path, file in sorted(files.items())
    )
    return b"commit refs/heads/%s\ncommitter aem_exp <> 0 +0000\ndata 0\n%s\n" % (branch.encode(), changes)


def _quote(path: str) -> bytes:
    """A path in double quotes, with all special bytes as octal numbers."""
    plain = b"/._-+=,@% "
    escaped = (bytes([b]) if (chr(b).isalnum() and b < 128) or b in plain else b"\\%03o" % b for b in os.fsencode(path))
    return b'"' + b"".join(escaped) + b'"'


def _git(folder: str, *words: str, stdin: bytes = b"") -> bytes:
    """Run this machine's git in a folder of ours, without the user's and the system's configuration."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "GIT_CONFIG_NOSYSTEM": "1", "GIT_DIR": folder}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_ATTR_NOSYSTEM": "1", "LC_ALL": "C"}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=env, input=stdin, capture_output=True, timeout=GIT_SECONDS, check=False
    )
    if done.returncode:
        raise SandboxLost(
            f"git {words[0]} failed on this machine: {done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    return done.stdout
