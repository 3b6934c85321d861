"""A worker process: one world and its environments, controlled by messages on a socket.

Contains the child's program (`python -m aem_exp.envs.worker_process DESCRIPTOR`), the function that starts it, and the message
format: a header with the length, then JSON. The child ends when its socket closes, even if its parent was killed.
"""

import faulthandler
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any, BinaryIO, Final

from aem_exp.config.targets import instantiate
from aem_exp.core import disk
from aem_exp.envs import Task
from aem_exp.envs.executor import Reply, SerialExecutor, error_reply

GRACE_SECONDS: Final = 10.0  # for environments to close before their process is killed
HEADER_BYTES: Final = 8  # size of the header, which holds the length of the message
THREAD_LIBRARIES: Final = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")


def start_worker_process(connection: socket.socket, log: Any) -> "subprocess.Popen[bytes]":
    """Start a worker that communicates on a socket and writes its stderr to a log."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "aem_exp.envs.worker_process", str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches only the parent, and a worker is killed together with its children
        env={"PYTHONHASHSEED": "0"}  # a replay is then the same even if a world depends on the order of a set
        | os.environ
        | {f"{library}_NUM_THREADS": "1" for library in THREAD_LIBRARIES}
        | {"PYTHONPATH": str(disk.PACKAGE.parent)},
    )


def encode_message(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message, with its header."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(HEADER_BYTES) + body


def take_message(buffer: bytearray) -> dict[str, Any] | None:
    """Remove the first message from a buffer and decode it; None while it is incomplete."""
    end = HEADER_BYTES + int.from_bytes(buffer[:HEADER_BYTES])
    if len(buffer) < max(end, HEADER_BYTES):
        return None
    message: dict[str, Any] = json.loads(buffer[HEADER_BYTES:end])
    del buffer[:end]
    return message


def _read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None if the socket is closed."""
    header = stream.read(HEADER_BYTES)
    body = stream.read(int.from_bytes(header)) if len(header) == HEADER_BYTES else b""
    return json.loads(body) if body else None


def main(descriptor: int) -> None:
    """Make the world that the first message describes, and answer all further messages until the socket closes."""
    _ignore_signals()
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    threading.Thread(target=_kill_on_disconnect, args=[connection], daemon=True).start()
    with connection, connection.makefile("rb") as stream, suppress(ConnectionError):
        setup = _read_message(stream)
        if setup is None:
            return
        try:
            executor = _make_executor(setup)
        except Exception as error:
            connection.sendall(encode_message(asdict(error_reply(error))))
            return
        connection.sendall(encode_message(asdict(Reply(None))))
        with ExitStack() as closing:
            closing.callback(executor.close)
            while message := _read_message(stream):
                connection.sendall(encode_message(asdict(_answer(executor, message))))


def _make_executor(setup: Mapping[str, Any]) -> SerialExecutor:
    """An executor of the parent's world. Modules are found as in the parent."""
    sys.path[:] = setup["path"]
    del os.environ["PYTHONPATH"]  # it pointed to this package; child programs of an environment get the user's value
    os.environ |= {"PYTHONPATH": setup["PYTHONPATH"]} if setup["PYTHONPATH"] else {}
    return SerialExecutor(instantiate(setup["make"]))


def _answer(executor: SerialExecutor, message: Mapping[str, Any]) -> Reply:
    """Reset or step the slot of a message."""
    slot = message["slot"]
    if "task" in message:
        return executor.reset({slot: Task(**message["task"])})[slot]
    return executor.step({slot: message["response"]})[slot]


def _kill_on_disconnect(connection: socket.socket) -> None:
    """Wait until the socket closes. If this process does not end in time after that, kill it with its children."""
    poll = select.poll()
    poll.register(connection, 0)  # no events: a closed connection is always reported
    poll.poll()
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _ignore_signals() -> None:
    """Ignore a scheduler's signals: it signals every process of a job, but the parent decides when a worker ends.

    SIGUSR1 prints the stacks of all threads.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: child programs of an environment would inherit it
    os.register_at_fork(  # SIGTERM ends a fork of the environment as usual, from the start of the fork
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]),
        after_in_child=lambda: (
            signal.signal(signal.SIGTERM, signal.SIG_DFL),
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]),
        ),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
