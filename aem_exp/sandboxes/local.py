"""Runs commands as the current user in a temporary folder, without isolation. Only for commands that you wrote yourself."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aem_exp.sandboxes import HOST, Image, Limits, Sandbox, SandboxLost


@dataclass(frozen=True)
class Local:
    """No isolation: commands of a policy or a test suite run as you, with network.

    Args:
        allow_unsafe: must be true; otherwise this backend refuses to run.
    """

    allow_unsafe: bool = False

    def missing(self) -> str | None:
        if self.allow_unsafe:
            return None
        return "no isolation: commands of the policy run as you; set allow_unsafe=true if you want this, or use bwrap"

    def lacks(self, image: str) -> str | None:
        return None if image == HOST else f"image {image} cannot be opened without a container; use bwrap or apptainer"

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Does nothing: there are no images to download."""

    def open(self, image: Image, limits: Limits) -> Sandbox:
        return _LocalSandbox(image, limits)


class _LocalSandbox(Sandbox):
    def __init__(self, image: Image, limits: Limits):
        self.limits, self._image = limits, image
        self._root: Path | None = None

    def start(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="aem-exp-unsafe-"))
        for name in ("testbed", "home", "tmp"):
            (self._root / name).mkdir()
        self.workdir = str(self._root / "testbed")

    def close(self) -> None:
        root, self._root = self._root, None
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)

    def is_alive(self) -> bool:
        root = self._root
        return root is not None and root.is_dir()

    def command(self, script: str) -> list[str]:
        if not self.is_alive():
            raise SandboxLost("the sandbox is gone")
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": f"{self._root}/home", "TMPDIR": f"{self._root}/tmp"}
        env |= {"LANG": "C.UTF-8"} | dict(self._image.env)
        words = [f"{name}={value}" for name, value in env.items()]
        return ["env", "-i", f"--chdir={self.workdir}", *words, "bash", "-c", script]
