"""Runs a command with limits on time, output and memory, and kills all its processes at the end.

It also starts and stops the holder process, which keeps a sandbox open.
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

from aem_exp.sandboxes.memory_usage import used_bytes

POLL_SECONDS: Final = 0.1  # between two checks of the memory and of the sandbox
KILL_SECONDS: Final = 5.0  # for the kernel to end killed processes
STOPPED_EXIT_CODE: Final = 124  # the exit code of a stopped command, as in coreutils' `timeout`
StopReason = Literal["", "time", "output", "memory"]


class SandboxLost(RuntimeError):
    """The sandbox is gone or cannot be entered. This is a failure of the machine, never a result of a command."""


class SandboxBroken(RuntimeError):
    """No command can start any more, because an earlier command locked, removed or replaced a file that all commands need."""


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    output: bytes
    """Stdout and stderr, interleaved."""
    code: int
    """The exit code; `STOPPED_EXIT_CODE` if the command was stopped."""
    stop_reason: StopReason = ""
    """The limit that the command exceeded; empty if it was not stopped."""
    seconds: float = 0.0
    """The duration."""

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


ARGUMENTS_TOO_LONG: Final = CommandResult(b"Argument list too long\n", 126)  # as in shells


def execute(
    argv: Sequence[str],
    timeout: float,
    stdin: bytes = b"",
    *,
    max_output: int = 1 << 20,
    max_memory: int = 1 << 40,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    is_gone: Callable[[], bool] = lambda: False,
) -> CommandResult:
    """Run a command with limits.

    Args:
        timeout: in seconds.
        max_output: in bytes.
        max_memory: of all processes together, in bytes.
        pass_fds: descriptors that the command inherits under the same numbers.
        is_gone: whether the sandbox of the command has ended. This stops the command.

    Raises:
        SandboxLost: the sandbox is gone, or no process can be started.
    """
    started_at = time.monotonic()
    try:
        with create_sealed_file(stdin) as stdin_file:
            child = subprocess.Popen(
                argv,
                stdin=stdin_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=env,
                pass_fds=pass_fds,
            )
    except OSError as error:
        if error.errno == errno.E2BIG:  # an error of the command, not of the machine
            return ARGUMENTS_TOO_LONG
        raise SandboxLost(f"no process could be started: {error}") from error
    try:
        output, stop_reason = _watch_output(child, started_at + timeout, max_output, max_memory, is_gone)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also kills processes that a shell left in its session
        code = child.wait()
        assert child.stdout is not None
        child.stdout.close()
    return CommandResult(output, STOPPED_EXIT_CODE if stop_reason else code, stop_reason, time.monotonic() - started_at)


def start_holder(argv: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that prints `ready` and runs until `stop_holder`.

    Raises:
        SandboxLost: it printed something else, or it did not print `ready` within `seconds`.
    """
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
        raise SandboxLost(f"no process could be started: {error}") from error
    if (first_line := _read_first_line(child, seconds)) != b"ready\n":
        stop_holder(child)
        message = first_line.decode(errors="replace").strip()
        raise SandboxLost(
            message if first_line.endswith(b"\n") else f"{message} (not ready within {seconds:g} s)".strip()
        )
    return child


def stop_holder(child: subprocess.Popen[bytes]) -> None:
    """Kill a holder and all processes of its session. A process that is blocked in the kernel is not waited for."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    for stream in (child.stdin, child.stdout):
        assert stream is not None
        stream.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(KILL_SECONDS)


def _read_first_line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The first line of a process's output, or the part of it that arrived in time."""
    assert child.stdout is not None
    descriptor, deadline, line = child.stdout.fileno(), time.monotonic() + seconds, b""
    while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            if not (byte := os.read(descriptor, 1)):
                return line + b"\n"
            line += byte
    return line


def create_sealed_file(data: bytes) -> BinaryIO:
    """A file in memory that nobody can change, so that an untrusted process may read it."""
    file = os.fdopen(os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    file.write(data)
    file.seek(0)
    fcntl.fcntl(
        file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    )
    return file


def _watch_output(
    child: subprocess.Popen[bytes], deadline: float, max_output: int, max_memory: int, is_gone: Callable[[], bool]
) -> tuple[bytes, StopReason]:
    """Read the output of a command until it ends or exceeds a limit."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    os.set_blocking(descriptor, False)
    output = bytearray()
    checked_at = time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(descriptor, selectors.EVENT_READ)
        while True:
            ready.select(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))
            now = time.monotonic()
            chunk = _read_available(descriptor)
            if chunk == b"":
                break
            output += chunk or b""
            if len(output) > max_output:
                return bytes(output[:max_output]), "output"
            if now >= deadline:
                return bytes(output), "time"
            if now - checked_at >= POLL_SECONDS:
                checked_at = now
                if _exceeds_memory(child, max_memory, is_gone):
                    return bytes(output), "memory"
    # the output is closed: usually the command ends now
    while (left := deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(POLL_SECONDS, left))
            return bytes(output), ""
        if _exceeds_memory(child, max_memory, is_gone):
            return bytes(output), "memory"
    return bytes(output), "time"


def _exceeds_memory(child: subprocess.Popen[bytes], max_memory: int, is_gone: Callable[[], bool]) -> bool:
    """Whether a command exceeds its memory. Raises SandboxLost if its sandbox is gone."""
    if is_gone():
        raise SandboxLost("the sandbox is gone")
    return used_bytes(child.pid, max_memory) > max_memory


def _read_available(descriptor: int) -> bytes | None:
    """The bytes that are available; empty at the end of the stream, None if there may be more later."""
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return None
