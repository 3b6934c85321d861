"""The folder in which a run finds its servers: addresses (`urls`), API key (`key`), and weights to load (`weights/`).

Only this user or root may have write permission.
"""

import ipaddress
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError, RunError

if TYPE_CHECKING:
    from filelock import BaseFileLock

URLS, KEY, WEIGHTS = "urls", "key", "weights"
MAX_CHARACTERS = 1 << 16  # of `urls`, and of `key`
NODE_PREFIX, RELEASED = "node-", "over"  # in the folder of a job: address of each server; mark that servers may exit
ENDED_PREFIX = "gone-"  # in the folder of a job: reason that the server of a node has ended; it is not restarted


def read_urls(folder: Path) -> tuple[list[str], str]:
    """Read the addresses of the servers and their API key ("" if there is none).

    Raises:
        ConfigError: the folder has no valid addresses, or another user could read the key or write a file.
    """
    _check_owner(folder, folder, "launch.servers")
    try:
        text = _read_private(folder / URLS, "launch.servers")
    except OSError as error:
        raise ConfigError(
            "launch.servers",
            str(folder),
            f"must be a folder with a file {URLS}, one address per line: {error.strerror}",
        ) from error
    urls = [line.strip().rstrip("/") for line in text.splitlines() if line.strip()]
    if not urls:
        raise ConfigError("launch.servers", str(folder / URLS), "is empty; write one address per line")
    for url in urls:
        if (why := _url_error(url)) is not None:
            raise ConfigError("launch.servers", str(folder / URLS), f"{why}; example of a line: http://10.0.0.7:41234")
    return urls, _read_key(folder, urls, "launch.servers")


def _url_error(url: str) -> str | None:
    """The error in an address, or None. The text does not repeat the address, which may contain a password."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:
        is_address = False
    if not is_address:
        return "contains a line that is not an address"
    return f"contains credentials, which belong in the file {KEY}" if parts.username or parts.password else None


def _read_key(folder: Path, urls: list[str], field: str) -> str:
    file = folder / KEY
    try:
        key = _read_private(file, field).strip()
    except FileNotFoundError:
        if all(_is_loopback(urlsplit(url).hostname or "") for url in urls):
            return ""
        raise ConfigError(
            field, str(folder), f"must contain a file {KEY}; without a key, anyone could use the servers"
        ) from None
    except OSError as error:
        raise ConfigError(field, str(file), f"cannot be read: {error.strerror}") from error
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(field, str(file), "must contain one line of printable ASCII characters")
    return key


def _read_private(file: Path, field: str) -> str:
    """Read a text file of the folder.

    Raises:
        OSError: the file cannot be read.
        ConfigError: another user can write the file, another user can read the key, or the content is not ASCII text.
    """
    descriptor = os.open(
        file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    )  # open first: owner and type are then checked on the file that is read
    with os.fdopen(descriptor, "rb") as stream:
        _check_owner(file, descriptor, field)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(field, str(file), "must be a regular file")
        if file.name == KEY and stat.S_IMODE(mode) & 0o077:
            raise ConfigError(field, str(file), "can be read by other users; create a new key, with mode 0600")
        data = stream.read(MAX_CHARACTERS + 1)
    if len(data) > MAX_CHARACTERS or not data.isascii():
        raise ConfigError(field, str(file), f"must be plain text of at most {MAX_CHARACTERS:,} characters")
    return data.decode("ascii")


def _check_owner(path: Path, opened: Path | int, field: str) -> None:
    """Check that no other user could have written a path. A missing path passes.

    Args:
        opened: the path, or its open descriptor.

    Raises:
        ConfigError: it belongs to another user, or its group or anyone has write permission.
    """
    try:
        status = os.stat(opened)
    except OSError:
        return
    if status.st_uid not in (os.geteuid(), 0):
        remedy = f"belongs to user {status.st_uid}; it must belong to you or root"
        raise ConfigError(field, str(path), f"{remedy}: create your own folder (mkdir -m 700) and its files")
    if stat.S_IMODE(status.st_mode) & 0o022:
        writer = "any user" if stat.S_IMODE(status.st_mode) & 0o002 else "its group"
        folder = path if path.is_dir() else path.parent
        remedy = f"{writer} has write permission and could redirect your requests and key to another server"
        raise ConfigError(field, str(path), f"{remedy}: chmod -R go-w {folder}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def lock_servers(folder: Path) -> "BaseFileLock":
    """Acquire the lock of the servers of a folder.

    Raises:
        ConfigError: another process holds the lock, or the folder has no valid addresses.
    """
    read_urls(folder)
    remedy = "another run uses these servers; two runs would overwrite each other's weights"
    return _acquire_lock(folder / "lock", ConfigError("launch.servers", str(folder), remedy))


def _acquire_lock(file: Path, refusal: ConfigError) -> "BaseFileLock":
    """Acquire a lock at once, or raise `refusal`."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise refusal from None
    return lock


@contextmanager
def hold_server_folder(folder: Path) -> Iterator[None]:
    """Create the folder of a server and hold it; two servers would overwrite each other's address.

    Raises:
        ConfigError: another process holds the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    remedy = "another server uses this folder; end it, or choose another --folder"
    lock = _acquire_lock(folder / "server.lock", ConfigError("--folder", str(folder), remedy))
    try:
        yield
    finally:
        lock.release()


def reread_urls(folder: Path, urls: list[str]) -> list[str]:
    """Read the addresses again; return `urls` if that fails."""
    try:
        return read_urls(folder)[0]
    except ConfigError:
        return urls


def private_address(interface: str | None) -> str:
    """The private IP address of this node, from a network interface or from its host name.

    Raises:
        ConfigError: there is no such interface or address, or the address is not private.
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
        remedy = f"must name an interface of a private network, in site.yaml; the current address is {addresses[0]}"
        raise ConfigError("interface", interface, remedy)
    return addresses[0]


def find_free_port(host: str) -> int:
    """A port of this machine that no program uses at the moment."""
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


# Servers of a job.


def job_folder(run_dir: Path) -> Path:
    """The folder of the servers of this start of the job. Each start of a job has its own servers and ports."""
    job, start = os.environ.get("SLURM_JOB_ID", "here"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return run_dir / "servers" / f"{job}-{start}"


def wait_for_servers(folder: Path, count: int, seconds: float) -> None:
    """Wait until `count` servers of a job answer, and write their addresses to `urls`.

    Raises:
        RunError: a server has ended, or they did not all answer within `seconds`.
    """
    end = time.monotonic() + seconds
    while len(files := sorted(folder.glob(f"{NODE_PREFIX}*"))) < count:
        if why := read_ended(folder):
            raise RunError(f"{why}; see the job's log", "node")
        if time.monotonic() > end:
            up = f"{len(files)} of the {count} servers of this job answer after {seconds:g} s (launch.server_seconds)"
            raise RunError(f"{up}; see the job's log", "node")
        time.sleep(0.2)
    write_private(folder / URLS, "".join(file.read_text() for file in files))


def write_private(file: Path, text: str) -> None:
    """Write a file of the folder with mode 0600, whatever the umask is."""
    disk.write_atomically(file, text)
    file.chmod(0o600)


def write_ended(folder: Path, node: str, why: str) -> None:
    """Record that the server of a node of this job has ended and will not be restarted."""
    (folder / f"{NODE_PREFIX}{node}").unlink(missing_ok=True)
    write_private(folder / f"{ENDED_PREFIX}{node}", f"{why}\n")


def read_ended(folder: Path) -> str:
    """The reason that a server of this job has ended; "" if none has ended or the record cannot be read."""
    for file in sorted(folder.glob(f"{ENDED_PREFIX}*")):
        with suppress(OSError):
            return file.read_text().strip()
    return ""


def ensure_key(folder: Path) -> str:
    """The API key of a job's servers. The first caller creates it.

    Raises:
        ConfigError: another user could have written it.
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
    """Let the servers of the job exit, and remove the weights that they load."""
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    if any(folder.glob(f"{NODE_PREFIX}*")):
        disk.write_atomically(folder / RELEASED, "")
