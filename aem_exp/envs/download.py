"""Downloads of large files, which resume, and safe unpacking of zip archives.

No public function of a library does this for any URL: huggingface_hub's `http_get` is internal, datasets and pooch do not resume.
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
TIMEOUT_SECONDS: Final = 30.0  # seconds without a byte


def fetch(url: str, file: Path, size: int, say: Callable[[str], None]) -> Path:
    """Download a file of a known size in bytes, unless it is there already.

    Raises:
        ConfigError: the download failed, or it is another file.
    """
    disk.check_writable(file.parent, "data")
    if file.exists() and file.stat().st_size == size:
        return file
    if shutil.disk_usage(file.parent).free < 4 * size:
        raise ConfigError("data", str(file.parent), f"has no room for {size / 1e6:.0f} MB and what is in them")
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
        remedy = f"download failed ({reason}); run this again, or download it elsewhere and save it as {file}"
        raise ConfigError("data", url, remedy) from error
    return file


def _download(url: str, part: Path, size: int, report_progress: Callable[[int, int], None]) -> None:
    """Continue a partial file until it has its size.

    Raises:
        OSError: the connection failed; the partial file stays.
        ValueError: it is another file; the partial file is removed.
    """
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        done = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        done = done if response.status == 206 else 0  # the server may ignore the range
        remaining = int(response.headers.get("Content-Length") or size - done)
        if done + remaining != size:
            part.unlink(missing_ok=True)
            raise ValueError(f"it has {done + remaining:,} bytes, and should have {size:,}: another file")
        with part.open("r+b" if done else "wb") as file:
            file.seek(done)
            while chunk := response.read(CHUNK_BYTES):
                done += len(chunk)
                if done > size:
                    part.unlink()
                    raise ValueError(f"it has more than the {size:,} bytes that it should have: another file")
                file.write(chunk)
                report_progress(done, size)
    if done < size:
        raise OSError(f"the connection broke off after {done:,} of {size:,} bytes")


def unzip(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Unpack an archive. Each member is checked by its CRC, and one that would be written outside the folder is refused.

    Raises:
        ConfigError: the archive is damaged, or has such a member.
    """
    say(f"unpack  {archive.name}")
    root = os.path.realpath(folder)
    try:
        with zipfile.ZipFile(archive) as members, progress_bar(archive.name) as report_progress:
            names = members.namelist()
            for number, name in enumerate(names, start=1):
                if os.path.commonpath([os.path.realpath(folder / name), root]) != root:
                    raise ConfigError("data", str(archive), f"holds {name!r}, which lies elsewhere: not unpacked")
                members.extract(name, folder)
                report_progress(number, len(names))
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ConfigError("data", str(archive), f"cannot be unpacked ({error}); remove it, and ask again") from error
