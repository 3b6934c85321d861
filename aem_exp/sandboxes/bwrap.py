"""Sandboxes with bubblewrap: an unpacked image or the machine's own system, read-only, with a writable layer in memory.

It works as root, which first changes to an unused user id, and as a user if the kernel allows user namespaces. A holder process
of a few kilobytes keeps the mounts of a sandbox. If its parent process ends for any reason, the whole sandbox ends, too.

Memory is measured ten times a second, so a command may exceed `memory_mb` for a moment (by 0.3 GB, measured on two cores). In
addition to `memory_mb` and `disk_mb`, a command can make the kernel use memory that is not measured:

- 0.2 GB in attributes of files, or in empty files, for each sandbox (measured on a machine with 24 GB, Linux 6.18);
- 0.06 GB in pipes, for all sandboxes of a user (measured on the same machine);
- 1.1 GB in watches of epoll, for all sandboxes of a user (computed from `fs.epoll.max_user_watches`: 5 % of the memory);
- 0.3 GB in pseudo-terminals, for all sandboxes of a user (computed from `kernel.pty.max`).

For a hard limit, run inside a memory cgroup: that of a job, of a container, or of
`systemd-run --user --scope -p MemoryMax=64G COMMAND`.
"""

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from aem_exp.core import disk
from aem_exp.core.errors import MissingResource
from aem_exp.sandboxes import (
    HOST,
    PATH,
    CommandResult,
    Image,
    Limits,
    Sandbox,
    SandboxBroken,
    SandboxLost,
    image_file_name,
    seccomp,
)
from aem_exp.sandboxes.process import ARGUMENTS_TOO_LONG, create_sealed_file, start_holder, stop_holder

NOBODY_UID: Final = 61999  # root changes to this user id; no system that we know of uses it
PROGRAMS: Final = ("bwrap", "unshare", "nsenter", "prlimit", "setpriv", "mount", "sh")
NAMESPACES_REMEDY: Final = (
    "if users may not create namespaces: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
)
PROBE_SECONDS: Final = 20.0  # for `true` to run in a fresh sandbox
SETTLE_SECONDS: Final = 0.5  # for processes of the last command to end
START_SECONDS: Final = 60.0  # for a sandbox to be mounted
MAX_OPEN_FILES: Final = 512  # open files of a process; their buffers are not measured as memory of a process
# Set for each sandbox if the machine allows it: a user has 128 instances and groups in total, and watches use kernel memory.
WATCH_LIMITS: Final = "inotify_instances=8 inotify_watches=8192 fanotify_groups=8 fanotify_marks=8192"
SPARE_PROCESSES: Final = (
    64  # in addition to the limit, for programs that enter a sandbox and for a command that is ending
)
_TRANSPORT: Final = re.compile(r"[a-z-]+:/")  # a transport of skopeo: oci:/folder:tag, docker-archive:/file
SYSTEM_FOLDERS: Final = (
    "bin",
    "sbin",
    "lib",
    "lib32",
    "lib64",
    "libx32",
)  # in addition to /usr; may be links into /usr
ETC_FILES: Final = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime")
HOME: Final = "/home/agent"
# On the machine's own system, only these and the working directory are writable.
WRITABLE_FOLDERS: Final = (HOME, "/tmp", "/var/tmp")

# There are two scripts because root gives up its rights between them. "$@" are the visible paths; path number i is bound to the
# mount point i. The folders of the overlay are relative paths: `:` or `,` in an absolute path would separate options.
OUTER_SCRIPT: Final = """set -e
at=$1 drop=$2 inner=$3 disk=$4 layers=$5 watches=$6; shift 6
mount -t tmpfs -o size=1m,mode=755 none "$at"
cd "$at"
mkdir rw none etc
echo root:x:0:0:root:/home/agent:/bin/bash > etc/passwd
echo root:x:0: > etc/group
echo 127.0.0.1 localhost sandbox > etc/hosts
echo hosts: files > etc/nsswitch.conf
i=0
for shown in "$@"; do
  if [ -d "$shown" ]; then mkdir "$i"; else : > "$i"; fi
  mount --bind "$shown" "$i"
  i=$((i+1))
done
exec $drop sh -c "$inner" sh "$at" "$disk" "$layers" "$watches"
"""
INNER_SCRIPT: Final = """set -e
at=$1 disk=$2 layers=$3 watches=$4
for limit in $watches; do (echo "${limit#*=}" > "/proc/sys/user/max_${limit%=*}") 2>/dev/null || true; done
mount -t tmpfs -o size="$disk"m,nr_inodes=200k,mode=755 none "$at/rw"
cd "$at/rw"
mkdir -p upper work root shm folder/0 folder/1 folder/2 folder/3
chmod 1777 shm folder/1 folder/2
cd "$at"
if [ "$layers" = image ]; then
  mount -t overlay overlay -o lowerdir=0,upperdir=rw/upper,workdir=rw/work,userxattr rw/root
fi
echo ready
exec cat
"""


@dataclass(frozen=True)
class Bwrap:
    """Sandboxes with bubblewrap.

    Args:
        images: folder of unpacked images; by default in the cache. Each image has its full size and many small files.
    """

    images: str | None = None

    def missing(self) -> str | None:
        if missing := [name for name in PROGRAMS if not shutil.which(name, path=_search_path())]:
            return (
                f"{', '.join(missing)} not found: apt install bubblewrap util-linux git (or your system's equivalent)"
            )
        if reason := seccomp.missing(platform.machine()):
            return reason
        try:
            with self.open(Image(), Limits()) as sandbox:
                result = sandbox.run("true", PROBE_SECONDS)
        except SandboxLost as error:
            return f"{error}; {NAMESPACES_REMEDY}"
        return f"{result.text.strip()}; {NAMESPACES_REMEDY}" if result.code else None

    def lacks(self, image: str) -> str | None:
        if image == HOST or (self._folder(image) / "config.json").is_file():
            return None
        return f"image {image} is not unpacked in {self._images_folder()}; run aem_exp.prepare"

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Download and unpack missing images with skopeo and umoci.

        Layers are downloaded once, checked by their digest, and kept in `oci` in the images folder. An interrupted call therefore
        resumes; an image that was only partly unpacked is unpacked again.
        """
        self._images_folder().mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images, 1):
            if self.lacks(image) is None:
                continue
            if missing := [name for name in ("skopeo", "umoci") if not shutil.which(name)]:
                raise MissingResource(
                    "env.make.sandbox", self._images_folder(), f"needs {' and '.join(missing)} to unpack images"
                )
            say(f"unpack  {image} ({number} of {len(images)})")
            _unpack(image, self._images_folder(), self._folder(image))

    def open(self, image: Image, limits: Limits) -> Sandbox:
        if image.name == HOST:
            return _BwrapSandbox(image, limits, None)
        folder = self._folder(image.name)
        variables = (json.loads((folder / "config.json").read_text()).get("config") or {}).get("Env") or ()
        # As in Docker, an entry without `=` is ignored. An entry without a name cannot be set.
        env = dict(word.split("=", 1) for word in variables if "=" in word[1:])
        return _BwrapSandbox(replace(image, env=env | dict(image.env)), limits, folder / "rootfs")

    def _images_folder(self) -> Path:
        return Path(self.images).expanduser() if self.images else disk.cache_dir() / "images"

    def _folder(self, image: str) -> Path:
        return self._images_folder() / image_file_name(image)


def _unpack(image: str, home: Path, folder: Path) -> None:
    """Unpack an image into a folder. It belongs to the user that runs the sandboxes."""
    tag = f"{home / 'oci'}:{image_file_name(image)}"
    source = image if _TRANSPORT.match(image) else f"docker://{image}"
    _run_program(image, "skopeo", "copy", source, f"oci:{tag}")
    partial = folder.with_suffix(f".{os.getpid()}.part")
    try:
        partial.mkdir()
        _run_program(image, "umoci", "raw", "unpack", "--rootless", "--image", tag, str(partial / "rootfs"))
        with (partial / "config.json").open("wb") as config:
            _run_program(image, "skopeo", "inspect", "--config", f"oci:{tag}", out=config)
        if os.geteuid() == 0:
            _run_program(
                image, "chown", "-R", "--no-dereference", f"{NOBODY_UID}:{NOBODY_UID}", str(partial / "rootfs")
            )
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_program(image: str, *words: str, out: Any = None) -> None:
    """Run a program that shows its own progress. Raises MissingResource if it fails."""
    if code := subprocess.run(words, stdout=out).returncode:
        raise MissingResource("image", image, f"{words[0]} failed with exit code {code}; see its output above")


class _BwrapSandbox(Sandbox):
    def __init__(self, image: Image, limits: Limits, folder: Path | None):
        self.limits, self._image, self._folder = limits, image, folder
        self._holder: subprocess.Popen[bytes] | None = None
        self._mount_folder = ""
        self._has_run = False  # whether any command has run
        self._filter = seccomp.build_filter(platform.machine())
        self.outer_env = {"PATH": _search_path()}  # bwrap is process 1 inside, so its environment can be read there

    def start(self) -> None:
        self._mount_folder = _mount_point()
        visible_paths = [*([str(self._folder)] if self._folder else []), *self._image.visible_paths]
        user_namespace = ["unshare", "--user", "--map-root-user", "--mount"]
        root = os.geteuid() == 0
        drop = " ".join([*_nobody_command(), *user_namespace]) if root else ""
        outer = ["unshare", "--mount", "--propagation", "private"] if root else user_namespace
        layers = "image" if self._folder else "host"
        words = [self._mount_folder, drop, INNER_SCRIPT, str(self.limits.disk_mb), layers, WATCH_LIMITS, *visible_paths]
        try:
            self._holder = start_holder([*outer, "sh", "-c", OUTER_SCRIPT, "sh", *words], START_SECONDS, self.outer_env)
        except SandboxLost as error:
            raise SandboxLost(f"the sandbox could not be mounted: {error}") from None

    def close(self) -> None:
        holder, self._holder = self._holder, None
        if holder is not None:
            stop_holder(holder)

    def is_alive(self) -> bool:
        holder = self._holder
        return holder is not None and holder.poll() is None

    def command(self, script: str, *more: str) -> list[str]:
        """As in the base class; `more` are further arguments of bwrap."""
        holder = self._holder
        if holder is None or not self.is_alive():
            raise SandboxLost("the sandbox is gone")
        # Linux counts processes per user and namespace. This limit applies to the innermost namespace, that of this command.
        shell = ["bash", "-c", f"ulimit -u {self.limits.processes}\n{script}"]
        return [*self._enter_command(holder.pid, self.workdir), *more, *shell]

    def run(self, script: str, timeout: float, stdin: bytes = b"") -> CommandResult:
        """Run a script.

        Raises:
            SandboxLost: the script could not start because the machine failed.
            SandboxBroken: the script could not start because an earlier command made the sandbox unusable.
        """
        result, began = self._try_run(script, timeout, stdin)
        if not began and not result.stop_reason:
            time.sleep(SETTLE_SECONDS)  # processes of the last command that are still ending count towards the limit
            result, began = self._try_run(script, timeout, stdin)
        if not began and self._has_run:
            self._check_machine()
            result, began = self._try_run(script, timeout, stdin)
            if not began and not result.stop_reason:
                raise SandboxBroken(result.text.strip()[-300:])
        elif not began:
            raise SandboxLost(f"the command did not start: {result.text.strip()[-300:]}")
        self._has_run = True
        return result

    def _check_machine(self) -> None:
        """Raise `SandboxLost` if a command cannot start in a fresh sandbox either."""
        fresh = _BwrapSandbox(self._image, self.limits, self._folder)
        fresh.outer_env, fresh.workdir = self.outer_env, self.workdir
        with fresh:
            fresh.run("true", PROBE_SECONDS)

    def _try_run(self, script: str, timeout: float, stdin_data: bytes) -> tuple[CommandResult, bool]:
        """The result, and whether the command started. No process inside can access the status file that bwrap writes."""
        with create_sealed_file(self._filter) as rules, open(os.memfd_create("status"), "rb", buffering=0) as status:
            pass_fds = rules.fileno(), status.fileno()
            more = ("--seccomp", str(pass_fds[0]), "--json-status-fd", str(pass_fds[1]))
            result = self._execute(self.command(script, *more), timeout, stdin_data, pass_fds)
            status_text = os.pread(pass_fds[1], 1 << 12, 0)
        # bwrap reports an exit code only if the command started. A stopped command has no exit code, but it has a child-pid.
        mark = b"child-pid" if result.stop_reason else b"exit-code"
        return result, result is ARGUMENTS_TOO_LONG or mark in status_text

    def _enter_command(self, holder: int, folder: str) -> list[str]:
        """The program and arguments that run the command after them inside, in a folder."""
        limits, mounts = self.limits, self._mount_folder
        env = {"PATH": PATH, "HOME": "/root" if self._folder else HOME, "LANG": "C.UTF-8"} | dict(self._image.env)
        return [
            *(_nobody_command() if os.geteuid() == 0 else []),
            *("nsenter", f"--target={holder}", "--user", "--mount", "--preserve-credentials"),
            *("prlimit", f"--cpu={limits.cpu_seconds}", f"--data={limits.memory_mb << 20}", "--core=0"),
            *(
                f"--nofile={MAX_OPEN_FILES}",
                f"--fsize={limits.disk_mb << 20}",
                f"--nproc={limits.processes + SPARE_PROCESSES}",
            ),
            # A process inside could trace bwrap's process 1 and keep it alive. `unshare` is outside and kills all of them.
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--"),
            *("bwrap", *(["--bind", f"{mounts}/rw/root", "/"] if self._folder else self._host_mounts())),
            *("--proc", "/proc", "--dev", "/dev", "--bind", f"{mounts}/rw/shm", "/dev/shm", "--remount-ro", "/dev"),
            *([] if self._folder else ["--remount-ro", "/"]),
            *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
            *("--cap-drop", "ALL", "--uid", "0", "--gid", "0", "--hostname", "sandbox", "--clearenv"),
            *(word for name, value in env.items() for word in ("--setenv", name, value)),
            *("--chdir", folder),
        ]

    def _host_mounts(self) -> list[str]:
        """Arguments of bwrap: the machine's programs and libraries, read-only, the needed files of /etc, and writable folders.

        Each command gets a new root, so that an earlier command cannot redirect the mounts with a link.
        """
        mounts, words = self._mount_folder, ["--ro-bind", "/usr", "/usr"]
        for name in SYSTEM_FOLDERS:
            path = Path("/", name)
            if path.is_symlink():
                words += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                words += ["--ro-bind", str(path), str(path)]
        for name in ("passwd", "group", "hosts", "nsswitch.conf"):
            words += ["--ro-bind", f"{mounts}/etc/{name}", f"/etc/{name}"]
        for name in ETC_FILES:
            words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for number, inside in enumerate((*WRITABLE_FOLDERS, self.workdir)):
            words += ["--bind", f"{mounts}/rw/folder/{number}", inside]
        for number, inside in enumerate(self._image.visible_paths):
            words += ["--ro-bind", f"{mounts}/{number}", inside]
        for inside in self._image.hidden_paths:
            words += ["--ro-bind", f"{mounts}/none", inside]
        return words


def _nobody_command() -> list[str]:
    return ["setpriv", f"--reuid={NOBODY_UID}", f"--regid={NOBODY_UID}", "--clear-groups", "--no-new-privs"]


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":" + PATH


def _mount_point() -> str:
    """The folder to mount on. All sandboxes of a user share it, each with its own mounts, so no folders accumulate."""
    path = Path(tempfile.gettempdir(), f"aem-exp-sandboxes-{os.geteuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o711)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise SandboxLost(f"{path} is not a folder that you own: remove it, or set TMPDIR")
    path.chmod(0o711)  # NOBODY_UID must be able to enter it
    return str(path)
