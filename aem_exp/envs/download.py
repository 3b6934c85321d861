"""Downloads large files, with resume, and unpacks zip archives safely.

No library has a public function for this: `http_get` of huggingface_hub is internal, and datasets and pooch do not resume.
"""

import errno
import http.client
import os
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aem_exp.core import disk
from aem_exp.core.console import progress_bar
from aem_exp.core.errors import ConfigError

CHUNK_BYTES: Final = 1 << 20
TIMEOUT_SECONDS: Final = 30.0  # without receiving a byte


def fetch(url: str, file: Path, size: int, say: Callable[[str], None]) -> Path:
    """Download a file, unless it already exists with the right size.

    Args:
        size: the expected size in bytes.
        say: prints a line.

    Raises:
        ConfigError: the download failed, or the file has another size.
    """
    disk.check_writable(file.parent, "data")
    if file.exists() and file.stat().st_size == size:
        return file
    if shutil.disk_usage(file.parent).free < 4 * size:
        raise ConfigError(
            "data", str(file.parent), f"has too little free space for {size / 1e6:.0f} MB and its content"
        )
    say(f"fetch   {url}")
    part = file.with_name(f"{file.name}.part")
    try:
        with progress_bar(file.name) as report_progress:
            _download(url, part, size, report_progress)
        part.replace(file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = getattr(error, "reason", None) or repr(error)
        remedy = f"download failed ({reason}); run the command again, or download it elsewhere and save it as {file}"
        raise ConfigError("data", url, remedy) from error
    return file


def _download(url: str, part: Path, size: int, report_progress: Callable[[int, int], None]) -> None:
    """Continue a partial file until it is complete.

    Raises:
        OSError: the connection failed. The partial file is kept.
        ValueError: the file on the server has another size. The partial file is removed.
    """
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        done = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        done = done if response.status == 206 else 0  # a server may ignore the range and send the whole file
        remaining = int(response.headers.get("Content-Length") or size - done)
        if done + remaining != size:
            part.unlink(missing_ok=True)
            raise ValueError(f"wrong file: it has {done + remaining:,} bytes instead of {size:,}")
        with part.open("r+b" if done else "wb") as file:
            file.seek(done)
            while chunk := response.read(CHUNK_BYTES):
                done += len(chunk)
                if done > size:
                    part.unlink()
                    raise ValueError(f"wrong file: it has more than {size:,} bytes")
                file.write(chunk)
                report_progress(done, size)
    if done < size:
        raise OSError(f"the connection was lost after {done:,} of {size:,} bytes")


def unzip(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Unpack an archive and check the CRC of each member.

    Raises:
        ConfigError: the archive is damaged, or a member would be written outside the folder.
    """
    say(f"unpack  {archive.name}")
    root = os.path.realpath(folder)
    try:
        with zipfile.ZipFile(archive) as members, progress_bar(archive.name) as report_progress:
            names = members.namelist()
            for number, name in enumerate(names, start=1):
                if os.path.commonpath([os.path.realpath(folder / name), root]) != root:
                    raise ConfigError("data", str(archive), f"its member {name!r} would be written outside {folder}")
                members.extract(name, folder)
                report_progress(number, len(names))
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        remedy = f"cannot be unpacked ({error}); remove it and run the command again"
        raise ConfigError("data", str(archive), remedy) from error
