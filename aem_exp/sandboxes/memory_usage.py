"""Measures the memory of a command and all its descendants from /proc: resident memory, and what is not resident but
counts too (shared mappings, page tables, mapping structures, socket buffers).
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
SOCKET_OVERHEAD_BYTES: Final = 1 << 16  # bytes that a socket may hold beyond its buffer
MAPPING_OVERHEAD_BYTES: Final = 200  # bytes that the kernel notes of a mapping
SHARED_MAPPINGS: Final = ("/dev/zero (deleted)", "/anon_hugepage (deleted)", "[anon_shmem:")  # how `maps` names it


def used_bytes(pid: int, most: int) -> int:
    """Bytes of a process and all below it; 0 where it has ended.

    Args:
        most: bytes of address space up to which pages that are not resident are not looked for, since they cannot be many.
    """
    processes = [place for one in _process_tree(pid) if (place := _find_live_folder(one))]
    sizes = [_read_numbers(place / "statm")[:3] for place in processes]
    total, resident, shared = (PAGE_BYTES * sum(size[n] for size in sizes if len(size) == 3) for n in range(3))
    if total > most:
        resident += _unmapped_bytes(processes, shared, most) + sum(map(_page_table_bytes, processes))
    return resident + _socket_bytes(processes)


def _process_tree(pid: int) -> list[int]:
    """A process and all below it."""
    pids, pending = [], [pid]
    while pending:
        pids.append(one := pending.pop())
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                pending += _read_numbers(Path(f"/proc/{one}/task/{thread}/children"))
    return pids


def _find_live_folder(pid: int) -> Path | None:
    """The folder in /proc with a process's memory: that of a thread that lives, as the first may have ended; None without one."""
    first = Path(f"/proc/{pid}")
    if any(_read_numbers(first / "statm")[:1]):
        return first
    with suppress(OSError):
        for thread in os.listdir(first / "task"):
            if any(_read_numbers((place := first / "task" / thread) / "statm")[:1]):
                return place
    return None


def _unmapped_bytes(processes: Iterable[Path], resident: int, most: int) -> int:
    """Bytes of anonymous memory that processes share, each piece once, beyond what is resident; and of notes on mappings.

    Up to `most`: beyond that it does not matter how many, and to read on may take long.
    """
    shared_sizes: dict[str, int] = {}
    mappings = hidden = 0
    for place in processes:
        for line in _read_text(place / "maps").splitlines():
            mappings += 1
            if any(name in line for name in SHARED_MAPPINGS) and (words := line.split(maxsplit=5))[5].startswith(
                SHARED_MAPPINGS
            ):
                begin, end = (int(word, 16) for word in words[0].split("-"))
                shared_sizes[words[4]] = max(shared_sizes.get(words[4], 0), int(words[2], 16) + end - begin)
        hidden = max(0, sum(shared_sizes.values()) - resident) + MAPPING_OVERHEAD_BYTES * mappings
        if hidden > most:
            break
    return hidden


def _page_table_bytes(place: Path) -> int:
    """Bytes of a process's page tables."""
    fields = _read_text(place / "status").partition("VmPTE:")[2].split(maxsplit=1)
    return int(fields[0]) << 10 if fields else 0


def _socket_bytes(processes: Iterable[Path]) -> int:
    """Bytes that sockets of the sandbox's network may hold at most; TCP's, whose buffers grow, what they hold."""
    for place in processes:
        with suppress(OSError, IndexError, ValueError):
            if (place / "ns" / "net").stat().st_ino == os.stat("/proc/self/ns/net").st_ino:
                continue  # it leads inside, or there is no inside
            if not (count := int(_read_text(place / "net" / "sockstat").split()[2])):
                return 0
            return count * _socket_limit_bytes() + sum(_queued_bytes(place / "net" / name) for name in ("tcp", "tcp6"))
    return 0


def _socket_limit_bytes() -> int:
    """Bytes that one socket may hold: what was sent or came in, and beside that its options and filters."""
    sent, came, options = (
        next(iter(_read_numbers(Path("/proc/sys/net/core", name))), usual)
        for name, usual in (("wmem_default", 212_992), ("rmem_default", 212_992), ("optmem_max", 131_072))
    )
    return max(sent, came) + options + SOCKET_OVERHEAD_BYTES


def _queued_bytes(table: Path) -> int:
    """Bytes that wait in a table of sockets, to be sent or to be read."""
    rows = (line.split(maxsplit=5)[4] for line in _read_text(table).splitlines()[1:])
    return sum(int(part, 16) for row in rows for part in row.split(":"))


def _read_numbers(file: Path) -> list[int]:
    return [int(word) for word in _read_text(file).split()]


def _read_text(file: Path) -> str:
    """The text of a file; "" if its process has ended meanwhile, or may not be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
