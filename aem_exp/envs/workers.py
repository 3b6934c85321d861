"""Environments in worker processes: concurrent, and replaced where one hangs or dies.

Its slot gets an error and the others go on. A worker is this module run as a child, with a `Serial` stage inside, and
speaks JSON through a socket; it ends when that socket closes, whatever became of its parent. It may be the child of another
machine, which lends its cores (see `lend`).
"""

import faulthandler
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from aem_exp.cluster import rendezvous
from aem_exp.config import Launch
from aem_exp.config.targets import instantiate
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs import Task, Turn, World
from aem_exp.envs.executor import TRACE_CHARACTERS, EnvExecutor, Reply, SerialExecutor, error_reply, serialize_task

START_SECONDS: Final = 60.0  # seconds for a child to import and make its world, where it has a core of its own
CONNECT_SECONDS: Final = 10.0  # seconds to reach a machine that lends
GRACE: Final = 10.0  # seconds for environments to close before their process is killed
MAX_LOG_BYTES: Final = 1 << 20  # bytes of stderr that are kept between requests
HEADER_BYTES: Final = 8  # bytes in front of a message that hold its length
THREAD_LIBRARIES: Final = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")


def make_executor(world: World, make: Mapping[str, Any], launch: Launch, rank: int = 0) -> EnvExecutor:
    """Where the environments of a world are stepped: in so many processes, or here, unless the world wants one of its own."""
    count = launch.workers or int(getattr(world, "own_process", False))
    lenders = RemoteNodes(Path(launch.workers_at), rank * count) if launch.workers and launch.workers_at else None
    return WorkerPool(make, count, launch.env_seconds, lenders) if count else SerialExecutor(world)


class _WorkerFailure(Exception):
    """A process hung or died at a request; `reply` is what the slot gets that had asked."""

    def __init__(self, reply: Reply):
        super().__init__(reply.error)
        self.reply = reply


class _Worker(ABC):
    """A worker as it is seen from here, and the request that it is working on."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._buffer = bytearray()
        self._seconds = self.deadline = 0.0

    @abstractmethod
    def is_alive(self) -> bool: ...

    def send(self, message: Mapping[str, Any], seconds: float) -> None:
        """Ask it something, to be answered within so many seconds."""
        self._seconds, self.deadline = seconds, time.monotonic() + seconds
        self.socket.settimeout(seconds)
        with suppress(OSError):  # dead or stuck: waiting for its answer tells which
            self.socket.sendall(_encode_message(message))

    def read_reply(self) -> Reply | _WorkerFailure | None:
        """Read on. What it said, once all of it is there; or that it died."""
        try:
            chunk = self.socket.recv(1 << 20)
        except OSError:
            chunk = b""
        if not chunk:
            return self._on_death()
        self._buffer += chunk
        end = HEADER_BYTES + int.from_bytes(self._buffer[:HEADER_BYTES])
        if len(self._buffer) < max(end, HEADER_BYTES):
            return None
        reply = json.loads(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        turn = reply["turn"]
        if turn and turn["actions"] is not None:
            turn["actions"] = tuple(turn["actions"])
        return Reply(**reply | {"turn": turn and Turn(**turn)})

    @abstractmethod
    def on_timeout(self) -> _WorkerFailure:
        """It did not answer in time."""

    @abstractmethod
    def _on_death(self) -> _WorkerFailure: ...

    @abstractmethod
    def end(self, grace: float = 0.0) -> None:
        """Make sure that it and its own children are gone, in so many seconds."""


class _LocalWorker(_Worker):
    """A worker on this machine."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`; it has no name and cannot be left behind)
        self._log_start = 0  # where in the log this request began
        with theirs:
            self.child = start_worker(theirs, self._log)

    def is_alive(self) -> bool:
        return self.child.poll() is None

    def send(self, message: Mapping[str, Any], seconds: float) -> None:
        self._log_start = os.fstat(self._log.fileno()).st_size
        if self._log_start > MAX_LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)
            self._log_start = os.lseek(self._log.fileno(), 0, os.SEEK_SET)  # the child's too: the offset is shared
        super().send(message, seconds)

    def on_timeout(self) -> _WorkerFailure:
        """It did not answer in time; the trace shows where its threads are."""
        if self.child.poll() is not None:  # dead, but a child of its own holds the socket
            return self._on_death()
        self.child.send_signal(signal.SIGUSR1)
        time.sleep(0.1)  # for faulthandler to write
        return _WorkerFailure(error_reply(f"hung: no answer within {self._seconds:g} s", self._read_log_tail()))

    def _on_death(self) -> _WorkerFailure:
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(GRACE)
        code, tail = self.child.returncode, self._read_log_tail()
        if code is None:
            return _WorkerFailure(error_reply("its process closed its connection", tail))
        if code < 0:
            return _WorkerFailure(error_reply(f"its process died (signal {-code})", tail))
        last = (tail.splitlines() or [""])[-1]
        return _WorkerFailure(error_reply(f"its process died (exit code {code}) {last}", tail))

    def _read_log_tail(self) -> str:
        if self._log.closed:  # another thread has closed all
            return ""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), TRACE_CHARACTERS, max(self._log_start, size - TRACE_CHARACTERS)).decode(
            errors="replace"
        )

    def end(self, grace: float = 0.0) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(grace)
        with suppress(OSError):
            os.killpg(self.child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # what is stuck in the kernel (a dead disk) cannot be killed
            self.child.wait(GRACE)
        self.socket.close()
        self._log.close()


class _RemoteWorker(_Worker):
    """A worker on another machine, at the other end of a connection. What it writes to stderr stays there."""

    def __init__(self, connection: socket.socket, where: str) -> None:
        super().__init__(connection)
        self._address = where

    def is_alive(self) -> bool:
        try:
            return not select.select([self.socket], [], [], 0)[0] or bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def on_timeout(self) -> _WorkerFailure:
        return _WorkerFailure(error_reply(f"hung: no answer from {self._address} within {self._seconds:g} s"))

    def _on_death(self) -> _WorkerFailure:
        return _WorkerFailure(error_reply(f"its process at {self._address} ended, or the connection broke off"))

    def end(self, grace: float = 0.0) -> None:
        self.socket.close()  # it sees that


class RemoteNodes:
    """Machines that lend their cores: a folder says where they are, and keeps the key.

    Args:
        first: the lender of the first seat; where several processes began with the same one, it would have all the work.
    """

    def __init__(self, folder: Path, first: int):
        self.folder, self.first = folder, first
        self._connected = False  # somebody has lent us something

    def process(self, seat: int) -> _RemoteWorker:
        """A new worker, at the lender whose turn it is, or at the next that answers.

        Raises:
            ConfigError: none does.
            Stop: none does any more.
        """
        try:
            process = self._connect(seat)
        except ConfigError as error:
            if self._connected:
                raise RunError(f"who lent us cores is gone: {error}", "node") from error
            raise
        self._connected = True
        return process

    def _connect(self, seat: int) -> _RemoteWorker:
        lenders, key = rendezvous.read_lenders(self.folder)
        for number in range(len(lenders)):
            where = lenders[(self.first + seat + number) % len(lenders)]
            host, _, port = where.rpartition(":")
            with suppress(OSError):
                connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
                if rendezvous.prove_key(connection, key):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    return _RemoteWorker(connection, where)
                connection.close()
        remedy = "nobody answers there; start python -m aem_exp.jobs.lend on nodes, with this folder"
        raise ConfigError("launch.workers_at", str(self.folder), remedy)


def start_worker(connection: socket.socket, log: Any) -> "subprocess.Popen[bytes]":
    """A worker that speaks through the connection, and writes what it says to nobody to the log."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "aem_exp.envs.workers", str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,  # Ctrl-C is the parent's affair, and the environment's own children die with it
        env={"PYTHONHASHSEED": "0"}  # a replay comes out the same where a world leans on the order of a set
        | os.environ
        | {f"{library}_NUM_THREADS": "1" for library in THREAD_LIBRARIES}
        | {"PYTHONPATH": str(disk.PACKAGE.parent)},
    )


@dataclass
class _SlotHistory:
    """What was said in a slot since its reset, and the process that knows of it: enough to play it again elsewhere."""

    process: _Worker
    exchanges: list[tuple[dict[str, Any], Reply]] = field(default_factory=list)


# Requests to one process, one after another: it yields (process, message, seconds) and is sent the reply, or thrown _Lost.
_Requests = Generator[tuple[_Worker, dict[str, Any], float], Reply, Any]


class WorkerPool:
    """Environments in worker processes, which play at the same time; slot n lives in worker n modulo `workers`.

    Args:
        make: the `env.make` block, which every worker calls to make its own world.
        workers: how many processes; each is started when a slot first needs it.
        seconds: how long a reset or step may take. A worker that takes longer, or dies, is replaced; its other slots are
            played again from their recorded responses, and must say the same again.
        lenders: where they live; None: on this machine.
    """

    def __init__(self, make: Mapping[str, Any], workers: int, seconds: float, lenders: RemoteNodes | None = None):
        self._make, self._workers, self._seconds, self._lenders = dict(make), workers, seconds, lenders
        self._start_seconds = START_SECONDS * max(1.0, workers / (os.cpu_count() or 1))
        self._processes: dict[int, _Worker] = {}
        self._proven: set[int] = set()  # workers whose world could be made once
        self._episodes: dict[int, _SlotHistory] = {}
        self._locks = [threading.Lock() for _ in range(workers)]  # a worker takes one call at a time
        weakref.finalize(self, _close_workers, self._processes, os.getpid())  # at exit, too

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Reply]:
        """Start episodes.

        Raises:
            ConfigError: a worker could not make the world.
        """
        return self._play(tasks)

    def step(self, responses: Mapping[int, str]) -> dict[int, Reply]:
        assert responses.keys() <= self._episodes.keys(), "a step without a reset"
        return self._play(responses)

    def close(self) -> None:
        self._episodes.clear()
        _close_workers(self._processes, os.getpid())

    def _play(self, asked: Mapping[int, Task | str]) -> dict[int, Reply]:
        """Have everything answered; each worker takes its own slots one by one and waits for no other."""
        replies: dict[int, Reply] = {}
        seats: dict[int, dict[int, Task | str]] = {}
        for slot in asked:
            seats.setdefault(slot % self._workers, {})[slot] = asked[slot]
        with ExitStack() as held:
            for seat in sorted(seats):  # in one order, or two calls could wait for each other
                held.enter_context(self._locks[seat])
            try:
                _run_concurrently([self._worker_requests(seat, mine, replies) for seat, mine in seats.items()])
            except BaseException:  # Ctrl-C, say: answers still to come would be taken for those of later requests
                self.close()
                raise
        return {slot: replies[slot] for slot in asked}

    def _worker_requests(self, seat: int, asked: Mapping[int, Task | str], replies: dict[int, Reply]) -> _Requests:
        """All that one worker has to do in one call."""
        for slot in asked:
            try:
                process = yield from self._ensure_worker(seat)
                replies[slot] = yield from self._slot_requests(process, slot, asked[slot])
            except _WorkerFailure as lost:
                replies[slot] = lost.reply
                if (process := self._processes.pop(seat, None)) is not None:
                    process.end()
            if replies[slot].error:
                self._episodes.pop(slot, None)

    def _ensure_worker(self, seat: int) -> _Requests:
        """The worker's process: the one there is, or a new one."""
        process = self._processes.get(seat)
        if process is not None and process.is_alive():
            return process
        if process is not None:  # it died between two calls, which is no slot's fault
            process.end()
        process = self._processes[seat] = self._lenders.process(seat) if self._lenders else _LocalWorker()
        path = [os.path.abspath(entry) for entry in sys.path]  # where modules are found here, the user's own included
        hello = {"make": self._make, "path": path, "PYTHONPATH": os.environ.get("PYTHONPATH")}
        try:
            reply = yield process, hello, self._start_seconds
        except _WorkerFailure as lost:
            reply = lost.reply
        if not reply.error:
            self._proven.add(seat)
            return process
        self._processes.pop(seat).end()
        if seat in self._proven:
            raise _WorkerFailure(replace(reply, error=f"its process could not be replaced: {reply.error}"))
        error = ConfigError("env.make", self._make.get("_target_"), f"a worker could not make it: {reply.error}")
        error.add_note(reply.trace)
        raise error

    def _slot_requests(self, process: _Worker, slot: int, asked: Task | str) -> _Requests:
        """One reset or step, after all that was said before where the process does not know it."""
        if isinstance(asked, str):
            message = {"slot": slot, "response": asked}
        else:
            self._episodes[slot] = _SlotHistory(process)
            try:
                message = {"slot": slot, "task": serialize_task(asked)}
            except Exception as error:
                return error_reply(error)
        episode = self._episodes[slot]
        if episode.process is not process:
            for number, (past, said) in enumerate(episode.exchanges):
                again = yield process, past, self._seconds
                if again != said:
                    why = again.error or "it is not deterministic"
                    return error_reply(f"turn {number} came out different when played again: {why}", again.trace)
        reply = yield process, message, self._seconds
        episode.process = process
        episode.exchanges.append((message, reply))
        return reply


def _run_concurrently(shifts: list[_Requests]) -> None:
    """Work off all shifts at the same time."""
    waiting: dict[_Worker, _Requests] = {}
    with selectors.DefaultSelector() as selector:

        def go_on(shift: _Requests, answer: Reply | _WorkerFailure | None) -> None:
            try:
                asked = shift.throw(answer) if isinstance(answer, _WorkerFailure) else shift.send(answer)  # type: ignore[arg-type]
            except StopIteration:
                return
            process, message, seconds = asked
            process.send(message, seconds)
            selector.register(process.socket, selectors.EVENT_READ, process)
            waiting[process] = shift

        for shift in shifts:
            go_on(shift, None)
        while waiting:
            soonest = min(process.deadline for process in waiting)
            readable = {key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))}
            now = time.monotonic()  # what answers while others are ended is not late
            for process in list(waiting):
                answer = process.read_reply() if process in readable else None
                if answer is None and process.deadline <= now:
                    answer = process.on_timeout()
                if answer is not None:
                    selector.unregister(process.socket)
                    go_on(waiting.pop(process), answer)


def _close_workers(processes: dict[int, _Worker], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner has no say
        return
    for process in list(processes.values()):  # other threads may be at it, which then lose their process
        with suppress(OSError):
            process.socket.shutdown(socket.SHUT_RDWR)  # it sees its end
    deadline = time.monotonic() + GRACE
    for seat, process in list(processes.items()):
        process.end(max(0.0, deadline - time.monotonic()))
        processes.pop(seat, None)


def _encode_message(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(HEADER_BYTES) + body


def _read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None when the socket has closed."""
    header = stream.read(HEADER_BYTES)
    body = stream.read(int.from_bytes(header)) if len(header) == HEADER_BYTES else b""
    return json.loads(body) if body else None


def _kill_on_disconnect(connection: socket.socket) -> None:
    """Wait for the socket to close. An environment that then takes too long to end is killed with all its children."""
    hung_up = select.poll()
    hung_up.register(connection, 0)  # nothing to read: closing is reported anyway
    hung_up.poll()
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _ignore_signals() -> None:
    """A scheduler signals every process of a job, but only the parent decides when to end. (SIGUSR1 shows the stacks.)"""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that the environment starts would inherit
    os.register_at_fork(  # forks of the environment can be ended as ever, from their first moment
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]),
        after_in_child=lambda: (
            signal.signal(signal.SIGTERM, signal.SIG_DFL),
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]),
        ),
    )


def main(descriptor: int) -> None:
    """A worker's life: make the world, play what is asked, end when the socket closes."""
    _ignore_signals()
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    threading.Thread(target=_kill_on_disconnect, args=[connection], daemon=True).start()
    with connection, connection.makefile("rb") as stream, suppress(ConnectionError):
        hello = _read_message(stream)
        if hello is None:
            return
        sys.path[:] = hello["path"]
        del os.environ["PYTHONPATH"]  # it led here; programs that the environment starts get the user's
        os.environ |= {"PYTHONPATH": hello["PYTHONPATH"]} if hello["PYTHONPATH"] else {}
        try:
            stage = SerialExecutor(instantiate(hello["make"]))
        except Exception as error:
            connection.sendall(_encode_message(asdict(error_reply(error))))
            return
        connection.sendall(_encode_message(asdict(Reply(None))))
        with ExitStack() as closing:
            closing.callback(stage.close)
            while message := _read_message(stream):
                slot = message["slot"]
                if "task" in message:
                    replies = stage.reset({slot: Task(**message["task"])})
                else:
                    replies = stage.step({slot: message["response"]})
                connection.sendall(_encode_message(asdict(replies[slot])))


if __name__ == "__main__":
    main(int(sys.argv[1]))
