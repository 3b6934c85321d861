"""Runs a Java program of another package: one JVM, reached through py4j's gateway on loopback, with a random token."""

import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aem_exp.core.errors import MissingOnThisMachine

CLOSE_SECONDS: Final = 5.0  # a JVM that takes longer to exit is killed


class Jvm:
    """A running JVM. It exits with this process, however this process ends.

    Args:
        field, value: field and value of an error.
        jar: the program.
        options: options of the JVM.
        folder: its working directory.

    Raises:
        MissingOnThisMachine: Java is missing or does not run the program.
    """

    def __init__(self, field: str, value: Any, jar: Path, options: Sequence[str], folder: Path):
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        java = _find_java()
        if java is None:
            raise MissingOnThisMachine(field, value, "needs Java 8 or newer: install it, or set JAVA_HOME")
        with tempfile.TemporaryFile() as errors:
            try:
                port, token, self._process = launch_gateway(
                    classpath=str(jar),
                    java_path=java,
                    javaopts=list(options),
                    cwd=str(folder),
                    die_on_exit=True,
                    enable_auth=True,
                    return_proc=True,
                    redirect_stderr=errors,
                )
                parameters = GatewayParameters(port=port, auth_token=token, auto_field=True)
                self.gateway = JavaGateway(gateway_parameters=parameters, java_process=self._process)
                self._end = weakref.finalize(self, _end_jvm, self.gateway, self._process)
            except (OSError, ValueError) as error:  # it cannot be started, or printed no port
                errors.seek(0)
                said = " ".join(errors.read(2000).decode(errors="replace").split())[:200] or repr(error)
                raise MissingOnThisMachine(field, value, f"Java ({java}) does not start: {said}") from error

    @property
    def running(self) -> bool:
        return bool(self._process.poll() is None)

    def close(self) -> None:
        """End the JVM, as garbage collection also does. May be called twice."""
        self._end()


def _end_jvm(gateway: Any, process: "subprocess.Popen[bytes]") -> None:
    with suppress(Exception):  # a dead JVM has nothing to shut down
        gateway.shutdown()
    with suppress(OSError):
        process.stdin.close()  # type: ignore[union-attr]  # it exits when its input ends
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _find_java() -> str | None:
    """$JAVA_HOME's Java, else the one on $PATH."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
