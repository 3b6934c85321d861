"""The folder through which a run finds its servers: their addresses (`urls`), the key of every request (`key`), and the
weights that servers read (`weights/`).

Only this user or root may be able to write it.
"""

import hmac
import ipaddress
import os
import secrets
import shutil
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError, RunError

if TYPE_CHECKING:
    from filelock import BaseFileLock

URLS, KEY, WEIGHTS = "urls", "key", "weights"
MAX_CHARACTERS = 1 << 16  # characters of `urls`, and of `key`
NONCE_BYTES, WELCOME = 32, b"welcome\n"
NODE_PREFIX, RELEASED = "node-", "over"  # in that of a job: where each server is, and that they are not needed any more
ENDED_PREFIX = "gone-"  # in that of a job: why the server of a node has ended, which nobody starts again


def read_urls(folder: Path) -> tuple[list[str], str]:
    """Where the servers are, and the key that they require ("" where there is none).

    Raises:
        ConfigError: the folder does not say where they are, others could read its key, or others could write what it says.
    """
    _check_owner(folder, folder, "launch.servers")
    try:
        text = _read_private(folder / URLS, "launch.servers")
    except OSError as error:
        raise ConfigError(
            "launch.servers", str(folder), f"must be a folder with {URLS}, one a line: {error.strerror}"
        ) from error
    urls = [line.strip().rstrip("/") for line in text.splitlines() if line.strip()]
    if not urls:
        raise ConfigError("launch.servers", str(folder / URLS), "names no server: one address a line")
    for url in urls:
        if (why := _url_error(url)) is not None:
            raise ConfigError("launch.servers", str(folder / URLS), f"{why}; a line reads http://10.0.0.7:41234")
    return urls, _read_key(folder, urls, "launch.servers")


def _url_error(url: str) -> str | None:
    """What is wrong with an address, without repeating it."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:
        is_address = False
    if not is_address:
        return "holds a line that is no address"
    return f"holds credentials; those belong into {KEY}" if parts.username or parts.password else None


def _read_key(folder: Path, urls: list[str], field: str) -> str:
    file = folder / KEY
    try:
        key = _read_private(file, field).strip()
    except FileNotFoundError:
        if all(_is_loopback(urlsplit(url).hostname or "") for url in urls):
            return ""
        raise ConfigError(field, str(folder), f"must have a file {KEY}: anybody could ask without") from None
    except OSError as error:
        raise ConfigError(field, str(file), f"cannot be read: {error.strerror}") from error
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(field, str(file), "must hold a key: printable characters, one line")
    return key


def _read_private(file: Path, field: str) -> str:
    """The text of a file of the folder.

    Raises:
        OSError: it cannot be read.
        ConfigError: others can write it, or read it where it is the key; or it is no text.
    """
    descriptor = os.open(
        file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    )  # its owner and type are checked before it is read
    with os.fdopen(descriptor, "rb") as stream:
        _check_owner(file, descriptor, field)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(field, str(file), "must be a file")
        if file.name == KEY and stat.S_IMODE(mode) & 0o077:
            raise ConfigError(field, str(file), "can be read by others; chmod 600, and better make a new one")
        data = stream.read(MAX_CHARACTERS + 1)
    if len(data) > MAX_CHARACTERS or not data.isascii():
        raise ConfigError(field, str(file), f"must be plain text of at most {MAX_CHARACTERS:,} characters")
    return data.decode("ascii")


def _check_owner(path: Path, opened: Path | int, field: str) -> None:
    """Refuse what another user could have written. `opened`: the path, or its descriptor. A missing file passes."""
    try:
        status = os.stat(opened)
    except OSError:
        return
    if status.st_uid not in (os.geteuid(), 0):
        remedy = f"belongs to user {status.st_uid}, and must be yours or root's"
        raise ConfigError(field, str(path), f"{remedy}: make a folder of your own (mkdir -m 700), and its files anew")
    if stat.S_IMODE(status.st_mode) & 0o022:
        writer = "anybody" if stat.S_IMODE(status.st_mode) & 0o002 else "its group"
        folder = path if path.is_dir() else path.parent
        remedy = f"can be written by {writer}, who could name another server, which would get your key: chmod -R go-w {folder}"
        raise ConfigError(field, str(path), f"{remedy} (nobody else may write there, not even your group)")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def lock_servers(folder: Path) -> "BaseFileLock":
    """Lock the servers of a folder for this process alone.

    Raises:
        ConfigError: another process has them, or the folder does not say where they are.
    """
    from filelock import FileLock, Timeout

    read_urls(folder)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        remedy = "another run uses these servers: each would play with the weights of the other"
        raise ConfigError("launch.servers", str(folder), remedy) from None
    return lock


def reread_urls(folder: Path, urls: list[str]) -> list[str]:
    """The addresses as they are now; `urls`, where that cannot be read."""
    try:
        return read_urls(folder)[0]
    except ConfigError:
        return urls


def private_address(interface: str | None) -> str:
    """The address at which this node listens: that of an interface, or of its name.

    Raises:
        ConfigError: there is none, or it is not private.
    """
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if interface is None:
        try:
            addresses = [socket.gethostbyname(name)]
        except OSError as error:
            raise ConfigError("interface", None, f"must be set in site.yaml: {name} has no address") from error
    else:
        import psutil

        interfaces = psutil.net_if_addrs()
        addresses = [a.address for a in interfaces.get(interface, ()) if a.family == socket.AF_INET]
        if not addresses:
            raise ConfigError("interface", interface, [key for key in interfaces if key != interface])
    address = ipaddress.ip_address(addresses[0])
    if address.is_unspecified or not address.is_private:
        remedy = f"must be one of the private network, in site.yaml: here it leads to {addresses[0]}"
        raise ConfigError("interface", interface, remedy)
    return addresses[0]


def find_free_port(host: str) -> int:
    """A port of this machine on which no program listens now."""
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


# Machines that lend their cores.


def read_lenders(folder: Path) -> tuple[list[str], bytes]:
    """Where they are (host:port), and the key that they want.

    Raises:
        ConfigError: the folder does not say.
    """
    _check_owner(folder, folder, "launch.workers_at")
    found = [_read_private(file, "launch.workers_at").strip() for file in sorted(folder.glob(f"{NODE_PREFIX}*"))]
    if not found or not (folder / KEY).is_file():
        remedy = "says of no node that lends its cores: start python -m aem_exp.jobs.lend on some, with this folder"
        raise ConfigError("launch.workers_at", str(folder), remedy)
    return found, _read_key(folder, found, "launch.workers_at").encode()


def prove_key(connection: socket.socket, key: bytes) -> bool:
    """Show the key to whoever listens, without saying it."""
    challenge = _receive_exactly(connection, NONCE_BYTES)
    connection.sendall(hmac.digest(key, challenge, "sha256"))
    return _receive_exactly(connection, len(WELCOME)) == WELCOME


def verify_key(connection: socket.socket, key: bytes) -> bool:
    """Whether whoever has connected knows the key."""
    challenge = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(challenge)
    proven = hmac.compare_digest(_receive_exactly(connection, 32), hmac.digest(key, challenge, "sha256"))
    if proven:
        connection.sendall(WELCOME)
    return proven


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := connection.recv(count - len(data))):
        data += part
    return data


# Servers of a job.


def job_folder(run_dir: Path) -> Path:
    """Where the servers of this start of a run's job are: another start has others, on other ports."""
    job, start = os.environ.get("SLURM_JOB_ID", "here"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return run_dir / "servers" / f"{job}-{start}"


def wait_for_servers(folder: Path, count: int, seconds: float) -> None:
    """Wait until so many servers of a job are up, and write their addresses to `urls`.

    Raises:
        RunError: they are not, in so many seconds, or one has ended.
    """
    end = time.monotonic() + seconds
    while len(files := sorted(folder.glob(f"{NODE_PREFIX}*"))) < count:
        if why := read_ended(folder):
            raise RunError(f"{why}; what it says is in the job's log", "node")
        if time.monotonic() > end:
            up = f"{len(files)} of the {count} servers of this job are up after {seconds:g} s (launch.server_seconds)"
            raise RunError(f"{up}; what the others say is in the job's log", "node")
        time.sleep(0.2)
    write_private(folder / URLS, "".join(file.read_text() for file in files))


def write_private(file: Path, text: str) -> None:
    """Write a file of the folder, for its owner alone whatever the umask is."""
    disk.write_atomically(file, text)
    file.chmod(0o600)


def write_ended(folder: Path, node: str, why: str) -> None:
    """Record that the server of a node of this job has ended for good."""
    (folder / f"{NODE_PREFIX}{node}").unlink(missing_ok=True)
    write_private(folder / f"{ENDED_PREFIX}{node}", f"{why}\n")


def read_ended(folder: Path) -> str:
    """Why a server of this job has ended for good; "" where none has, or that cannot be read."""
    for file in sorted(folder.glob(f"{ENDED_PREFIX}*")):
        with suppress(OSError):
            return file.read_text().strip()
    return ""


def ensure_key(folder: Path) -> str:
    """The key of a job's servers; made by the first that asks.

    Raises:
        ConfigError: others could have written it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    mine = folder / f".{KEY}.{socket.gethostname()}.{os.getpid()}"
    mine.touch(0o600)
    mine.write_text(secrets.token_urlsafe(32))
    with suppress(FileExistsError):
        os.link(mine, folder / KEY)
    mine.unlink()
    return _read_private(folder / KEY, str(folder))


def release_servers(folder: Path) -> None:
    """End the use of servers: those of the job exit, and the weights that they read are removed."""
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    if any(folder.glob(f"{NODE_PREFIX}*")):
        disk.write_atomically(folder / RELEASED, "")
