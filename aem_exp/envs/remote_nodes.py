"""Workers on other nodes, which lend their cores (see `aem_exp.jobs.lend`)."""

import select
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from aem_exp.cluster import rendezvous
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs.executor import error_reply
from aem_exp.envs.worker_client import WorkerClient, WorkerFailure

CONNECT_SECONDS: Final = 10.0  # seconds to reach a node


class RemoteWorker(WorkerClient):
    """A worker on another node, reached by a TCP connection. Its stderr stays on that node."""

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
        return WorkerFailure(error_reply(f"its process at {self._address} ended, or the connection broke off"))

    def end(self, grace: float = 0.0) -> None:
        self.socket.close()  # at which the worker ends


class RemoteNodes:
    """The nodes that a folder lists, with the key that they require.

    Args:
        first: the node of the first worker. Different ranks choose different ones, so that no node gets all the work.
    """

    def __init__(self, folder: Path, first: int):
        self.folder, self.first = folder, first
        self._has_connected = False  # whether any node has ever answered

    def start_worker(self, index: int) -> RemoteWorker:
        """Start the worker of an index on the node whose turn it is, or on the next one that answers.

        Raises:
            ConfigError: none answers.
            RunError: none answers any more.
        """
        try:
            worker = self._connect(index)
        except ConfigError as error:
            if self._has_connected:
                raise RunError(f"no node that lends its cores is left: {error}", "node") from error
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
        remedy = "no node there answers; start python -m aem_exp.jobs.lend on nodes, with this folder"
        raise ConfigError("launch.workers_at", str(self.folder), remedy)
