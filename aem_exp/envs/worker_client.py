"""The parent's side of a worker process: sends requests, reads replies, and detects a worker that hangs or died."""

import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from aem_exp.core.errors import ConfigError
from aem_exp.envs import Turn
from aem_exp.envs.executor import TRACE_CHARACTERS, Reply, error_reply
from aem_exp.envs.worker_process import GRACE_SECONDS, encode_message, start_worker_process, take_message

MAX_LOG_BYTES: Final = 1 << 20  # the log of stderr is emptied before a request if it is longer
MAX_BANNER_BYTES: Final = 1 << 16  # of output in front of a worker's first message
PREFIX_SECONDS: Final = 2.0  # for srun or ssh to end after SIGTERM
DUMP_SECONDS: Final = 0.1  # for faulthandler to write the stacks of a worker that hangs


class WorkerFailure(Exception):
    """A worker hung or died during a request. `reply` is the failed reply for the slot of that request."""

    def __init__(self, reply: Reply):
        super().__init__(reply.error)
        self.reply = reply


class WorkerClient:
    """A connection to one worker, which has at most one request at a time. The constructor starts the worker.

    Args:
        prefix: words in front of its command, which run it on another node.

    Raises:
        ConfigError: the program of the prefix does not exist.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._prefix, self._nonce = list(prefix), secrets.token_hex(16)
        self._buffer, self._has_greeted = bytearray(), False
        self._seconds = self.deadline = 0.0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (`end` closes it; a file without a name is never left behind)
        self._log_start = 0  # position in the log at which the current request began
        self.socket, child_socket = socket.socketpair()
        with child_socket:
            try:
                self.child = start_worker_process(child_socket, self._log, self._nonce, prefix)
            except OSError as error:
                self.socket.close()
                if not prefix:
                    raise
                problem = f"{prefix[0]} cannot be started: {error.strerror}"
                raise ConfigError("launch.worker_prefix", " ".join(prefix), problem) from error

    def is_alive(self) -> bool:
        return self.child.poll() is None

    def send(self, message: Mapping[str, Any], seconds: float) -> None:
        """Send a request with a time limit in seconds."""
        # A command in front of the worker may have ended, with its error, before the first request.
        self._log_start = os.fstat(self._log.fileno()).st_size if self._has_greeted else 0
        if self._log_start > MAX_LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)
            self._log_start = os.lseek(self._log.fileno(), 0, os.SEEK_SET)  # also moves the child: it shares the offset
        self._seconds, self.deadline = seconds, time.monotonic() + seconds
        self.socket.settimeout(seconds)
        with suppress(OSError):  # `read_reply` or `on_timeout` reports the failure
            self.socket.sendall(encode_message(message))

    def read_reply(self) -> Reply | WorkerFailure | None:
        """Read from the socket. Returns the reply once it is complete, the failure if the worker died, else None."""
        try:
            chunk = self.socket.recv(1 << 20)
        except OSError:
            chunk = b""
        if not chunk:
            return self._on_death()
        self._buffer += chunk
        if not self._has_greeted and not self._find_greeting():
            return None if len(self._buffer) <= MAX_BANNER_BYTES else self._on_banner()
        reply = take_message(self._buffer)
        if reply is None:
            return None
        turn = reply["turn"]
        if turn and turn["actions"] is not None:
            turn["actions"] = tuple(turn["actions"])
        return Reply(**reply | {"turn": turn and Turn(**turn)})

    def _find_greeting(self) -> bool:
        """Drop everything up to the worker's first output, such as the banner of a login shell."""
        _, found, after = self._buffer.partition(f"{self._nonce}\n".encode())
        if found:
            self._buffer, self._has_greeted = after, True
        return bool(found)

    def _on_banner(self) -> WorkerFailure:
        text = bytes(self._buffer[:100]).decode(errors="replace")
        return WorkerFailure(error_reply(f"the command of launch.worker_prefix prints without end: {text!r}"))

    def on_timeout(self) -> WorkerFailure:
        """The failure of a worker that did not answer in time. The trace shows the stacks of its threads."""
        if self.child.poll() is not None:  # it died, but one of its own children keeps the socket open
            return self._on_death()
        self.child.send_signal(signal.SIGUSR1)  # srun forwards it
        time.sleep(DUMP_SECONDS)
        return WorkerFailure(error_reply(f"hung: no answer within {self._seconds:g} s", self._read_log_tail()))

    def _on_death(self) -> WorkerFailure:
        """The failure of a worker that closed its connection."""
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(GRACE_SECONDS)
        code, tail = self.child.returncode, self._read_log_tail()
        if code is None:
            return WorkerFailure(error_reply("the worker process closed its connection", tail))
        if code < 0:
            return WorkerFailure(error_reply(f"the worker process died (signal {-code})", tail))
        lines = tail.splitlines()
        text = (lines[0] if self._prefix and not self._has_greeted else lines[-1]) if lines else ""
        return WorkerFailure(error_reply(f"the worker process died (exit code {code}) {text}", tail))

    def _read_log_tail(self) -> str:
        """The end of what the worker wrote to stderr during this request."""
        if self._log.closed:  # another thread closed the pool
            return ""
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._log_start, size - TRACE_CHARACTERS)
        return os.pread(self._log.fileno(), TRACE_CHARACTERS, start).decode(errors="replace")

    def end(self, grace: float = 0.0) -> None:
        """Wait `grace` seconds for the worker to end, then kill it with its children."""
        if self._prefix:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # a worker on another node ends with its input
            self.child.terminate()  # srun and ssh then end their side of the connection
            grace = max(grace, PREFIX_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(grace)
        with suppress(OSError):
            os.killpg(self.child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process blocked in the kernel (a failed disk) cannot be killed
            self.child.wait(GRACE_SECONDS)
        self.socket.close()
        self._log.close()
