"""Environments in worker processes: they step at the same time, and a worker that hangs or dies is replaced.

The slot whose request failed gets an error; the worker's other slots are replayed in its replacement. `worker_process` is the
program of a worker, `worker_client` the parent's connection to one; `remote_nodes` starts workers on other nodes.
"""

import os
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Generator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from aem_exp.config import Launch
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task, World
from aem_exp.envs.executor import EnvExecutor, Reply, SerialExecutor, error_reply, serialize_task
from aem_exp.envs.remote_nodes import RemoteNodes
from aem_exp.envs.worker_client import LocalWorker, WorkerClient, WorkerFailure
from aem_exp.envs.worker_process import GRACE_SECONDS

START_SECONDS: Final = 60.0  # seconds for a worker to import and make its world, if it has a core of its own


def make_executor(world: World, make: Mapping[str, Any], launch: Launch, rank: int = 0) -> EnvExecutor:
    """`launch.workers` processes; without those, one process if the world asks for it, otherwise this process."""
    count = launch.workers or int(getattr(world, "own_process", False))
    nodes = RemoteNodes(Path(launch.workers_at), rank * count) if launch.workers and launch.workers_at else None
    return WorkerPool(make, count, launch.env_seconds, nodes) if count else SerialExecutor(world)


@dataclass
class _SlotHistory:
    """The messages of a slot since its reset, with their replies, and the worker that has them: what a replay needs."""

    worker: WorkerClient
    exchanges: list[tuple[dict[str, Any], Reply]] = field(default_factory=list)


# Requests to one worker, one after another: it yields (worker, message, seconds) and is sent the reply, or thrown WorkerFailure.
_Requests = Generator[tuple[WorkerClient, dict[str, Any], float], Reply, Any]


class WorkerPool:
    """Environments in worker processes, which step at the same time; slot n lives in worker n modulo `workers`.

    Args:
        make: the `env.make` block, from which every worker makes its own world.
        workers: how many processes; each is started when a slot first needs it.
        seconds: how long a reset or step may take. A worker that takes longer, or dies, is replaced; its other slots are
            replayed from their recorded responses, and every reply must be the same as before.
        nodes: the nodes on which workers are started; None: this machine.
    """

    def __init__(self, make: Mapping[str, Any], workers: int, seconds: float, nodes: RemoteNodes | None = None):
        self._make, self._count, self._seconds, self._nodes = dict(make), workers, seconds, nodes
        self._start_seconds = START_SECONDS * max(1.0, workers / (os.cpu_count() or 1))
        self._workers: dict[int, WorkerClient] = {}
        self._has_started: set[int] = set()  # indices of workers whose world could be made once
        self._histories: dict[int, _SlotHistory] = {}
        self._locks = [threading.Lock() for _ in range(workers)]  # a worker takes one call at a time
        weakref.finalize(self, _close_workers, self._workers, os.getpid())  # at exit, too

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
        """The replies of all slots. A worker takes its slots one after another; workers do not wait for each other."""
        replies: dict[int, Reply] = {}
        by_worker: dict[int, dict[int, Task | str]] = {}
        for slot in inputs:
            by_worker.setdefault(slot % self._count, {})[slot] = inputs[slot]
        with ExitStack() as locks:
            for index in sorted(by_worker):  # in one order, or two calls could wait for each other
                locks.enter_context(self._locks[index])
            try:
                _run_concurrently([self._worker_requests(index, own, replies) for index, own in by_worker.items()])
            except (
                BaseException
            ):  # Ctrl-C, say: replies that are still to come would be taken for those of later requests
                self.close()
                raise
        return {slot: replies[slot] for slot in inputs}

    def _worker_requests(self, index: int, inputs: Mapping[int, Task | str], replies: dict[int, Reply]) -> _Requests:
        """All requests of one call to one worker."""
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
        """The running worker of an index, started if there is none."""
        worker = self._workers.get(index)
        if worker is not None and worker.is_alive():
            return worker
        if worker is not None:  # it died between two calls, which is no slot's fault
            worker.end()
        worker = self._workers[index] = self._nodes.start_worker(index) if self._nodes else LocalWorker()
        path = [os.path.abspath(entry) for entry in sys.path]  # where modules are found here, the user's own included
        setup = {"make": self._make, "path": path, "PYTHONPATH": os.environ.get("PYTHONPATH")}
        try:
            reply = yield worker, setup, self._start_seconds
        except WorkerFailure as failure:
            reply = failure.reply
        if not reply.error:
            self._has_started.add(index)
            return worker
        self._workers.pop(index).end()
        if index in self._has_started:
            raise WorkerFailure(replace(reply, error=f"its process could not be replaced: {reply.error}"))
        error = ConfigError("env.make", self._make.get("_target_"), f"a worker could not make it: {reply.error}")
        error.add_note(reply.trace)
        raise error

    def _slot_requests(self, worker: WorkerClient, slot: int, task_or_response: Task | str) -> _Requests:
        """One reset or step, after a replay of the episode if the worker does not have it."""
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
                    why = reply.error or "it is not deterministic"
                    return error_reply(f"turn {number} came out different when played again: {why}", reply.trace)
        reply = yield worker, message, self._seconds
        history.worker = worker
        history.exchanges.append((message, reply))
        return reply


def _run_concurrently(generators: list[_Requests]) -> None:
    """Run generators of requests, one for each worker, until all have ended."""
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
            now = time.monotonic()  # a reply that arrives while another worker is ended is not late
            for worker in list(waiting):
                result = worker.read_reply() if worker in readable else None
                if result is None and worker.deadline <= now:
                    result = worker.on_timeout()
                if result is not None:
                    selector.unregister(worker.socket)
                    advance(waiting.pop(worker), result)


def _close_workers(workers: dict[int, WorkerClient], owner: int) -> None:
    """End all workers of a pool, unless this process is a fork of the one that owns them."""
    if os.getpid() != owner:
        return
    for worker in list(workers.values()):  # other threads may use them; their requests then fail
        with suppress(OSError):
            worker.socket.shutdown(socket.SHUT_RDWR)  # at which the worker ends
    deadline = time.monotonic() + GRACE_SECONDS
    for index, worker in list(workers.items()):
        worker.end(max(0.0, deadline - time.monotonic()))
        workers.pop(index, None)
