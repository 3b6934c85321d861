"""Command `python -m aem_exp.jobs.lend FOLDER`: offers the cores of this node to runs, which step their environments here.

A run must know the key in the folder, which only its owner can read. Messages are not encrypted; therefore the address belongs
to a private network (`interface` in site.yaml).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from aem_exp.cluster import rendezvous, slurm
from aem_exp.core import cli, disk
from aem_exp.envs.worker_process import start_worker_process

KEY_SECONDS: Final = 5.0  # time limit for a client to prove that it knows the key
DESCRIPTION = """\
Offer the cores of this node to runs with launch.workers_at=FOLDER, until this command is stopped. On a cluster:

  sbatch --nodes=16 --cpus-per-task=32 --wrap "srun python -m aem_exp.jobs.lend /shared/lent"
"""


def main(argv: list[str] | None = None) -> int:
    return cli.run_cli(lambda: _run(_parse_arguments(argv)))


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(
        "python -m aem_exp.jobs.lend", description=DESCRIPTION, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that all nodes and runs can read")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    folder = arguments.folder.expanduser().absolute()
    disk.check_writable(folder, "FOLDER")
    site, _ = slurm.read_site()
    host, key = rendezvous.private_address(site.interface), rendezvous.ensure_key(folder).encode()
    signal.signal(signal.SIGTERM, _raise_interrupt)
    with socket.create_server((host, 0), backlog=1024) as server:
        address = f"{host}:{server.getsockname()[1]}"
        address_file = folder / f"{rendezvous.NODE_PREFIX}{socket.gethostname()}-{os.getpid()}"
        rendezvous.write_private(address_file, f"{address}\n")
        print(f"offers   {os.cpu_count()} cores at {address}", flush=True)
        try:
            _accept_connections(server, key)
        finally:
            address_file.unlink(missing_ok=True)
    return 0


def _accept_connections(server: socket.socket, key: bytes) -> NoReturn:
    """Start a worker for each client that knows the key, and kill all workers at the end."""
    workers: set[subprocess.Popen[bytes]] = set()
    try:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_run_worker, args=[connection, key, workers], daemon=True).start()
    finally:
        for worker in list(workers):
            with suppress(OSError):
                os.killpg(worker.pid, signal.SIGKILL)


def _run_worker(connection: socket.socket, key: bytes, workers: "set[subprocess.Popen[bytes]]") -> None:
    """Run one worker, which ends when its connection is closed."""
    with connection:
        connection.settimeout(KEY_SECONDS)
        try:
            if not rendezvous.verify_key(connection, key):
                return
        except OSError:  # the client sent nothing or closed the connection
            return
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        workers.add(worker := start_worker_process(connection, None))
    worker.wait()
    workers.discard(worker)


def _raise_interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
