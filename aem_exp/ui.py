"""Command `aem-exp ui`: runs the MLflow server for the store of these runs on 127.0.0.1 until Ctrl-C, and prints its link."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Final, NoReturn
from urllib.request import ProxyHandler, build_opener

from aem_exp.core import cli, errors
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.tracking import mlflow_store, store_uri

ABOUT = """\
Serve the MLflow store of these runs on 127.0.0.1, until Ctrl-C.

  aem-exp ui                          the store of ./outputs, of $AEM_OUTPUTS, or $MLFLOW_TRACKING_URI
  aem-exp ui --uri runs/mlflow.db     another store
"""
START_SECONDS: Final = 300.0  # time limit for the start of MLflow, which takes 5 s on an idle machine
STOP_SECONDS: Final = 10.0  # time limit for its end, before it is killed


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)))


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("aem-exp ui", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--uri", help="the store: a .db file, or a URI in the form of MLflow")
    parser.add_argument("--port", type=int, help="default: the first free port from 5000")
    return parser.parse_args(argv)


def _run_command(arguments: argparse.Namespace) -> int:
    uri = store_uri.resolve_uri(arguments.uri, store_uri.default_outputs())
    if uri == store_uri.OFF or store_uri.is_databricks(uri):
        raise ConfigError("--uri", uri, "has no pages to serve; name a .db file or a database")
    if store_uri.is_remote(uri):
        print(f"open    {store_uri.store_page(uri).link}   (this store already has a server)")
        return 0
    database = store_uri.sqlite_file(uri)
    if database is not None and not database.is_file():
        raise ConfigError(
            "--uri", str(database), "there is no such file; the first run creates it in the outputs folder"
        )
    store_uri.probe(uri)
    mlflow_store.require_mlflow()
    port = _choose_port(arguments.port)
    with _run_server(uri, port) as (server, log):
        print(f"store   {errors.redact(uri)}", flush=True)
        _wait_until_ready(server, log, uri, port)
        for heading, text in [("tunnel", store_uri.ssh_tunnel_command(port)), ("open", store_uri.local_address(port))]:
            if text:
                print(f"{heading:<7} {text}", flush=True)
        print("        Ctrl-C stops it", flush=True)
        raise RunError(f"the MLflow server has ended with exit code {server.wait()}")


def _choose_port(port: int | None) -> int:
    if port is None:
        return store_uri.first_free_port()
    if not 0 < port < 65536:
        raise ConfigError("--port", port, "must be a whole number from 1 to 65535")
    if store_uri.first_free_port(port) != port:
        raise ConfigError("--port", port, "this port is in use; without --port, a free one is chosen")
    return port


@contextmanager
def _run_server(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Run a server in its own process group, which ends with this block. Its output goes to a file.

    Yields:
        The server process and the file.
    """
    command, environment = store_uri.serve_command(uri, port)
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), _exit_on_signal)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield server, log
        finally:
            _stop_server(server)


def _exit_on_signal(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_until_ready(server: subprocess.Popen[bytes], log: IO[bytes], uri: str, port: int) -> None:
    """Wait until the server answers.

    Raises:
        ConfigError: the server has ended, because it cannot use the store.
        RunError: the server does not answer in time.
    """
    opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            mlflow_store.raise_store_error(
                uri, RuntimeError("\n".join(reversed(lines[-50:])) or "its server has ended")
            )
        try:
            opener.open(f"{store_uri.local_address(port)}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RunError(f"the MLflow server did not answer within {START_SECONDS:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
