"""Measures the memory of a command and all its descendants from /proc.

It counts resident memory, shared mappings that are not resident, page tables, mapping structures and socket buffers.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
SOCKET_OVERHEAD_BYTES: Final = 1 << 16  # largest memory of a socket in addition to its buffers
MAPPING_OVERHEAD_BYTES: Final = 200  # kernel memory for a mapping
SHARED_MAPPINGS: Final = ("/dev/zero (deleted)", "/anon_hugepage (deleted)", "[anon_shmem:")  # their names in `maps`


def used_bytes(pid: int, limit: int) -> int:
    """Bytes of a process and all its descendants; 0 if it has ended.

    Args:
        limit: if the address space has at most this many bytes, pages that are not resident are not searched for.
    """
    processes = [place for one in _process_tree(pid) if (place := _find_live_folder(one))]
    sizes = [_read_numbers(place / "statm")[:3] for place in processes]
    total, resident, shared = (PAGE_BYTES * sum(size[n] for size in sizes if len(size) == 3) for n in range(3))
    if total > limit:
        resident += _unmapped_bytes(processes, shared, limit) + sum(map(_page_table_bytes, processes))
    return resident + _socket_bytes(processes)


def _process_tree(pid: int) -> list[int]:
    """The ids of a process and all its descendants."""
    pids, pending = [], [pid]
    while pending:
        pids.append(one := pending.pop())
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                pending += _read_numbers(Path(f"/proc/{one}/task/{thread}/children"))
    return pids


def _find_live_folder(pid: int) -> Path | None:
    """The folder in /proc of a live thread of a process, because its first thread may have ended; None if there is none."""
    first = Path(f"/proc/{pid}")
    if any(_read_numbers(first / "statm")[:1]):
        return first
    with suppress(OSError):
        for thread in os.listdir(first / "task"):
            if any(_read_numbers((place := first / "task" / thread) / "statm")[:1]):
                return place
    return None


def _unmapped_bytes(processes: Iterable[Path], resident: int, limit: int) -> int:
    """Bytes of shared anonymous memory that is not resident, each mapping once, and of the kernel's mapping structures.

    Stops when the result exceeds `limit`, because reading all mappings may take long.
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
        if hidden > limit:
            break
    return hidden


def _page_table_bytes(place: Path) -> int:
    """Bytes of a process's page tables."""
    fields = _read_text(place / "status").partition("VmPTE:")[2].split(maxsplit=1)
    return int(fields[0]) << 10 if fields else 0


def _socket_bytes(processes: Iterable[Path]) -> int:
    """Upper bound of the bytes in the sockets of the sandbox's network. TCP buffers grow, so their current content is added."""
    for place in processes:
        with suppress(OSError, IndexError, ValueError):
            if (place / "ns" / "net").stat().st_ino == os.stat("/proc/self/ns/net").st_ino:
                continue  # a process in our own network: one that enters the sandbox, or there is no sandbox
            if not (count := int(_read_text(place / "net" / "sockstat").split()[2])):
                return 0
            return count * _socket_limit_bytes() + sum(_queued_bytes(place / "net" / name) for name in ("tcp", "tcp6"))
    return 0


def _socket_limit_bytes() -> int:
    """Upper bound of the bytes in one socket: its send or receive buffer, and its options and filters."""
    send, receive, options = (
        next(iter(_read_numbers(Path("/proc/sys/net/core", name))), default)
        for name, default in (("wmem_default", 212_992), ("rmem_default", 212_992), ("optmem_max", 131_072))
    )
    return max(send, receive) + options + SOCKET_OVERHEAD_BYTES


def _queued_bytes(table: Path) -> int:
    """Bytes in the send and receive queues of a table of sockets."""
    rows = (line.split(maxsplit=5)[4] for line in _read_text(table).splitlines()[1:])
    return sum(int(part, 16) for row in rows for part in row.split(":"))


def _read_numbers(file: Path) -> list[int]:
    return [int(word) for word in _read_text(file).split()]


def _read_text(file: Path) -> str:
    """The text of a file; "" if its process has ended or may not be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
