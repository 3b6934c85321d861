"""Runs a command with limits on time, output and memory and kills all its processes at the end; starts and stops the
holder process that keeps a sandbox open.
"""

import errno
import fcntl
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final, Literal

from aem_exp.sandboxes.memory import used_bytes

POLL_SECONDS: Final = 0.1  # seconds between two looks at the memory, and at the sandbox
KILL_SECONDS: Final = 5.0  # seconds for the kernel to end what is killed
STOPPED_EXIT_CODE: Final = 124  # the exit code of what was stopped, as coreutils' `timeout` has it


StopReason = Literal["", "time", "output", "memory"]


class SandboxLost(RuntimeError):
    """The sandbox itself is gone or cannot be entered: the machine's fault, never a score of what ran in it."""


class SandboxBroken(RuntimeError):
    """No command can begin any more, because of what ran before: it has locked, removed or replaced what each one needs."""


@dataclass(frozen=True)
class CommandResult:
    """What a command printed (stdout and stderr as they came), how it ended, and in how long."""

    output: bytes
    code: int
    stop_reason: StopReason = ""  # what it had too much of, where it was stopped for that
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


ARGUMENTS_TOO_LONG: Final = CommandResult(b"Argument list too long\n", 126)  # what shells say of it


def execute(
    argv: Sequence[str],
    timeout: float,
    given: bytes = b"",
    *,
    most: int = 1 << 20,
    memory: int = 1 << 40,
    env: Mapping[str, str] | None = None,
    passed: Sequence[int] = (),
    gone: Callable[[], bool] = lambda: False,
) -> CommandResult:
    """Run it with `given` as stdin, for at most `timeout` seconds, `most` bytes of output, `memory` bytes of all its
    processes.

    Args:
        passed: descriptors that it has under their own numbers.
        gone: whether what it runs in is no more, which ends it.

    Raises:
        Lost: it is gone, or the machine has no process for us.
    """
    began = time.monotonic()
    try:
        with create_sealed_file(given) as stdin:
            child = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=env,
                pass_fds=passed,
            )
    except OSError as error:
        if error.errno == errno.E2BIG:  # whoever wrote the command is at fault, not the machine
            return ARGUMENTS_TOO_LONG
        raise SandboxLost(f"no process could be begun: {error}") from error
    try:
        output, stopped = _watch_output(child, began + timeout, most, memory, gone)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also what a finished shell left in its session
        code = child.wait()
        assert child.stdout is not None
        child.stdout.close()
    return CommandResult(output, STOPPED_EXIT_CODE if stopped else code, stopped, time.monotonic() - began)


def start_holder(argv: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that says `ready`, and stays until it is released. Raises Lost with what it says instead, or where it says
    nothing for so long."""
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
    except OSError as error:
        raise SandboxLost(f"no process could be begun: {error}") from error
    if (said := _read_first_line(child, seconds)) != b"ready\n":
        stop_holder(child)
        what = said.decode(errors="replace").strip()
        raise SandboxLost(what if said.endswith(b"\n") else f"{what} (no more within {seconds:g} s)".strip())
    return child


def stop_holder(child: subprocess.Popen[bytes]) -> None:
    """End what was held, with all of its session; what hangs in the kernel is left to it."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    for stream in (child.stdin, child.stdout):
        assert stream is not None
        stream.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(KILL_SECONDS)


def _read_first_line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Its first line, or as much of it as came."""
    assert child.stdout is not None
    descriptor, deadline, said = child.stdout.fileno(), time.monotonic() + seconds, b""
    while not said.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            if not (byte := os.read(descriptor, 1)):
                return said + b"\n"
            said += byte
    return said


def create_sealed_file(data: bytes) -> BinaryIO:
    """A file in memory that nobody can write any more: whoever reads it may be anybody."""
    file = os.fdopen(os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    file.write(data)
    file.seek(0)
    fcntl.fcntl(
        file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    )
    return file


def _watch_output(
    child: subprocess.Popen[bytes], deadline: float, most: int, memory: int, gone: Callable[[], bool]
) -> tuple[bytes, StopReason]:
    """Read what it prints until it ends, or has too much of something."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    os.set_blocking(descriptor, False)
    output = bytearray()
    looked = time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(descriptor, selectors.EVENT_READ)
        while True:
            ready.select(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))
            now = time.monotonic()
            chunk = _read_available(descriptor)
            if chunk == b"":
                break
            output += chunk or b""
            if len(output) > most:
                return bytes(output[:most]), "output"
            if now >= deadline:
                return bytes(output), "time"
            if now - looked >= POLL_SECONDS:
                looked = now
                if _exceeds_memory(child, memory, gone):
                    return bytes(output), "memory"
    # it closed its output, which is its end, or very nearly
    while (left := deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(POLL_SECONDS, left))
            return bytes(output), ""
        if _exceeds_memory(child, memory, gone):
            return bytes(output), "memory"
    return bytes(output), "time"


def _exceeds_memory(child: subprocess.Popen[bytes], memory: int, gone: Callable[[], bool]) -> bool:
    """Whether it takes too much memory. Raises Lost where it has lost its place."""
    if gone():
        raise SandboxLost("the sandbox is gone")
    return used_bytes(child.pid, memory) > memory


def _read_available(descriptor: int) -> bytes | None:
    """What there is now; nothing where it is at its end, None where there may be more later."""
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return None
