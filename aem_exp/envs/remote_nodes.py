"""Starts workers on other nodes that lend their CPU cores (see `aem_exp.jobs.lend`)."""

import select
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from aem_exp.cluster import rendezvous
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs.executor import error_reply
from aem_exp.envs.worker_client import WorkerClient, WorkerFailure

CONNECT_SECONDS: Final = 10.0  # to connect to a node


class RemoteWorker(WorkerClient):
    """A worker on another node, over a TCP connection. Its stderr stays on that node."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        super().__init__(connection)
        self._address = address

    def is_alive(self) -> bool:
        try:
            return not select.select([self.socket], [], [], 0)[0] or bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def on_timeout(self) -> WorkerFailure:
        return WorkerFailure(error_reply(f"hung: no answer from {self._address} within {self._seconds:g} s"))

    def _on_death(self) -> WorkerFailure:
        return WorkerFailure(error_reply(f"the worker process at {self._address} ended, or the connection was lost"))

    def end(self, grace: float = 0.0) -> None:
        self.socket.close()  # the worker then ends


class RemoteNodes:
    """The nodes that are registered in a folder, with the key that they require.

    Args:
        first: index of the node of the first worker. It differs between ranks, so that the work is spread over all nodes.
    """

    def __init__(self, folder: Path, first: int):
        self.folder, self.first = folder, first
        self._has_connected = False  # whether a node ever answered

    def start_worker(self, index: int) -> RemoteWorker:
        """Start the worker of an index on its node, or on the next node that answers.

        Raises:
            ConfigError: no node has answered yet.
            RunError: nodes have answered before, but now none answers.
        """
        try:
            worker = self._connect(index)
        except ConfigError as error:
            if self._has_connected:
                raise RunError(f"none of the nodes that lend their cores answers any more: {error}", "node") from error
            raise
        self._has_connected = True
        return worker

    def _connect(self, index: int) -> RemoteWorker:
        addresses, key = rendezvous.read_lenders(self.folder)
        for attempt in range(len(addresses)):
            address = addresses[(self.first + index + attempt) % len(addresses)]
            host, _, port = address.rpartition(":")
            with suppress(OSError):
                connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
                if rendezvous.prove_key(connection, key):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    return RemoteWorker(connection, address)
                connection.close()
        remedy = "none of its nodes answers; start python -m aem_exp.jobs.lend with this folder on the nodes"
        raise ConfigError("launch.workers_at", str(self.folder), remedy)
