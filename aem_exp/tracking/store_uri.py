"""MLflow tracking URIs: makes them absolute, hides their credentials, checks that the server answers, and builds the
command that serves a store.

Uses only the standard library, so that an unusable store is found before MLflow is imported.
"""

import getpass
import os
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from aem_exp.core.errors import ConfigError, redact
from aem_exp.rundir.metrics import METRICS

OFF = "off"
DEFAULT_PORT = 5000  # for MLflow's pages, if the port is free
PROBE_TIMEOUT = 3.0  # seconds to wait for a server's port at the start
CHOICES = "sqlite:////folder/mlflow.db, http://host:port, postgresql://…, mysql://…, databricks, off"
SCHEME_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def resolve_uri(tracking: str | None, outputs: Path) -> str:
    """Return an absolute URI: `tracking`, else $MLFLOW_TRACKING_URI, else a sqlite file in `outputs`."""
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outputs.absolute() / 'mlflow.db'}"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{Path(uri).expanduser()}"
    if (database := sqlite_file(uri)) is not None:
        return f"sqlite:///{database}"  # relative to the current folder, and the same for every later process
    if uri != OFF and _scheme(uri) not in SCHEME_PORTS and not is_databricks(uri):
        refuse(uri, "is not a store that MLflow 3 can write to")
    return uri


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.partition("+")[0]


def sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def is_databricks(uri: str) -> bool:
    return uri == "databricks" or uri.startswith("databricks:")


def is_remote(uri: str) -> bool:
    return uri.startswith("http") or is_databricks(uri)


def refuse(uri: str, problem: str, remedy: str = "") -> NoReturn:
    """Raise the ConfigError of a store that cannot be used."""
    other = f"choose from {CHOICES} (which writes only {METRICS})"
    raise ConfigError("tracking", redact(uri), remedy=f"{redact(problem)}; {remedy}{', or ' if remedy else ''}{other}")


def probe(uri: str) -> None:
    """Raise a ConfigError if the port of a server does not answer within seconds. MLflow is not imported."""
    parts, scheme = urlsplit(uri), _scheme(uri)
    if scheme not in SCHEME_PORTS or parts.hostname is None:
        return
    if scheme in getproxies() and not proxy_bypass(parts.hostname):
        return  # only the proxy can reach the server
    try:
        socket.create_connection((parts.hostname, parts.port or SCHEME_PORTS[scheme]), timeout=PROBE_TIMEOUT).close()
    except OSError as error:
        refuse(uri, f"does not answer ({error.strerror or error})", "start the server, correct the address")


def default_outputs() -> Path:
    """Return the default folder of runs: $AEM_OUTPUTS, else `outputs`."""
    return Path(os.environ.get("AEM_OUTPUTS") or "outputs").expanduser()


def serve_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the MLflow command that serves a store on 127.0.0.1, and its environment, which has the credentials."""
    # These settings halve the start-up time.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return words, {**os.environ, **settings, "MLFLOW_BACKEND_STORE_URI": uri}


def local_address(port: int) -> str:
    """Return the address of a store that this machine serves."""
    return f"http://127.0.0.1:{port}"


def ui_command(uri: str, port: int) -> str:
    """Return the `aem-exp ui` command that serves a store on this machine, without options that have their default."""
    script = Path(sys.executable).with_name("aem-exp")
    found = shutil.which("aem-exp") == str(script)
    words = ["aem-exp"] if found else [str(script)] if script.exists() else [sys.executable, "-m", "aem_exp"]
    try:
        default = resolve_uri(None, default_outputs())
    except ConfigError:  # $MLFLOW_TRACKING_URI is not a valid store
        default = OFF
    named = [] if uri == default else ["--uri", str(sqlite_file(uri) or redact(uri))]
    return shlex.join([*words, "ui", *named, *([] if port == DEFAULT_PORT else ["--port", str(port)])])


@dataclass(frozen=True)
class MLflowPage:
    """How to open a page of MLflow."""

    link: str
    """Address of the page."""
    command: str | None = None
    """Command that serves the store; None if a server does."""
    tunnel: str | None = None
    """SSH command that forwards the port to the user's machine; None if the user is not connected by SSH."""
    more: tuple[tuple[str, str], ...] = ()
    """Other pages of the same store: headings and links."""

    def lines(self, *links: str) -> list[tuple[str, str]]:
        """Return the lines to print: headings and texts. `links`: other pages of the same store, shown instead of `link`."""
        commands = {"serve": self.command, "tunnel": self.tunnel and f"{self.tunnel}   (on your own machine)"}
        pages = [("open", link) for link in links or (self.link,)]
        return [*((name, text) for name, text in commands.items() if text), *pages, *self.more]


def store_page(uri: str, path: str = "") -> MLflowPage:
    """Return how to open a page of a store. `path`: the part of the link after the address of the server."""
    if is_remote(uri):
        return MLflowPage(f"{redact(uri).replace('***@', '').rstrip('/')}/{path}")
    port = first_free_port()
    return MLflowPage(f"{local_address(port)}/{path}", ui_command(uri, port), ssh_tunnel_command(port))


def first_free_port(first: int = DEFAULT_PORT) -> int:
    """Return the first free port from `first` on; other stores may be served already."""
    for port in range(first, first + 100):
        with socket.socket() as connection:
            connection.settimeout(0.2)
            if connection.connect_ex(("127.0.0.1", port)) != 0:
                return port
    return first


def ssh_tunnel_command(port: int) -> str | None:
    """Return the `ssh -L` command for a user who is connected by SSH; None otherwise."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return None
    port_option = [] if words[3] == "22" else ["-p", words[3]]
    return shlex.join(["ssh", "-N", "-L", f"{port}:127.0.0.1:{port}", *port_option, f"{getpass.getuser()}@{words[2]}"])
