"""One command of another's making: run, watched, and ended with all that it began."""

import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

GLANCE: Final = 0.1  # seconds between two looks at the memory
PAGE: Final = os.sysconf("SC_PAGESIZE")
KILLED: Final = 124  # the exit code of what was stopped, as coreutils' `timeout` has it

Stopped = Literal["", "time", "output", "memory"]


@dataclass(frozen=True)
class Ran:
    """What a command printed (stdout and stderr as they came), how it ended, and in how long."""

    output: bytes
    code: int
    stopped: Stopped = ""  # what it had too much of, where it was stopped for that
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


def execute(
    argv: Sequence[str],
    timeout: float,
    given: bytes = b"",
    *,
    most: int = 1 << 20,
    memory: int = 1 << 40,
    env: Mapping[str, str] | None = None,
    passed: Sequence[int] = (),
) -> Ran:
    """Run it with `given` as stdin, for at most `timeout` seconds, `most` bytes of output, `memory` bytes of all its
    processes. `passed`: descriptors that it has under their own numbers."""
    began = time.monotonic()
    with sealed(given) as stdin:
        child = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
            pass_fds=passed,
        )
    try:
        output, stopped = _watch(child, began + timeout, most, memory)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also what a finished shell left in its session
        code = child.wait()
        assert child.stdout is not None
        child.stdout.close()
    return Ran(output, KILLED if stopped else code, stopped, time.monotonic() - began)


def sealed(data: bytes) -> BinaryIO:
    """A file in memory that nobody can write any more: whoever reads it may be anybody."""
    file = os.fdopen(os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    file.write(data)
    file.seek(0)
    fcntl.fcntl(
        file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    )
    return file


def _watch(child: subprocess.Popen[bytes], deadline: float, most: int, memory: int) -> tuple[bytes, Stopped]:
    """Read what it prints until it ends, or has too much of something."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    os.set_blocking(descriptor, False)
    output = bytearray()
    looked = time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(descriptor, selectors.EVENT_READ)
        while True:
            ready.select(max(0.0, min(GLANCE, deadline - time.monotonic())))
            now = time.monotonic()
            chunk = _read(descriptor)
            if chunk == b"":
                break
            output += chunk or b""
            if len(output) > most:
                return bytes(output[:most]), "output"
            if now >= deadline:
                return bytes(output), "time"
            if now - looked >= GLANCE:
                looked = now
                if resident(child.pid) > memory:
                    return bytes(output), "memory"
    # it closed its output, which is its end, or very nearly
    with suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, deadline - time.monotonic()))
        return bytes(output), ""
    return bytes(output), "time"


def _read(descriptor: int) -> bytes | None:
    """What there is now; nothing where it is at its end, None where there may be more later."""
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return None


def resident(pid: int) -> int:
    """Bytes of memory of a process and all below it, as Linux counts them; 0 where it has ended."""
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        with suppress(OSError, ValueError, IndexError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * PAGE
            for thread in os.listdir(f"/proc/{one}/task"):
                todo += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())
    return total
