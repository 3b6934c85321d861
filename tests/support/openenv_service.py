"""Starts and stops an OpenEnv server that serves the household environment."""

import socket
import subprocess
import sys
from pathlib import Path

from support.runs import wait_until

ACTIONS = {"look": "look", "Inventory": "inventory"}


class OpenEnvServer:
    """OpenEnv's own server in a process of its own."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(Path(__file__).with_name("openenv_server.py")), str(self.port)]
        self.process = subprocess.Popen(command)
        wait_until(self._answers, "OpenEnv's server")

    def _answers(self):
        assert self.process.poll() is None
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self):
        self.process.kill()
        self.process.wait()
