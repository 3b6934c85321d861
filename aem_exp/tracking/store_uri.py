"""MLflow tracking URIs: resolve them to absolute ones, hide their credentials, check that the server answers, and build
the command that serves a store.

Standard library only, so that an unusable tracker is refused before MLflow is imported.
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
DEFAULT_PORT = 5000  # where MLflow's pages are served, if it is free
PROBE_TIMEOUT = 3.0  # seconds for a tracker's port to answer at start
CHOICES = "sqlite:////folder/mlflow.db, http://host:port, postgresql://…, mysql://…, databricks, off"
SCHEME_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def resolve_uri(tracking: str | None, outputs: Path) -> str:
    """Return an absolute URI: the one asked for, else $MLFLOW_TRACKING_URI, else a sqlite file in `default_outputs`."""
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outputs.absolute() / 'mlflow.db'}"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{Path(uri).expanduser()}"
    if (database := sqlite_file(uri)) is not None:
        return f"sqlite:///{database}"  # relative to where it was asked for, not to where it is read
    if uri != OFF and _scheme(uri) not in SCHEME_PORTS and not is_databricks(uri):
        refuse(uri, "is not a store that MLflow 3 writes to")
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
    other = f"choose from {CHOICES} ({METRICS} alone)"
    raise ConfigError("tracking", redact(uri), remedy=f"{redact(problem)}; {remedy}{', or ' if remedy else ''}{other}")


def probe(uri: str) -> None:
    """Refuse a tracker whose port does not answer, within seconds and without importing MLflow."""
    parts, scheme = urlsplit(uri), _scheme(uri)
    if scheme not in SCHEME_PORTS or parts.hostname is None:
        return
    if scheme in getproxies() and not proxy_bypass(parts.hostname):
        return  # only the proxy can tell
    try:
        socket.create_connection((parts.hostname, parts.port or SCHEME_PORTS[scheme]), timeout=PROBE_TIMEOUT).close()
    except OSError as error:
        refuse(uri, f"does not answer ({error.strerror or error})", "start it, correct the address")


def default_outputs() -> Path:
    """Return the folder of all runs, where nothing else is said."""
    return Path(os.environ.get("AEM_OUTPUTS") or "outputs").expanduser()


def serve_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command of MLflow that serves a store on loopback, and its environment, which holds the credentials."""
    lean = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # starts in half the time
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return words, {**os.environ, **lean, "MLFLOW_BACKEND_STORE_URI": uri}


def local_address(port: int) -> str:
    """Return the address of a store that is served here."""
    return f"http://127.0.0.1:{port}"


def ui_command(uri: str, port: int) -> str:
    """Return the command that serves a store to a person here; what it would choose by itself is left out."""
    script = Path(sys.executable).with_name("aem-exp")
    found = shutil.which("aem-exp") == str(script)
    words = ["aem-exp"] if found else [str(script)] if script.exists() else [sys.executable, "-m", "aem_exp"]
    try:
        usual = resolve_uri(None, default_outputs())
    except ConfigError:  # the environment names a store that there cannot be
        usual = OFF
    named = [] if uri == usual else ["--uri", str(sqlite_file(uri) or redact(uri))]
    return shlex.join([*words, "ui", *named, *([] if port == DEFAULT_PORT else ["--port", str(port)])])


@dataclass(frozen=True)
class MLflowPage:
    """Where a person sees something: the link, the command that serves it (None: a server does), the way there by ssh.

    `more`: other pages of the same store, as headings and links.
    """

    link: str
    command: str | None = None
    tunnel: str | None = None
    more: tuple[tuple[str, str], ...] = ()

    def lines(self, *links: str) -> list[tuple[str, str]]:
        """What to print, headed; `links`: other pages of the same store, in the place of this one."""
        ways = {"serve": self.command, "tunnel": self.tunnel and f"{self.tunnel}   (on your own machine)"}
        pages = [("open", link) for link in links or (self.link,)]
        return [*((name, text) for name, text in ways.items() if text), *pages, *self.more]


def store_page(uri: str, path: str = "") -> MLflowPage:
    """The way to a page of a store, by what follows the address where that is served."""
    if is_remote(uri):
        return MLflowPage(f"{redact(uri).replace('***@', '').rstrip('/')}/{path}")
    port = first_free_port()
    return MLflowPage(f"{local_address(port)}/{path}", ui_command(uri, port), ssh_tunnel_command(port))


def first_free_port(first: int = DEFAULT_PORT) -> int:
    """Return the first port that nobody listens on: another store may be served already."""
    for port in range(first, first + 100):
        with socket.socket() as door:
            door.settimeout(0.2)
            if door.connect_ex(("127.0.0.1", port)) != 0:
                return port
    return first


def ssh_tunnel_command(port: int) -> str | None:
    """Return the `ssh -L` line for someone who came here by ssh."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return None
    there = [] if words[3] == "22" else ["-p", words[3]]
    return shlex.join(["ssh", "-N", "-L", f"{port}:127.0.0.1:{port}", *there, f"{getpass.getuser()}@{words[2]}"])
