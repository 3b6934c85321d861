"""Sandboxes in which the policy's commands and test suites run isolated: no network, and no writes outside a disposable
root.

A backend, named in `conf/env/*.yaml` as `make.sandbox._target_`, opens a sandbox on an image; the sandbox runs commands.
"""

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Protocol

from aem_exp.sandboxes.process import CommandResult, SandboxBroken, SandboxLost, execute

__all__ = [
    "HOST",
    "PATH",
    "Backend",
    "CommandResult",
    "Image",
    "Limits",
    "Sandbox",
    "SandboxBroken",
    "SandboxLost",
    "image_file_name",
]

HOST: Final = ""  # the name of the image that is this machine's own system, read-only
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of a usual system
SHELL_SECONDS: Final = 30.0  # seconds for our own small commands (put, get)


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use. A command that needs more fails, or is stopped for `CommandResult.stop_reason`."""

    processes: int = 256
    """Processes and threads at once."""
    memory_mb: int = 4096
    """Of all processes together, measured ten times a second; and of each process, enforced by the kernel. The measurement counts
    shared memory, page tables and socket buffers (see `memory`); `bwrap` documents what it does not count."""
    disk_mb: int = 2048
    """Of all files written. They are in memory, in addition to `memory_mb`."""
    output_mb: int = 8
    """Of one command."""
    cpu_seconds: int = 3600
    """Of one process; the caller's `timeout` limits the wall clock."""


@dataclass(frozen=True)
class Image:
    """The files and variables that a sandbox starts with."""

    name: str = HOST
    """A container image (`swebench/sweb.eval.x86_64.astropy...`), or `HOST`: the machine's own /usr, read-only."""
    visible_paths: tuple[str, ...] = ()
    """Files and folders of the machine that are visible too, read-only, at their own paths."""
    hidden_paths: tuple[str, ...] = ()
    """Folders of the machine's system that are empty inside."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""


def image_file_name(image: str) -> str:
    """The name of an image's file or folder, different for each image."""
    return f"{re.sub(r'[^a-zA-Z0-9_.-]+', '_', image)[-100:]}-{sha256(image.encode()).hexdigest()[:8]}"


class Sandbox(ABC):
    """One disposable machine. Files that a command writes stay for the next command; its processes are killed."""

    limits: Limits
    workdir: str = "/testbed"
    outer_env: Mapping[str, str] | None = (
        None  # variables of the programs that lead inside, which see them; None: our own
    )

    def __enter__(self) -> "Sandbox":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def start(self) -> None:
        """Make it. Raises `SandboxLost` if the machine does not allow it."""

    @abstractmethod
    def close(self) -> None:
        """Kill its processes and discard its files. May be called twice, and while another thread runs a command."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether a command can run in it."""

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """The argument vector that runs this bash script in `workdir` inside. Raises `SandboxLost` if it is not alive."""

    def run(self, script: str, timeout: float, stdin: bytes = b"") -> CommandResult:
        """Run a bash script with these bytes as its stdin, for at most `timeout` seconds.

        Raises:
            SandboxLost: the machine is at fault, or the sandbox is closed meanwhile.
            SandboxBroken: an earlier command is at fault.
        """
        return self._execute(self.command(script), timeout, stdin)

    def _execute(
        self, argv: Sequence[str], timeout: float, stdin: bytes, pass_fds: Sequence[int] = ()
    ) -> CommandResult:
        """Run a program that enters the sandbox, within its limits."""
        return execute(
            argv,
            timeout,
            stdin,
            max_output=self.limits.output_mb << 20,
            max_memory=self.limits.memory_mb << 20,
            env=self.outer_env,
            pass_fds=pass_fds,
            is_gone=lambda: not self.is_alive(),
        )

    def put(self, path: str, data: bytes) -> None:
        """Write a file from inside, so that no link leads outside. Raises OSError, also if the path is a pipe, say."""
        name = shlex.quote(path)
        refuse = f'if [ -e {name} ] && [ ! -f {name} ]; then echo "is a directory, a pipe or a device, and no file"; exit 1; fi'
        result = self.run(f'{refuse}; mkdir -p -- "$(dirname -- {name})" && cat > {name}', SHELL_SECONDS, data)
        if result.code:
            raise OSError(f"{path}: {result.text.strip() or result.stop_reason}")

    def get(self, path: str) -> bytes:
        """Read a file from inside. Raises OSError."""
        result = self.run(f"exec 2>/dev/null; test -f {shlex.quote(path)} && cat -- {shlex.quote(path)}", SHELL_SECONDS)
        if result.code:
            raise OSError(f"{path}: cannot be read in the sandbox")
        return result.output


class Backend(Protocol):
    """A way of making sandboxes."""

    def missing(self) -> str | None:
        """Why it cannot be used on this machine, with the remedy, in one sentence; None if it can."""

    def lacks(self, image: str) -> str | None:
        """Why this image cannot be opened yet, with the remedy; None if it can."""

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Fetch images, which compute nodes cannot do; resumes after an interruption."""

    def open(self, image: Image, limits: Limits) -> Sandbox:
        """A sandbox, not started."""
