"""Starts and stops an OpenEnv server that serves the household environment."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

from aem_exp.cluster.rendezvous import find_free_port
from support.runs import wait_until

ACTIONS = {"look": "look", "Inventory": "inventory"}


class OpenEnvServer:
    """An OpenEnv server in a process of its own. `words` are its command, to which the port is added."""

    def __init__(self, *words, port=None):
        words = words or (str(Path(__file__).with_name("openenv_server.py")),)
        self.port = port or find_free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen([sys.executable, *words, str(self.port)], stdout=subprocess.PIPE, text=True)
        wait_until(self._answers, "OpenEnv's server")

    def _answers(self):
        assert self.process.poll() is None
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self, number=signal.SIGKILL):
        """End the server with a signal; return what it printed."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=120)[0]
