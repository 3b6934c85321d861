"""Large files from the net: resumed where they broke off, as long as they should be, unpacked nowhere but where they belong."""

import errno
import http.client
import os
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from aem_exp.core import disk
from aem_exp.core.console import progress_bar
from aem_exp.core.errors import ConfigError

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte


def fetch(url: str, file: Path, size: int, say: Callable[[str], None]) -> Path:
    """The file of a URL, of a known size in bytes; what is there already is not fetched again.

    Raises:
        ConfigError: it cannot be had, or is another file.
    """
    disk.check_writable(file.parent, "data")
    if file.exists() and file.stat().st_size == size:
        return file
    if shutil.disk_usage(file.parent).free < 4 * size:
        raise ConfigError("data", str(file.parent), f"has no room for {size / 1e6:.0f} MB and what is in them")
    say(f"fetch   {url}")
    part = file.with_name(f"{file.name}.part")
    try:
        with progress_bar(file.name) as tell:
            _download(url, part, size, tell)
        part.replace(file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        why = getattr(error, "reason", None) or repr(error)
        raise ConfigError(
            "data", url, f"does not come ({why}); fetch it elsewhere, as {file}, and ask again"
        ) from error
    return file


def _download(url: str, part: Path, size: int, tell: Callable[[int, int], None]) -> None:
    """Bring a partial file to its size.

    Raises:
        OSError: the connection breaks; what came stays.
        ValueError: it is another file, of which nothing stays.
    """
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        have = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        have = have if answer.status == 206 else 0  # a server may begin anew
        coming = int(answer.headers.get("Content-Length") or size - have)
        if have + coming != size:
            part.unlink(missing_ok=True)
            raise ValueError(f"it has {have + coming:,} bytes, and should have {size:,}: another file")
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            while chunk := answer.read(CHUNK):
                have += len(chunk)
                if have > size:
                    part.unlink()
                    raise ValueError(f"it has more than the {size:,} bytes that it should have: another file")
                file.write(chunk)
                tell(have, size)
    if have < size:
        raise OSError(f"it broke off after {have:,} of {size:,} bytes; asked again, it goes on")


def unzip(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Unpack an archive into a folder, which its members may not leave; each is checked by its CRC."""
    say(f"unpack  {archive.name}")
    try:
        with zipfile.ZipFile(archive) as packed, progress_bar(archive.name) as tell:
            members = packed.infolist()
            for number, member in enumerate(members, start=1):
                target = os.path.realpath(folder / member.filename)
                if os.path.commonpath([target, os.path.realpath(folder)]) != os.path.realpath(folder):
                    raise ConfigError(
                        "data", str(archive), f"holds {member.filename!r}, which lies elsewhere: not unpacked"
                    )
                packed.extract(member, folder)
                tell(number, len(members))
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ConfigError("data", str(archive), f"cannot be unpacked ({error}); remove it, and ask again") from error
