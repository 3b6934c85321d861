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
    "file_name",
]

HOST: Final = ""  # the name of the image that is this machine's own system, read-only
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of a usual system
SHELL_SECONDS: Final = 30.0  # seconds for our own small commands (put, get)


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use. A command that needs more is stopped, and `Ran.stopped` says so, or it fails.

    Attributes:
        processes: at once (threads count).
        memory_mb: of all its processes together, watched; and of each, enforced by the kernel. The watch counts shared memory,
            page tables and buffers of sockets with them (see `memory`); what it does not, `bwrap` tells with its size.
        disk_mb: of everything it writes. It lies in memory, beside `memory_mb`.
        output_mb: of one command.
        cpu_seconds: of one process; the wall clock is the caller's `timeout`.
    """

    processes: int = 256
    memory_mb: int = 4096
    disk_mb: int = 2048
    output_mb: int = 8
    cpu_seconds: int = 3600


@dataclass(frozen=True)
class Image:
    """What a sandbox shows at first.

    Attributes:
        name: of a container image (`swebench/sweb.eval.x86_64.astropy...`), or `HOST`: the machine's own /usr, read-only.
        shown: files and folders of the machine that are shown too, read-only, at their own places.
        hidden: folders of the machine's system that look empty inside.
        env: variables.
    """

    name: str = HOST
    visible_paths: tuple[str, ...] = ()
    hidden_paths: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def image_file_name(image: str) -> str:
    """A name for an image's file or folder: no other image has it."""
    return f"{re.sub(r'[^a-zA-Z0-9_.-]+', '_', image)[-100:]}-{sha256(image.encode()).hexdigest()[:8]}"


class Sandbox(ABC):
    """One throw-away machine. Files written by a command are there for the next one; its processes are not."""

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
        """Make it. Raises `SandboxLost` where the machine does not let us."""

    @abstractmethod
    def close(self) -> None:
        """End whatever runs in it and forget what it wrote. May be called twice, and while another thread runs a command."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it can be entered."""

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """The argument vector that runs this bash script in `workdir` inside. Raises `SandboxLost` where it is not alive."""

    def run(self, script: str, timeout: float, given: bytes = b"") -> CommandResult:
        """Run a bash script with `given` on its stdin, for at most `timeout` seconds.

        Raises:
            Lost: the machine is at fault, or the sandbox is closed meanwhile.
            Ruined: what ran in it before is at fault.
        """
        return self._execute(self.command(script), timeout, given)

    def _execute(self, argv: Sequence[str], timeout: float, given: bytes, passed: Sequence[int] = ()) -> CommandResult:
        """Run what leads inside, within our limits."""
        return execute(
            argv,
            timeout,
            given,
            most=self.limits.output_mb << 20,
            memory=self.limits.memory_mb << 20,
            env=self.outer_env,
            passed=passed,
            gone=lambda: not self.is_alive(),
        )

    def put(self, path: str, data: bytes) -> None:
        """Write a file, as a command inside would: no link leads outside. Raises OSError, also where a pipe or another thing
        that is no file is in its place."""
        name = shlex.quote(path)
        odd = f'if [ -e {name} ] && [ ! -f {name} ]; then echo "is a directory, a pipe or a device, and no file"; exit 1; fi'
        ran = self.run(f'{odd}; mkdir -p -- "$(dirname -- {name})" && cat > {name}', SHELL_SECONDS, data)
        if ran.code:
            raise OSError(f"{path}: {ran.text.strip() or ran.stop_reason}")

    def get(self, path: str) -> bytes:
        """Read a file, as a command inside would. Raises OSError."""
        ran = self.run(f"exec 2>/dev/null; test -f {shlex.quote(path)} && cat -- {shlex.quote(path)}", SHELL_SECONDS)
        if ran.code:
            raise OSError(f"{path}: cannot be read in the sandbox")
        return ran.output


class Backend(Protocol):
    """A way of making sandboxes."""

    def missing(self) -> str | None:
        """Why it cannot be used on this machine, with the remedy, in one sentence; None where it can."""

    def lacks(self, image: str) -> str | None:
        """Why this image cannot be opened yet, with the remedy; None where it can."""

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Fetch images that compute nodes could not fetch; goes on where it was interrupted."""

    def open(self, image: Image, limits: Limits) -> Sandbox:
        """A sandbox, not started."""
