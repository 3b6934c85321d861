"""Large files from the net: resumed where they broke off, as long as they should be, unpacked nowhere but where they belong."""

import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from aem_exp import disk
from aem_exp.progress import bar
from aem_exp.values import ConfigError

CHUNK = 1 << 20
PATIENCE = 30.0  # seconds without a byte


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
        with bar(file.name) as tell:
            _download(url, part, size, tell)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise ConfigError(
            "data", url, f"does not come ({why}); fetch it elsewhere, as {file}, and ask again"
        ) from error
    if (got := part.stat().st_size) != size:
        part.unlink()
        raise ConfigError("data", url, f"has {got:,} bytes, and should have {size:,}: it is another file")
    part.replace(file)
    return file


def _download(url: str, part: Path, size: int, tell: Callable[[int, int], None]) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer, part.open("ab") as file:
        if have and answer.status != 206:  # a server that begins anew
            file.truncate(0)
            have = 0
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            tell(min(have, size), size)
            if have > size:
                return


def unzip(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Unpack an archive into a folder, which its members may not leave; each is checked by its CRC."""
    say(f"unpack  {archive.name}")
    try:
        with zipfile.ZipFile(archive) as packed, bar(archive.name) as tell:
            members = packed.infolist()
            for number, member in enumerate(members, start=1):
                target = os.path.realpath(folder / member.filename)
                if os.path.commonpath([target, os.path.realpath(folder)]) != os.path.realpath(folder):
                    raise ConfigError(
                        "data", str(archive), f"holds {member.filename!r}, which lies elsewhere: not unpacked"
                    )
                packed.extract(member, folder)
                tell(number, len(members))
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError("data", str(archive), f"cannot be unpacked ({error}); remove it, and ask again") from error
