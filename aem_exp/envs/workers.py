"""Steps environments in parallel worker processes, and replaces a worker that hangs or dies.

The slot of the failed request gets an error. The other slots of that worker are replayed in the new worker. `worker_process` is
the program of a worker, and `worker_client` the parent's connection to it.
"""

import os
import selectors
import shlex
import socket
import sys
import threading
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from aem_exp.config import Launch
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task, World
from aem_exp.envs.executor import EnvExecutor, Reply, SerialExecutor, error_reply, serialize_task
from aem_exp.envs.worker_client import WorkerClient, WorkerFailure
from aem_exp.envs.worker_process import GRACE_SECONDS, describe_files

START_SECONDS: Final = 60.0  # for a worker with its own CPU core to import and make its world


def make_executor(world: World, make: Mapping[str, Any], launch: Launch) -> EnvExecutor:
    """The executor of a run: `launch.workers` worker processes, or this process if that is 0.

    If `launch.workers` is 0 and the world sets `own_process`, there is one worker process.
    """
    count = launch.workers or int(getattr(world, "own_process", False))
    prefix = shlex.split(launch.worker_prefix or "") if launch.workers else []
    return WorkerPool(make, count, launch.env_seconds, prefix) if count else SerialExecutor(world)


@dataclass
class _SlotHistory:
    """The data to replay an episode in another worker."""

    worker: WorkerClient
    """The worker that plays the episode."""
    exchanges: list[tuple[dict[str, Any], Reply]] = field(default_factory=list)
    """Messages since the reset, with their replies."""


# A generator of requests to one worker. It yields (worker, message, seconds) and receives the reply, or WorkerFailure is raised.
_Requests = Generator[tuple[WorkerClient, dict[str, Any], float], Reply, Any]


class WorkerPool:
    """Steps environments in parallel worker processes; worker `n % workers` has slot n.

    Args:
        make: the `env.make` block. Every worker makes its own world from it.
        workers: number of processes. Each starts when a slot first needs it.
        seconds: time limit of a reset or step. A worker that takes longer or dies is replaced. Its other slots are replayed
            from their recorded responses, and every reply must be the same as before.
        prefix: words in front of the command of a worker, which run it on another node.
    """

    def __init__(self, make: Mapping[str, Any], workers: int, seconds: float, prefix: Sequence[str] = ()):
        self._make, self._count, self._seconds, self._prefix = dict(make), workers, seconds, list(prefix)
        self._start_seconds = START_SECONDS * max(1.0, workers / (os.cpu_count() or 1))
        self._workers: dict[int, WorkerClient] = {}
        self._has_started: set[int] = set()  # indices of workers that have made their world at least once
        self._histories: dict[int, _SlotHistory] = {}
        self._locks = [threading.Lock() for _ in range(workers)]  # a worker takes one call at a time
        weakref.finalize(self, _close_workers, self._workers, os.getpid())  # also runs at exit

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Reply]:
        """Start episodes.

        Raises:
            ConfigError: a worker could not make the world.
        """
        return self._call(tasks)

    def step(self, responses: Mapping[int, str]) -> dict[int, Reply]:
        assert responses.keys() <= self._histories.keys(), "a step without a reset"
        return self._call(responses)

    def close(self) -> None:
        self._histories.clear()
        _close_workers(self._workers, os.getpid())

    def _call(self, inputs: Mapping[int, Task | str]) -> dict[int, Reply]:
        """The replies of all slots. A worker handles its slots one after another; the workers run in parallel."""
        replies: dict[int, Reply] = {}
        by_worker: dict[int, dict[int, Task | str]] = {}
        for slot in inputs:
            by_worker.setdefault(slot % self._count, {})[slot] = inputs[slot]
        with ExitStack() as locks:
            for index in sorted(by_worker):  # always in the same order: otherwise two calls could deadlock
                locks.enter_context(self._locks[index])
            try:
                _run_concurrently([self._worker_requests(index, own, replies) for index, own in by_worker.items()])
            except BaseException:  # such as Ctrl-C; a late reply would be read as the reply to a later request
                self.close()
                raise
        return {slot: replies[slot] for slot in inputs}

    def _worker_requests(self, index: int, inputs: Mapping[int, Task | str], replies: dict[int, Reply]) -> _Requests:
        """All requests of one call to one worker; puts the replies into `replies`."""
        for slot in inputs:
            try:
                worker = yield from self._ensure_worker(index)
                replies[slot] = yield from self._slot_requests(worker, slot, inputs[slot])
            except WorkerFailure as failure:
                replies[slot] = failure.reply
                if (worker := self._workers.pop(index, None)) is not None:
                    worker.end()
            if replies[slot].error:
                self._histories.pop(slot, None)

    def _ensure_worker(self, index: int) -> _Requests:
        """The running worker of an index; started if there is none."""
        worker = self._workers.get(index)
        if worker is not None and worker.is_alive():
            return worker
        if worker is not None:  # it died between two calls: no slot gets an error
            worker.end()
        worker = self._workers[index] = WorkerClient(self._prefix)
        path = [os.path.abspath(entry) for entry in sys.path]  # the worker must find the user's own modules
        setup = {"make": self._make, "path": path, "PYTHONPATH": os.environ.get("PYTHONPATH")}
        if self._prefix:
            variables = {k: v for k, v in os.environ.items() if k.startswith("AEM_") or k.endswith("_DATA")}
            setup |= {"files": describe_files(path), "environment": variables}  # ssh passes on no variables
        try:
            reply = yield worker, setup, self._start_seconds
        except WorkerFailure as failure:
            reply = failure.reply
        if not reply.error:
            self._has_started.add(index)
            return worker
        self._workers.pop(index).end()
        if index in self._has_started:
            raise WorkerFailure(replace(reply, error=f"the worker process could not be replaced: {reply.error}"))
        error = ConfigError("env.make", self._make.get("_target_"), f"failed in a worker process: {reply.error}")
        error.add_note(reply.trace)
        raise error

    def _slot_requests(self, worker: WorkerClient, slot: int, task_or_response: Task | str) -> _Requests:
        """One reset or step. If the worker does not have the episode, replay it first."""
        if isinstance(task_or_response, str):
            message = {"slot": slot, "response": task_or_response}
        else:
            self._histories[slot] = _SlotHistory(worker)
            try:
                message = {"slot": slot, "task": serialize_task(task_or_response)}
            except Exception as error:
                return error_reply(error)
        history = self._histories[slot]
        if history.worker is not worker:
            for number, (past, expected) in enumerate(history.exchanges):
                reply = yield worker, past, self._seconds
                if reply != expected:
                    reason = reply.error or "the environment is not deterministic"
                    return error_reply(f"turn {number} differs when replayed: {reason}", reply.trace)
        reply = yield worker, message, self._seconds
        history.worker = worker
        history.exchanges.append((message, reply))
        return reply


def _run_concurrently(generators: list[_Requests]) -> None:
    """Run generators of requests, one for each worker, in parallel until all have ended."""
    waiting: dict[WorkerClient, _Requests] = {}
    with selectors.DefaultSelector() as selector:

        def advance(generator: _Requests, result: Reply | WorkerFailure | None) -> None:
            try:
                request = (
                    generator.throw(result) if isinstance(result, WorkerFailure) else generator.send(result)  # type: ignore[arg-type]
                )
            except StopIteration:
                return
            worker, message, seconds = request
            worker.send(message, seconds)
            selector.register(worker.socket, selectors.EVENT_READ, worker)
            waiting[worker] = generator

        for generator in generators:
            advance(generator, None)
        while waiting:
            deadline = min(worker.deadline for worker in waiting)
            readable = {key.data for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
            now = time.monotonic()  # taken once: a reply that arrives while another worker is terminated is not late
            for worker in list(waiting):
                result = worker.read_reply() if worker in readable else None
                if result is None and worker.deadline <= now:
                    result = worker.on_timeout()
                if result is not None:
                    selector.unregister(worker.socket)
                    advance(waiting.pop(worker), result)


def _close_workers(workers: dict[int, WorkerClient], owner: int) -> None:
    """End all workers of a pool. Does nothing in a fork of the owner process."""
    if os.getpid() != owner:
        return
    for worker in list(workers.values()):  # requests of other threads fail
        with suppress(OSError):
            worker.socket.shutdown(socket.SHUT_RDWR)  # the worker then ends
    deadline = time.monotonic() + GRACE_SECONDS
    for index, worker in list(workers.items()):
        worker.end(max(0.0, deadline - time.monotonic()))
        workers.pop(index, None)
