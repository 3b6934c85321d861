"""Sandboxes with Docker or Podman: a container that runs as long as its stdin is open, and commands executed in it."""

import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from aem_exp.sandboxes import HOST, Image, Limits, Sandbox, SandboxLost
from aem_exp.sandboxes.process import STOPPED_EXIT_CODE, CommandResult, execute, start_holder, stop_holder

DAEMON_SECONDS: Final = 20.0  # for the daemon to answer
START_SECONDS: Final = 120.0  # for a container to start
GRACE_SECONDS: Final = 10.0  # in addition to the timeout of a command, for its start and end
# bash is process 1: it reaps orphans, cannot be killed from inside, and ends when its stdin closes.
WAIT_SCRIPT: Final = "echo ready; read -r _"
KILLED_EXIT_CODE: Final = 137  # the exit code of `timeout -s KILL`
# Kills all remaining processes of a command: a signal to -1 reaches all processes except process 1 and this shell.
RUN_SCRIPT: Final = 'timeout -s KILL "$1" bash -c "$2"; code=$?; kill -9 -1; exit $code'


@dataclass(frozen=True)
class Docker:
    """Sandboxes with `program` (docker or podman).

    The script that stops a command runs inside the container, as the same user and from files that the command can change. A
    malicious command can therefore survive and affect the next command. It stays in its container, which ends when this process
    ends, and grading has a container of its own.

    Args:
        program: docker or podman.
    """

    program: str = "docker"

    def missing(self) -> str | None:
        if not shutil.which(self.program):
            return f"{self.program} not found: install it, or use bwrap or apptainer"
        ran = execute([self.program, "info"], DAEMON_SECONDS)
        return f"{self.program} does not answer: {_last_line(ran)}" if ran.code else None

    def lacks(self, image: str) -> str | None:
        if image == HOST:
            return f"{self.program} needs an image; use bwrap"
        ran = execute([self.program, "image", "inspect", image], DAEMON_SECONDS)
        return f"image {image} is not on this machine; run aem_exp.prepare" if ran.code else None

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Pull images. The program itself shows progress, verifies checksums, and resumes after an interruption."""
        for image in images:
            say(f"pull    {image}")
            subprocess.run([self.program, "pull", image], check=True)

    def open(self, image: Image, limits: Limits) -> Sandbox:
        return _DockerSandbox(self.program, image, limits)


class _DockerSandbox(Sandbox):
    def __init__(self, program: str, image: Image, limits: Limits):
        self.limits, self._image, self._program = limits, image, program
        self.name = f"aem-exp-{uuid.uuid4().hex[:12]}"
        self._seconds = 0.0
        self._holder: subprocess.Popen[bytes] | None = None

    def create_command(self) -> list[str]:
        """The command line that starts the container."""
        limits = self.limits
        env = [word for name, value in self._image.env.items() for word in ("--env", f"{name}={value}")]
        return [
            *(self._program, "run", "--rm", "--interactive", "--name", self.name, "--network", "none"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", str(limits.processes)),
            *("--memory", f"{limits.memory_mb}m", "--memory-swap", f"{limits.memory_mb}m"),
            *(
                "--ulimit",
                f"cpu={limits.cpu_seconds}",
                "--ulimit",
                f"fsize={limits.disk_mb << 20}",
                "--ulimit",
                "core=0",
            ),
            *(*env, "--pull", "never", "--entrypoint", "bash", self._image.name, "-c", WAIT_SCRIPT),
        ]

    def start(self) -> None:
        try:
            self._holder = start_holder(self.create_command(), START_SECONDS)
        except SandboxLost as error:
            execute([self._program, "kill", self.name], DAEMON_SECONDS)  # it may have started without an answer
            raise SandboxLost(f"the container did not start: {error}") from None

    def close(self) -> None:
        holder, self._holder = self._holder, None
        if holder is not None:
            execute([self._program, "kill", self.name], DAEMON_SECONDS)
            stop_holder(holder)

    def is_alive(self) -> bool:
        holder = self._holder
        return holder is not None and holder.poll() is None

    def command(self, script: str) -> list[str]:
        words = ["bash", "-c", RUN_SCRIPT, "bash", f"{self._seconds:g}", script]
        return [self._program, "exec", "--interactive", "--workdir", self.workdir, self.name, *words]

    def run(self, script: str, timeout: float, stdin: bytes = b"") -> CommandResult:
        if not self.is_alive():
            raise SandboxLost("the container is gone")
        self._seconds = timeout
        result = super().run(script, timeout + GRACE_SECONDS, stdin)
        late = result.stop_reason == "time" or (result.code == KILLED_EXIT_CODE and result.seconds >= timeout)
        return replace(result, code=STOPPED_EXIT_CODE, stop_reason="time") if late else result


def _last_line(result: CommandResult) -> str:
    return (result.text.strip().splitlines() or ["no answer"])[-1]
