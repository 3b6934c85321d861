"""A worker process: one world and its environments, controlled by messages on a socket.

Contains the child's program (`python -m aem_exp.envs.worker_process NONCE`), the function that starts it, and the message
format: JSON, one line per message. Messages pass through the child's standard input and output, so that a command in
front of it (`srun`, `ssh`) can run it on another node. The child ends when its input ends, even if its parent was killed.
"""

import faulthandler
import hashlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final

from aem_exp.config.targets import instantiate
from aem_exp.core import disk
from aem_exp.envs import Task
from aem_exp.envs.executor import Reply, SerialExecutor, error_reply

GRACE_SECONDS: Final = 10.0  # for environments to close before their process is killed
JOB_VARIABLES: Final = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_HET_SIZE")  # which job srun belongs to
THREAD_LIBRARIES: Final = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")


def start_worker_process(
    connection: socket.socket, log: Any, nonce: str, prefix: Sequence[str] = ()
) -> "subprocess.Popen[bytes]":
    """Start a worker that communicates on a socket and writes its stderr to a log.

    Args:
        nonce: the worker's first output. Everything in front of it comes from programs of the prefix.
        prefix: words in front of its command.

    Raises:
        OSError: the program does not exist.
    """
    own = {f"{library}_NUM_THREADS": "1" for library in THREAD_LIBRARIES} | {"PYTHONPATH": str(disk.PACKAGE.parent)}
    own |= {"PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0")}  # a replay is then the same, also of sets
    command = [sys.executable, "-P", "-m", "aem_exp.envs.worker_process", nonce]
    inherited: Mapping[str, str] = os.environ
    if prefix:
        words = ["env", *(f"{name}={value}" for name, value in own.items()), *command]
        is_shell = os.path.basename(prefix[0]) == "ssh"  # it joins the words, and a shell of the other node splits them
        command = [*prefix, *(shlex.quote(word) if is_shell else word for word in words)]
        # Settings of the step that this process is in, such as its number of tasks, would apply to srun's new step.
        inherited = {k: v for k, v in inherited.items() if not k.startswith("SLURM_") or k in JOB_VARIABLES}
    return subprocess.Popen(
        command,
        stdin=connection.fileno(),
        stdout=connection.fileno(),
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches only the parent, and a worker is killed together with its children
        env={**inherited, **own},
    )


def describe_files(path: Sequence[str]) -> dict[str, Any]:
    """What a worker on another node must see, too: this program, and the folders in which modules are found."""
    return {"program": _hash_program(), "folders": [folder for folder in path if os.path.exists(folder)]}


def _hash_program() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _check_files(files: Mapping[str, Any]) -> None:
    """Raises: OSError: this node sees other files than the parent's."""
    node = os.uname().nodename
    if missing := [folder for folder in files["folders"] if not os.path.exists(folder)]:
        raise OSError(f"the node {node} has no {missing[0]}; launch.worker_prefix needs a disk that both nodes see")
    if _hash_program() != files["program"]:
        raise OSError(f"{__file__} on the node {node} is of another version of aem_exp")


def encode_message(message: Mapping[str, Any]) -> bytes:
    """A message as one line, because srun passes on whole lines only. JSON contains no line breaks."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def take_message(buffer: bytearray) -> dict[str, Any] | None:
    """Remove the first message from a buffer and decode it; None while it is incomplete."""
    end = buffer.find(b"\n")
    if end < 0:
        return None
    message: dict[str, Any] = json.loads(buffer[:end].decode("utf-8", "surrogatepass"))
    del buffer[: end + 1]
    return message


def _read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None if the input has ended."""
    line = stream.readline()
    return json.loads(line.decode("utf-8", "surrogatepass")) if line.endswith(b"\n") else None


def main(nonce: str) -> None:
    """Make the world that the first message describes, and answer all further messages until the input ends."""
    _ignore_signals()
    with _take_standard_input() as stream, _take_standard_output() as output, suppress(ConnectionError):
        threading.Thread(target=_kill_on_disconnect, args=[stream.fileno()], daemon=True).start()

        def send(reply: Reply) -> None:
            output.write(encode_message(asdict(reply)))
            output.flush()

        output.write(f"{nonce}\n".encode())
        output.flush()
        setup = _read_message(stream)
        if setup is None:
            return
        try:
            if "files" in setup:  # the parent is on another node
                _check_files(setup["files"])
            executor = _make_executor(setup)
        except Exception as error:
            send(error_reply(error))
            return
        send(Reply(None))
        with ExitStack() as closing:
            closing.callback(executor.close)
            while message := _read_message(stream):
                send(_answer(executor, message))


def _take_standard_input() -> BinaryIO:
    """The standard input, under another descriptor: child programs of an environment must not read from it."""
    stream = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return stream


def _take_standard_output() -> BinaryIO:
    """The standard output, under another descriptor. What libraries and child programs print goes to stderr."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return output


def _make_executor(setup: Mapping[str, Any]) -> SerialExecutor:
    """An executor of the parent's world. Modules are found as in the parent."""
    sys.path[:] = setup["path"]
    del os.environ["PYTHONPATH"]  # it pointed to this package; child programs of an environment get the user's value
    os.environ |= {"PYTHONPATH": setup["PYTHONPATH"]} if setup["PYTHONPATH"] else {}
    os.environ |= setup.get("environment", {})
    return SerialExecutor(instantiate(setup["make"]))


def _answer(executor: SerialExecutor, message: Mapping[str, Any]) -> Reply:
    """Reset or step the slot of a message."""
    slot = message["slot"]
    if "task" in message:
        return executor.reset({slot: Task(**message["task"])})[slot]
    return executor.step({slot: message["response"]})[slot]


def _kill_on_disconnect(descriptor: int) -> None:
    """Wait until the input ends. If this process does not end in time after that, kill it with its children."""
    poll = select.poll()
    poll.register(descriptor, 0)  # no events: a closed connection is always reported
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
    main(sys.argv[1])
