"""Sandboxes: all backends keep one contract, and commands cannot escape or exceed their limits."""

import errno
import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from support import ROOT, sandbox_images
from support.runs import DEADLINE, skip_or_fail, wait_until

from aem_exp.core.errors import MissingResource
from aem_exp.sandboxes import HOST, Image, Limits, SandboxBroken, SandboxLost, image_file_name, seccomp
from aem_exp.sandboxes.apptainer import Apptainer, build_arguments
from aem_exp.sandboxes.bwrap import Bwrap
from aem_exp.sandboxes.docker import Docker
from aem_exp.sandboxes.local import Local

pytestmark = pytest.mark.machine
ARM = platform.machine() == "aarch64"
LIMITS = Limits(processes=40, memory_mb=200, disk_mb=40, output_mb=1, cpu_seconds=20)


@cache
def bwrap_missing():
    return Bwrap().missing()


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """A backend and the name of an image that it has unpacked."""
    sandbox_images.needs_skopeo()
    folder = tmp_path_factory.mktemp("images")
    sandbox_images.tree(folder / "root")
    backend, name = Bwrap(str(folder / "unpacked")), sandbox_images.oci(folder, folder / "root")
    assert "aem_exp.prepare" in backend.lacks(name)
    lines = []
    backend.prepare([name], lines.append)
    assert len(lines) == 1 and backend.lacks(name) is None
    backend.prepare([name], lines.append)
    assert len(lines) == 1  # an unpacked image is not unpacked again
    return backend, name


@pytest.fixture(params=["bwrap", "bwrap on an image", "local", "docker", "apptainer"])
def sandbox(request):
    backends = {"bwrap": Bwrap(), "local": Local(allow_unsafe=True), "docker": Docker(), "apptainer": Apptainer()}
    if request.param == "bwrap on an image":
        backend, name = request.getfixturevalue("unpacked")
    else:
        backend, name = backends[request.param], HOST
        if reason := backend.missing():
            (skip_or_fail if request.param == "bwrap" else pytest.skip)(reason)
        if reason := backend.lacks(name):
            pytest.skip(reason)
    with backend.open(Image(name), LIMITS) as opened:
        opened.kind = request.param
        yield opened


@pytest.fixture
def contained(sandbox):
    if sandbox.kind == "local":
        pytest.skip("local has no isolation")
    return sandbox


def processes(word):
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found += [folder.name] if word.encode() in (folder / "cmdline").read_bytes().split(b"\0") else []
            except OSError:
                continue
    return found


# The contract.


def test_files_stay_for_the_next_command(sandbox):
    ran = sandbox.run("echo out; echo err >&2; echo x > file; exit 3", 10)
    assert (ran.text, ran.code, ran.stop_reason) == ("out\nerr\n", 3, "")
    assert sandbox.run("cat file; pwd", 10).text == f"x\n{sandbox.workdir}\n"
    assert sandbox.run("cat", 10, b"\0given\xff").output == b"\0given\xff"
    assert sandbox.run("cat", 10).output == b""  # stdin is empty by default
    assert sandbox.run("X=1; cd /", 10).code == 0 and sandbox.run("echo $X; pwd", 10).text == f"\n{sandbox.workdir}\n"


def test_put_and_get(sandbox):
    data = bytes(range(256)) * 100
    for name in ("a b/c'd", "-f", "new\nline", "ünï"):
        sandbox.put(f"{sandbox.workdir}/{name}", data)
        assert sandbox.get(f"{sandbox.workdir}/{name}") == data
    for name in ("nothing", "."):
        with pytest.raises(OSError, match="cannot be read"):
            sandbox.get(f"{sandbox.workdir}/{name}")
    with pytest.raises(OSError, match="irectory"):
        sandbox.put(sandbox.workdir, b"x")
    made = sandbox.run("mkfifo pipe && ln -s pipe link", 10).code == 0  # an image may have no mkfifo
    for name in ("pipe", "link") if made else ():  # writing to a pipe without a reader would block
        with pytest.raises(OSError, match=f"{name}: .* pipe"):
            sandbox.put(f"{sandbox.workdir}/{name}", b"x")
        with pytest.raises(OSError, match="cannot be read"):
            sandbox.get(f"{sandbox.workdir}/{name}")


def test_a_command_and_its_children_are_killed_at_the_timeout(sandbox):
    detach = "" if sandbox.kind == "local" else "setsid"  # with local, a process that leaves its session survives
    ran = sandbox.run(f"echo begun; {detach} sleep 7171 & sleep 7171", 4)
    assert (ran.text, ran.code, ran.stop_reason) == ("begun\n", 124, "time") and ran.seconds < 7171
    wait_until(lambda: not processes("7171"), "their end")


def test_background_processes_end_with_their_command(contained):
    assert contained.run("sleep 7272 >/dev/null 2>&1 & disown; echo done", 10).text == "done\n"
    wait_until(lambda: not processes("7272"), "its end")


def test_stdin_cannot_be_written(contained):
    assert contained.run("head -c 9000000 /dev/zero >&0 && echo written", 10, b"x").text.count("written") == 0


TRACER = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
print(libc.ptrace(0x4206, 1, 0, 0), flush=True)  # PTRACE_SEIZE of process 1
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 3)
    time.sleep(7474)
"""


def test_a_command_that_traces_process_one_is_killed_as_well():
    """bwrap's process 1 can be traced from inside, so it must not be needed to end a command."""
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        sandbox.put("/tmp/t.py", TRACER.encode())
        sandbox.run(f"{sys.base_prefix}/bin/python3 /tmp/t.py; sleep 7474 & kill -STOP 1; echo", 2)
        words = sandbox.command("true")
        assert words.index("unshare") < words.index("bwrap") and "--kill-child" in words
    wait_until(lambda: not processes("7474"), "their end")


CALLS = """
import ctypes, errno, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    got = libc.syscall(*map(ctypes.c_long, words))
    return "done" if got >= 0 else errno.errorcode[ctypes.get_errno()]
arm = os.uname().machine == "aarch64"
add, request, keyctl, perf, bpf, fault, kexec, load, log = (
    (217, 218, 219, 241, 280, 282, 104, 294, 116) if arm else (248, 249, 250, 298, 321, 323, 246, 320, 103))
memory, shared, semaphores, queue = (279, 194, 190, 186) if arm else (319, 29, 64, 68)
kind, name = ctypes.create_string_buffer(b"user"), ctypes.create_string_buffer(b"aem")
at = ctypes.addressof
print("add", call(add, at(kind), at(name), at(name), 3, -3))
print("request", call(request, at(kind), at(name), 0, -3))
print("keyctl", call(keyctl, 0, -3, 0))
print("rings", *(call(number, 0, 0) for number in (425, 426, 427)))
print("machine", *(call(number, 0, 0, 0, 0, 0) for number in (perf, bpf, fault, kexec, load)), call(log, 10, 0, 0))
print("memory", call(444, 0, 0, 1), call(memory, at(name), 0), call(447, 0),
      *(call(number, 0, 4096, 0o1600) for number in (shared, semaphores)), call(queue, 0, 0o1600))
print("other", "none" if arm else call(0x40000000 + 39))
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_VSOCK, socket.AF_ALG, 5, 21, 44):
    try:
        socket.socket(family, socket.SOCK_RAW if family == socket.AF_NETLINK else
                      socket.SOCK_SEQPACKET if family == socket.AF_ALG else socket.SOCK_STREAM)
        print("family", family, "open")
    except OSError as error:
        print("family", family, errno.errorcode[error.errno])
print("high", call(198 if arm else 41, (1 << 40) + socket.AF_VSOCK, 1, 0))
socket.socketpair()
print("pair", call(199 if arm else 53, socket.AF_VSOCK, 1, 0, at(name)))
"""


def test_dangerous_system_calls_are_refused():
    """Among them: the keyring of our session, other virtual machines (AF_VSOCK), the kernel's log, and io_uring."""
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        sandbox.put("/tmp/calls.py", CALLS.encode())
        lines = sandbox.run(f"{sys.base_prefix}/bin/python3 /tmp/calls.py", 10).text.splitlines()
        results = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines if line.startswith("family")}
        assert {results[f"family {number}"] for number in (1, 2, 10, 16)} == {"open"}
        assert {results[f"family {number}"] for number in (40, 38, 5, 21, 44)} == {"EAFNOSUPPORT"}
        assert [line for line in lines if not line.startswith("family")] == [
            *("add ENOSYS", "request ENOSYS", "keyctl ENOSYS", "rings ENOSYS ENOSYS ENOSYS"),
            *("machine ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS", "memory ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS"),
            "other " + ("none" if ARM else "ENOSYS"),
            *("high EAFNOSUPPORT", "pair EAFNOSUPPORT"),
        ]


@pytest.mark.skipif(ARM, reason="only x86 has 32-bit calls by int 0x80")
def test_system_calls_of_another_architecture_are_refused():
    """32-bit calls have other numbers: 20 is getpid, 288 is keyctl."""
    if reason := bwrap_missing():
        skip_or_fail(reason)
    code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20; int 0x80; ret
    script = (
        f"import ctypes, mmap; page = mmap.mmap(-1, 4096, prot=7); page.write({code!r});"
        " print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    if ran.returncode or int(ran.stdout) < 0:
        pytest.skip("this kernel has no 32-bit calls")
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        sandbox.put("/tmp/call.py", script.encode())
        assert sandbox.run(f"{sys.base_prefix}/bin/python3 /tmp/call.py", 10).text == "-38\n"  # ENOSYS


def test_the_filter_applies_to_all_processes_and_its_descriptor_is_closed():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        assert sandbox.run("echo /proc/self/fd/*; grep Seccomp: /proc/self/status /proc/1/status", 10).text.split() == [
            *(
                "/proc/self/fd/0",
                "/proc/self/fd/1",
                "/proc/self/fd/2",
                "/proc/self/fd/3",
            ),  # 3: the shell lists the folder
            *("/proc/self/status:Seccomp:", "2", "/proc/1/status:Seccomp:", "2"),
        ]
        work = "git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m x && git log --oneline"
        python = f"{sys.base_prefix}/bin/python3"
        threads = "from concurrent.futures import *; print(sum(ThreadPoolExecutor(4).map(int, range(9))))"
        assert sandbox.run(f"{work} | wc -l; {python} -c '{threads}'; (sleep 0 & wait) | cat", 10).text == "1\n36\n"


BUFFERS = """
import socket
a, b = socket.socketpair()
for one in (socket.SO_SNDBUF, socket.SO_RCVBUF):
    before = a.getsockopt(socket.SOL_SOCKET, one)
    a.setsockopt(socket.SOL_SOCKET, one, 1 << 24)
    print(a.getsockopt(socket.SOL_SOCKET, one) == before)
with socket.create_server(("127.0.0.1", 0)) as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    print(server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
    client = socket.create_connection(server.getsockname())
    client.setsockopt(socket.IPPROTO_TCP, 7, 7)  # an option of another level with the same number
    print(client.getsockopt(socket.IPPROTO_TCP, 7))
"""


def test_requests_for_larger_socket_buffers_are_ignored():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        sandbox.put("/tmp/buffers.py", BUFFERS.encode())
        assert sandbox.run(f"{sys.base_prefix}/bin/python3 /tmp/buffers.py", 60).text == "True\nTrue\n1\n7\n"


WORK = """
import asyncio, multiprocessing, socket, subprocess, sys, tempfile, threading

async def served():
    server = await asyncio.start_server(lambda reader, writer: writer.write(b"x" * 100000) or writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    return len(await reader.read())

if __name__ == "__main__":
    print(asyncio.run(served()), multiprocessing.Pool(2).map(abs, [-1, -2]), multiprocessing.Array("i", 3)[:])
    print(len(subprocess.run(["cat"], input=b"x" * 300000, stdout=subprocess.PIPE).stdout))
"""


def test_ordinary_programs_work(tmp_path):
    """Programs that the tests of a repository need: Python, pytest, git, and a compiler and node if this machine has them."""
    if reason := bwrap_missing():
        skip_or_fail(reason)
    python, site = f"{sys.base_prefix}/bin/python3", Path(pytest.__file__).parents[1]
    image = Image(HOST, (sys.base_prefix, str(site)), env={"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"})
    with Bwrap().open(image, Limits(processes=200, memory_mb=2000, disk_mb=100)) as sandbox:
        sandbox.put("/tmp/work.py", WORK.encode())
        ran = sandbox.run(f"{python} /tmp/work.py", 120)
        assert ran.text == "100000 [1, 2] [0, 0, 0]\n300000\n"
        sandbox.put(
            "test_x.py", b"def test_x(tmp_path, capfd):\n    print(tmp_path)\n    assert capfd.readouterr().out\n"
        )
        assert "1 passed" in sandbox.run(f"{python} -P -m pytest -q -p no:cacheprovider test_x.py", 120).text
        git = "git init -q . && git add . && git -c user.name=a -c user.email=b commit -qm x && git gc -q && git log --oneline"
        assert sandbox.run(f"{git} | wc -l", 60).text == "1\n"
        if Path("/usr/bin/gcc").exists():
            sandbox.put("x.c", b'#include <stdio.h>\nint main(void) { puts("compiled"); return 0; }\n')
            assert sandbox.run("gcc -O2 -g x.c -o x && ./x", 120).text == "compiled\n"
        if Path("/usr/bin/node").exists():
            script = "const w = require('worker_threads'); new w.Worker('console.log(6 * 7)', {eval: true})"
            assert sandbox.run(f'node -e "{script}"', 120).text == "42\n"


def run_filter(rules, number, machine, first=0, second=0, third=0):
    """Interpret the filter for a system call: None if the call is allowed, else its error number."""
    data, position, word = struct.pack("<iIQQQQ", number, machine, 0, first, second, third), 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("<HBBI", rules, 8 * position)
        if code == 0x06:
            assert operand >> 16 in (0x7FFF, 5)
            return operand & 0xFFFF if operand >> 16 == 5 else None
        if code == 0x20:
            (word,) = struct.unpack_from("<I", data, operand)
        else:
            position += if_true if (word == operand if code == 0x15 else word >= operand) else if_false
        position += 1


@pytest.mark.parametrize(("machine", "name", "socket"), [("x86_64", 0xC000003E, 41), ("aarch64", 0xC00000B7, 198)])
def test_the_filter_of_each_machine(machine, name, socket):
    rules, column = seccomp.build_filter(machine), ("x86_64", "aarch64").index(machine)
    refused = {numbers[column] for numbers in seccomp.REFUSED_CALLS.values()}
    for number in range(600):
        if number not in seccomp.SOCKET_CALLS[machine]:
            assert run_filter(rules, number, name) == (38 if number in refused else None)
        assert run_filter(rules, number, 0x40000003) == run_filter(rules, number + (1 << 30), name) == 38
    for family in range(64):
        assert run_filter(rules, socket, name, family) == (None if family in (1, 2, 10, 16) else 97)
    for option in range(70):
        buffer = option in (7, 8, 32, 33)  # error number 0: the call does nothing and reports success
        assert run_filter(rules, seccomp.SETSOCKOPT[machine], name, 3, 1, option) == (0 if buffer else None)
        assert run_filter(rules, seccomp.SETSOCKOPT[machine], name, 1, 6, option) is None
    assert run_filter(rules, -1, name) == 38


def test_a_machine_without_a_filter_is_reported(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "riscv64" in Bwrap().missing() and "docker" in Bwrap().missing()


def test_endless_output_is_stopped_at_the_limit(sandbox):
    ran = sandbox.run("yes", 20)
    assert (ran.stop_reason, ran.code, len(ran.output)) == ("output", 124, LIMITS.output_mb << 20)


def test_a_closed_sandbox_is_lost_and_may_be_closed_again(sandbox):
    sandbox.close()
    sandbox.close()
    with pytest.raises(SandboxLost):
        sandbox.run("true", 5)


def test_closing_from_another_thread_ends_a_running_command(sandbox):
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(sandbox.run, "echo begun; sleep 7575 & exec sleep 7575 >&- 2>&-", 60)
        wait_until(lambda: len(processes("7575")) > 1, "a command")
        sandbox.close()
        with pytest.raises(SandboxLost, match="gone"):
            running.result(timeout=DEADLINE)
    wait_until(lambda: not processes("7575"), "their end")


@pytest.mark.parametrize("program", ["unshare", "nsenter", "bwrap"])
def test_a_command_that_cannot_start_means_that_the_sandbox_is_lost(program, tmp_path):
    if reason := bwrap_missing():
        skip_or_fail(reason)
    (tmp_path / program).write_text(f"#!/bin/sh\necho {program}: Resource temporarily unavailable >&2\nexit 1\n")
    (tmp_path / program).chmod(0o755)
    with Bwrap().open(Image(), LIMITS) as sandbox:
        sandbox.run("true", 5)
        sandbox.outer_env = {"PATH": f"{tmp_path}:{sandbox.outer_env['PATH']}"}
        open_to_all(tmp_path)
        with pytest.raises(SandboxLost, match=f"{program}: Resource"):
            sandbox.run("true", 5)


def open_to_all(folder):
    """Let all users enter a folder: root changes to another user id to run commands."""
    for parent in (folder, *folder.parents[:3]):
        if parent != Path("/") and parent.owner() == folder.owner():
            parent.chmod(parent.stat().st_mode | 0o011)


def test_a_machine_at_its_process_limit_is_lost_and_a_short_shortage_is_retried(monkeypatch):
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(), LIMITS) as sandbox:
        monkeypatch.setattr("aem_exp.sandboxes.bwrap.SPARE_PROCESSES", -LIMITS.processes)
        with pytest.raises(SandboxLost, match="Resource temporarily"):
            sandbox.run("true", 5)
        threading.Timer(0.2, monkeypatch.undo).start()
        assert sandbox.run("echo again", 5).text == "again\n"  # the shortage lasts only a moment
    with (
        Bwrap().open(Image(hidden_paths=("/usr/nowhere",)), LIMITS) as sandbox,
        pytest.raises(SandboxLost, match="nowhere"),
    ):
        sandbox.run("true", 5)


@pytest.mark.parametrize("backend", [Bwrap(), Docker(), Local(allow_unsafe=True)])
def test_a_machine_that_cannot_start_processes_is_lost(backend, monkeypatch):
    def fail(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", fail)
    with pytest.raises(SandboxLost, match="Resource temporarily"), backend.open(Image(), LIMITS) as sandbox:
        sandbox.run("true", 5)


def test_a_too_long_script_fails_like_in_a_shell(sandbox):
    ran = sandbox.run(": " + "x" * (1 << 18), 5)
    assert (ran.text, ran.code) == ("Argument list too long\n", 126)


def test_a_sandbox_ruined_by_a_command_is_broken_and_not_lost(unpacked):
    backend, name = unpacked
    for ruin in ("cd /; rm -rf testbed", "cd /; rm -rf testbed; touch testbed", "rm -rf /bin/*"):
        with backend.open(Image(name), LIMITS) as sandbox:
            sandbox.run(ruin, 10)
            with pytest.raises(SandboxBroken):
                sandbox.run("true", 10)
    with backend.open(Image(name), LIMITS) as sandbox:
        sandbox.workdir = "/nowhere"
        with pytest.raises(SandboxLost, match="nowhere"):  # no command has run in this one yet
            sandbox.run("true", 10)


def test_a_locked_working_directory_on_the_host_system_means_broken():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(), LIMITS) as sandbox:
        sandbox.run("chmod 000 .", 10)
        with pytest.raises(SandboxBroken, match="chdir to /testbed: Permission denied"):
            sandbox.run("true", 10)


ENDER = """
import ctypes
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long] * 4
libc.ptrace(0x4206, 1, 0, 0x100000)  # PTRACE_SEIZE of process 1, PTRACE_O_EXITKILL
"""


@pytest.mark.parametrize(
    "script",
    [
        "kill -9 $$",
        "kill -9 -1; kill -9 $$",
        "exit 1",
        "for f in /proc/*/fd/*; do [ $f -ef /dev/null ] || echo '{ }' > $f; done 2>/dev/null; false",
        "{python} /tmp/ender.py; kill -9 $$",
    ],
)
def test_no_command_can_pretend_that_it_never_started(script):
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        sandbox.put("/tmp/ender.py", ENDER.encode())
        assert sandbox.run(script.replace("{python}", f"{sys.base_prefix}/bin/python3"), 10).code


@pytest.mark.parametrize("script", ["sleep 7676", "while :; do echo -n x; sleep 0.05; done"])
def test_a_hung_mount_is_lost(script, tmp_path, monkeypatch):
    if reason := bwrap_missing():
        skip_or_fail(reason)
    (tmp_path / "mount").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "mount").chmod(0o755)
    open_to_all(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("aem_exp.sandboxes.bwrap.START_SECONDS", 4)
    with pytest.raises(SandboxLost, match=r"mounted: .*4 s"):
        Bwrap().open(Image(), LIMITS).start()
    wait_until(lambda: not processes("7676"), "its end")


# Isolation.


def test_commands_cannot_write_outside(contained, tmp_path):
    marker = f"escaped-{os.getpid()}"
    contained.run(
        f"for d in / /usr /usr/bin /etc /root /home /tmp /var/tmp /dev /dev/shm /proc /sys {tmp_path};"
        f" do echo x > $d/{marker}; done;"
        f" mkdir -p {tmp_path}; echo x > {tmp_path}/{marker}; rm -rf /usr/bin/id /etc/passwd 2>/dev/null",
        10,
    )
    for folder in ("/", "/usr", "/usr/bin", "/etc", "/root", "/home", "/tmp", "/var/tmp", "/dev", "/dev/shm", tmp_path):
        assert not Path(folder, marker).exists(), folder
    assert Path("/usr/bin/id").exists() and Path("/etc/passwd").exists()
    with type(contained)(contained._image, LIMITS, getattr(contained, "_folder", None)) as fresh:
        # the next sandbox does not have the files either
        assert fresh.run(f"ls -d /tmp/{marker} /dev/shm/{marker} /{marker}", 10).code != 0
        assert fresh.run("id -u && cat /etc/passwd", 10).text.startswith("0\nroot:")


def test_commands_cannot_read_files_variables_or_processes_of_the_machine(contained, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("gold")
    monkeypatch.setenv("MY_TOKEN", "hush")
    seen = contained.run(
        f"cat {secret} /root/.bashrc /etc/shadow /etc/hostname; ls -A /home /run /root /mnt /srv 2>/dev/null; env;"
        " cat /proc/*/environ; set -- /proc/[0-9]*; echo; echo $#; cat /proc/sys/kernel/hostname",
        10,
    ).text
    assert "gold" not in seen and "hush" not in seen and "PYTEST" not in seen
    assert seen.split()[-1] == "sandbox" and int(seen.split()[-2]) < 9  # only its own processes


def test_links_do_not_lead_outside(contained, tmp_path):
    """A command may replace any of its folders by a link. `put` and `get` follow the link inside the sandbox."""
    target = tmp_path / "target"
    target.write_text("mine")
    tmp_path.chmod(0o777)
    target.chmod(0o666)
    contained.run(f"ln -s {target} link; ln -s {tmp_path} folder; ln -s / all; rm -rf /tmp; ln -s {tmp_path} /tmp", 10)
    for path in ("link", "folder/target", f"all{target}", "/tmp/target"):
        try:
            contained.put(f"{contained.workdir}/{path}" if path[0] != "/" else path, b"theirs")
        except OSError:
            continue
    assert target.read_text() == "mine"
    assert contained.run("echo fine", 10).text == "fine\n"


def test_there_is_no_network(contained):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        ran = contained.run(
            f"(echo x > /dev/tcp/127.0.0.1/{port}) && echo out; (echo x > /dev/tcp/1.1.1.1/53) && echo out", 10
        )
        assert "out" not in ran.text.split() and ran.code
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_fork_bomb_does_not_affect_the_next_command(contained):
    ran = contained.run(":(){ :|:& };: ; sleep 0.5; for i in $(seq 100); do sleep 1 & done; wait; echo end", 5)
    assert "end" in ran.text or ran.stop_reason or "fork" in ran.text
    assert contained.run("echo fine", 10).text == "fine\n"


def test_a_command_that_uses_too_much_memory_is_stopped(contained):
    ran = contained.run(
        "x=$(head -c 1000000000 /dev/zero | tr '\\0' x 2>/dev/null || yes | head -c 1000000000); echo ${#x}", 20
    )
    assert ran.stop_reason == "memory" or ran.code or "1000000000" not in ran.text
    assert contained.run("echo fine", 10).text == "fine\n"


THREAD = """
import ctypes, os, threading, time
def hold():
    held = bytearray(b"x") * (120 << 20)
    time.sleep(100)
for _ in range(3):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        ctypes.CDLL(None).pthread_exit(None)  # ends only the first thread
time.sleep(100)
"""
UNMAPPED = """
import mmap
shared = mmap.mmap(-1, 500 << 20)
for start in range(0, 500 << 20, 1 << 20):
    shared[start : start + (1 << 20)] = bytes(1 << 20)
    shared.madvise(mmap.MADV_DONTNEED, start, 1 << 20)  # the pages are not mapped any more, but still in memory
"""
TABLES = """
import mmap
held = [mmap.mmap(-1, 1 << 36, flags=mmap.MAP_PRIVATE | 0x4020, prot=mmap.PROT_READ) for _ in range(20)]
for one in held:
    for start in range(0, 1 << 36, 1 << 21):
        one[start]  # maps the shared page of zeros; its page table needs 4 KB
"""
AREAS = """
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for number in range(60_000):
    libc.mmap(None, 4096, number % 2, 0x4022, -1, 0)
for _ in range(15):
    if os.fork() == 0:
        break
time.sleep(100)
"""
SOCKETS = """
import socket
held, ends = [], []
while True:
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].bind(f"\\0{len(held)}")
    held[-1].listen(4096)
    try:
        while True:  # connections that are never accepted keep the sent data, even if the other end is closed
            with socket.socket(socket.AF_UNIX) as one:
                one.setblocking(False)
                one.connect(held[-1].getsockname())
                one.send(bytes(1 << 17))
    except BlockingIOError:
        pass
"""
TCP = """
import socket
held = []
with socket.create_server(("127.0.0.1", 0)) as server:
    while True:
        for one in (socket.create_connection(server.getsockname()), server.accept()[0]):
            held.append(one)
            one.settimeout(0.05)
            try:
                while True:
                    one.send(bytes(1 << 18))
            except TimeoutError:
                pass
"""


@pytest.mark.parametrize(
    "code", [THREAD, UNMAPPED, TABLES, AREAS, SOCKETS, TCP], ids=["thread", "shared", "tables", "areas", "unix", "tcp"]
)
def test_memory_outside_the_main_thread_or_any_process_is_measured(code):
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        sandbox.put("/tmp/take.py", code.encode())
        assert sandbox.run(f"{sys.base_prefix}/bin/python3 /tmp/take.py", 300).stop_reason == "memory"
        assert sandbox.run("echo fine", 10).text == "fine\n"


def test_inotify_instances_are_limited():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    code = "import ctypes; c = ctypes.CDLL(None); print(sum(c.inotify_init1(0) >= 0 for _ in range(99)))"
    with Bwrap().open(Image(HOST, (sys.base_prefix,)), LIMITS) as sandbox:
        got = int(sandbox.run(f'{sys.base_prefix}/bin/python3 -c "{code}"', 60).text)
        if got == 99:
            pytest.skip("this machine does not allow limits for a namespace")
        assert got == 8


def test_a_full_disk_affects_only_its_own_sandbox(contained):
    for path in ("big", "/tmp/big", "/dev/shm/big"):
        ran = contained.run(f"dd if=/dev/zero of={path} bs=1M count=200; rm -f {path}", 20)
        assert "No space" in ran.text or "File size limit" in ran.text or ran.code, path
    with pytest.raises(OSError):
        contained.put("/testbed/more", bytes(60 << 20))
    assert contained.run("rm -f more; echo fine > f && cat f", 10).text == "fine\n"


def test_a_sandbox_ends_when_its_parent_is_killed():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    code = (
        "from aem_exp.sandboxes import *; from aem_exp.sandboxes.bwrap import Bwrap;"
        " s = Bwrap().open(Image(), Limits()); s.start(); print(s._holder.pid, flush=True); s.run('sleep 7373', 60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        holder = Path("/proc", process.stdout.readline().strip())
        wait_until(lambda: processes("7373"), "a command")
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not holder.exists() and not processes("7373"), "their end")


def test_a_sandbox_whose_holder_was_killed_is_lost():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(), LIMITS) as sandbox:
        sandbox._holder.kill()
        sandbox._holder.wait()
        with pytest.raises(SandboxLost, match="gone"):
            sandbox.run("true", 5)


def test_sixty_four_sandboxes_run_at_the_same_time():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with ExitStack() as stack, ThreadPoolExecutor(16) as threads:
        opened = list(threads.map(lambda _: stack.enter_context(Bwrap().open(Image(), LIMITS)), range(64)))
        texts = threads.map(lambda n: opened[n].run(f"echo {n} > n; cat n", 60).text, range(64))
        assert list(texts) == [f"{n}\n" for n in range(64)]


def test_sandboxes_work_for_an_ordinary_user():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    if os.geteuid():
        pytest.skip("all tests run as an ordinary user")
    code = (
        "from aem_exp.sandboxes import *; from aem_exp.sandboxes.bwrap import Bwrap\n"
        "with Bwrap().open(Image(), Limits(processes=20, memory_mb=200, disk_mb=20)) as s:\n"
        "    print(s.run('echo x > f; cat f; echo x > /usr/x; dd if=/dev/zero of=g bs=1M count=50 2>&1 | grep -c space', 9).text)"
        "\n"
        "    print(s.run('for i in $(seq 60); do sleep 2 & done', 10).text.count('fork'))\n"
    )
    root = ROOT
    as_user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{root}:{os.pathsep.join(sys.path)}", "HOME": "/nowhere"}
    if subprocess.run(
        [*as_user, sys.executable, "-c", "import aem_exp"], env=env, capture_output=True, check=False
    ).returncode:
        pytest.skip("other users cannot read this Python or this checkout")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        ran = subprocess.run(
            [*as_user, sys.executable, "-c", code],
            env={**env, "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    first, *_, last = ran.stdout.split()
    assert first == "x" and "1" in ran.stdout.split() and int(last) > 0, ran.stdout + ran.stderr


# Missing programs and images, and command lines of backends that cannot run here.


def test_local_refuses_without_allow_unsafe():
    assert "allow_unsafe=true" in Local().missing()
    assert Local(allow_unsafe=True).missing() is None
    assert "debian:12" in Local(allow_unsafe=True).lacks("debian:12")


@pytest.mark.parametrize(
    "config", [{}, {"config": None}, {"config": {"Env": ["A=1=2", "BARE", "", "=x", "B=", "A=3"]}}]
)
def test_invalid_variables_of_an_image_are_ignored(config, tmp_path):
    folder = tmp_path / image_file_name("some/image:1")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    sandbox = Bwrap(str(tmp_path)).open(Image("some/image:1", env={"C": "4"}), LIMITS)
    assert sandbox._image.env == {"C": "4"} | ({"A": "3", "B": ""} if config.get("config") else {})


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b:c", "a b'$(c)"])
def test_the_temporary_folder_may_have_any_name(name, unpacked, monkeypatch):
    backend, image = unpacked
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        place = Path(folder, name)
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        for one in (Image(image), Image()):
            with (backend if one.name else Bwrap()).open(one, LIMITS) as sandbox:
                assert sandbox.run("echo x > f && cat f", 10).text == "x\n"


def test_missing_programs_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("aem_exp.sandboxes.bwrap.PATH", "/nowhere")
    assert Bwrap().missing().startswith("bwrap, unshare, ")
    assert Docker().missing().startswith("docker ")
    assert Apptainer().missing().startswith("apptainer ")


def test_an_image_that_does_not_exist_is_named(tmp_path):
    if not shutil.which("skopeo"):
        skip_or_fail("skopeo not found: apt install skopeo umoci")
    with pytest.raises(MissingResource, match=r"skopeo .*exit code 1") as caught:
        Bwrap(str(tmp_path)).prepare([f"oci:{tmp_path}/none:t"], lambda line: None)
    assert (caught.value.field, caught.value.value) == ("image", f"oci:{tmp_path}/none:t")
    assert not list(tmp_path.glob("*.part"))


def test_images_have_different_file_names():
    names = ["a/b:1", "a_b:1", "a/b_1", "x" * 300]
    assert len({image_file_name(name) for name in names}) == 4
    assert all(len(image_file_name(name)) < 120 and "/" not in image_file_name(name) for name in names)


def test_command_lines_of_docker():
    container = Docker().open(Image("some/image:1", env={"A": "b c"}), LIMITS)
    name = container.name
    assert container.create_command() == [
        *("docker", "run", "--rm", "--interactive", "--name", name, "--network", "none"),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "40"),
        *("--memory", "200m", "--memory-swap", "200m"),
        *("--ulimit", "cpu=20", "--ulimit", f"fsize={40 << 20}", "--ulimit", "core=0"),
        *("--env", "A=b c", "--pull", "never", "--entrypoint", "bash", "some/image:1", "-c", "echo ready; read -r _"),
    ]
    container._seconds = 5.0
    script = 'timeout -s KILL "$1" bash -c "$2"; code=$?; kill -9 -1; exit $code'
    assert container.command("echo $x") == [
        *(
            "docker",
            "exec",
            "--interactive",
            "--workdir",
            "/testbed",
            name,
            "bash",
            "-c",
            script,
            "bash",
            "5",
            "echo $x",
        ),
    ]


def test_command_lines_of_apptainer(tmp_path):
    assert build_arguments("some/image:1", tmp_path / "x") == [
        "build",
        "--force",
        f"{tmp_path}/x",
        "docker://some/image:1",
    ]
    backend = Apptainer(images=str(tmp_path), scratch=str(tmp_path))
    sandbox = backend.open(Image("some/image:1", env={"A": "b c"}), LIMITS)
    with sandbox:
        assert sandbox.command("echo $x") == [
            *("prlimit", "--cpu=20", f"--data={200 << 20}", f"--fsize={40 << 20}", "--core=0"),
            *("apptainer", "--silent", "exec", "--containall", "--cleanenv", "--no-home", "--fakeroot"),
            *("--net", "--network", "none", "--overlay", str(sandbox.layer), "--pwd", "/testbed", "--env", "A=b c"),
            *(f"{tmp_path}/{image_file_name('some/image:1')}.sif", "bash", "-c", "ulimit -u 40; echo $x"),
        ]
        layer = sandbox.layer
    assert not layer.exists() and "aem_exp.prepare" in backend.lacks("some/image:1")


def test_twenty_commands_run_one_after_another():
    if reason := bwrap_missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(), LIMITS) as sandbox:
        for _ in range(20):
            assert sandbox.run("true", 60).code == 0
