"""Sandboxes run the policy's commands and test suites in isolation: without network, and with a disposable file system.

A `Backend`, which `conf/env/*.yaml` names as `make.sandbox._target_`, opens a `Sandbox` on an image. The sandbox runs commands.
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

HOST: Final = ""  # name of the image that is this machine's own system, read-only
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # the default of most systems
SHELL_SECONDS: Final = 30.0  # for the commands of `put` and `get`


@dataclass(frozen=True)
class Limits:
    """The limits of one sandbox. A command that exceeds a limit fails, or is stopped (see `CommandResult.stop_reason`)."""

    processes: int = 256
    """Processes and threads at the same time."""
    memory_mb: int = 4096
    """Memory of all processes together, measured ten times a second, and of each process, enforced by the kernel. The measurement
    includes shared memory, page tables and socket buffers (see `memory_usage`). `bwrap` lists what it does not include."""
    disk_mb: int = 2048
    """Size of all written files. They are in memory, in addition to `memory_mb`."""
    output_mb: int = 8
    """Output of one command."""
    cpu_seconds: int = 3600
    """CPU time of one process. The `timeout` of a call limits the wall-clock time."""


@dataclass(frozen=True)
class Image:
    """The files and variables that a sandbox starts with."""

    name: str = HOST
    """A container image (`swebench/sweb.eval.x86_64.astropy...`), or `HOST`: the machine's own /usr, read-only."""
    visible_paths: tuple[str, ...] = ()
    """Further files and folders of the machine that are visible inside, read-only, at the same paths."""
    hidden_paths: tuple[str, ...] = ()
    """Folders of the machine's system that appear empty inside."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""


def image_file_name(image: str) -> str:
    """A file name for an image. Different images have different names."""
    return f"{re.sub(r'[^a-zA-Z0-9_.-]+', '_', image)[-100:]}-{sha256(image.encode()).hexdigest()[:8]}"


class Sandbox(ABC):
    """One disposable machine. Files of a command stay for the next command, but all its processes are killed when it ends."""

    limits: Limits
    workdir: str = "/testbed"
    """The folder in which commands run."""
    outer_env: Mapping[str, str] | None = None
    """Environment of the programs that enter the sandbox, which may be visible inside. None: the environment of this process."""

    def __enter__(self) -> "Sandbox":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def start(self) -> None:
        """Start the sandbox. Raises `SandboxLost` if the machine does not allow it."""

    @abstractmethod
    def close(self) -> None:
        """Kill all processes and discard all files. May be called twice, and while another thread runs a command."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether commands can run."""

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """The arguments of a program that runs a bash script inside, in `workdir`. Raises `SandboxLost` if it is not alive."""

    def run(self, script: str, timeout: float, stdin: bytes = b"") -> CommandResult:
        """Run a bash script for at most `timeout` seconds.

        Raises:
            SandboxLost: the machine failed, or the sandbox was closed during the command.
            SandboxBroken: an earlier command made the sandbox unusable.
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
        """Write a file from inside the sandbox, so that no link leads outside.

        Raises:
            OSError: the file cannot be written, or the path is not a regular file.
        """
        name = shlex.quote(path)
        refuse = f'if [ -e {name} ] && [ ! -f {name} ]; then echo "is a directory, a pipe or a device, and no file"; exit 1; fi'
        result = self.run(f'{refuse}; mkdir -p -- "$(dirname -- {name})" && cat > {name}', SHELL_SECONDS, data)
        if result.code:
            raise OSError(f"{path}: {result.text.strip() or result.stop_reason}")

    def get(self, path: str) -> bytes:
        """Read a file from inside the sandbox. Raises OSError."""
        result = self.run(f"exec 2>/dev/null; test -f {shlex.quote(path)} && cat -- {shlex.quote(path)}", SHELL_SECONDS)
        if result.code:
            raise OSError(f"{path}: cannot be read in the sandbox")
        return result.output


class Backend(Protocol):
    """A kind of sandbox, such as bubblewrap or Docker."""

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine, with the remedy, in one sentence; None if it can."""

    def lacks(self, image: str) -> str | None:
        """Why this image cannot be opened yet, with the remedy; None if it can."""

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Download images, because compute nodes have no internet. Resumes after an interruption."""

    def open(self, image: Image, limits: Limits) -> Sandbox:
        """A new sandbox on an image. It is not started yet."""
