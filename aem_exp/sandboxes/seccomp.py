"""Builds the seccomp filter (classic BPF) of bubblewrap sandboxes.

It refuses, with ENOSYS, system calls that no namespace isolates, that enlarge the kernel's attack surface, or that hold memory
outside any process. It ignores requests for larger socket buffers.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Final

ENOSYS, EAFNOSUPPORT = 38, 97
SOCKET_FAMILIES: Final = (
    1,
    2,
    10,
    16,
)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: allowed, since namespaces isolate them
AUDIT_ARCHITECTURES: Final[Mapping[str, int]] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's numbers
SOCKET_CALLS: Final[Mapping[str, Sequence[int]]] = {"x86_64": (41, 53), "aarch64": (198, 199)}  # socket, socketpair
REFUSED_CALLS: Final[Mapping[str, tuple[int, int]]] = {  # name -> numbers on x86_64 and aarch64
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "syslog": (103, 116),
    "io_uring_setup": (425, 425),  # io_uring can open sockets without the calls that this filter checks
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "landlock_create_ruleset": (444, 444),  # the number of its rules is unlimited
}
SETSOCKOPT: Final[Mapping[str, int]] = {"x86_64": 54, "aarch64": 208}
SOL_SOCKET: Final = 1
BUFFER_OPTIONS: Final = (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF, and the FORCE variants of both
X32_FIRST_CALL: Final = (
    0x40000000  # on x86_64, the same calls have second numbers from here on; no other machine has them
)
# Offsets in the kernel's `struct seccomp_data`: number, architecture, lower half of each argument (both are little-endian).
CALL_OFFSET, MACHINE_OFFSET, FIRST_ARGUMENT, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 4, 16, 24, 32
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def missing(machine: str) -> str | None:
    """Why there is no filter for this machine (a name from `platform.machine()`); None if there is one."""
    return (
        None
        if machine in AUDIT_ARCHITECTURES
        else f"there is no system call filter for {machine}; use docker or apptainer"
    )


def build_filter(machine: str) -> bytes:
    """The filter in the format of `bwrap --seccomp`."""
    column = list(AUDIT_ARCHITECTURES).index(machine)
    families = [*_return_for_any(SOCKET_FAMILIES, _ALLOW), _instruction(_RETURN, _ERROR | EAFNOSUPPORT)]
    options = [
        _instruction(_LOAD, SECOND_ARGUMENT),
        _instruction(_JUMP_IF_EQUAL, SOL_SOCKET, 1, 0),
        _instruction(_RETURN, _ALLOW),
        _instruction(_LOAD, THIRD_ARGUMENT),
        *_return_for_any(BUFFER_OPTIONS, _ERROR),  # error number 0: the call does nothing and reports success
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(
        [
            _instruction(_LOAD, MACHINE_OFFSET),
            _instruction(_JUMP_IF_EQUAL, AUDIT_ARCHITECTURES[machine], 1, 0),
            _instruction(_RETURN, _ERROR | ENOSYS),
            _instruction(_LOAD, CALL_OFFSET),
            _instruction(_JUMP_IF_AT_LEAST, X32_FIRST_CALL, 0, 1),
            _instruction(_RETURN, _ERROR | ENOSYS),
            *_return_for_any([numbers[column] for numbers in REFUSED_CALLS.values()], _ERROR | ENOSYS),
            _instruction(_JUMP_IF_EQUAL, SETSOCKOPT[machine], 0, len(options)),
            *options,
            _instruction(_JUMP_IF_EQUAL, SOCKET_CALLS[machine][0], 1, 0),
            _instruction(_JUMP_IF_EQUAL, SOCKET_CALLS[machine][1], 0, 1 + len(families)),
            _instruction(_LOAD, FIRST_ARGUMENT),
            *families,
            _instruction(_RETURN, _ALLOW),
        ]
    )


def _return_for_any(numbers: Sequence[int], verdict: int) -> list[bytes]:
    """Instructions that return the verdict if the loaded word is one of the numbers."""
    return [
        step
        for number in numbers
        for step in (_instruction(_JUMP_IF_EQUAL, number, 0, 1), _instruction(_RETURN, verdict))
    ]


def _instruction(code: int, operand: int, jump_if_true: int = 0, jump_if_false: int = 0) -> bytes:
    """The bytes of an instruction. A jump skips `jump_if_true` or `jump_if_false` of the next instructions."""
    return struct.pack("<HBBI", code, jump_if_true, jump_if_false, operand)
