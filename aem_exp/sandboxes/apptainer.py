"""Sandboxes with Apptainer or Singularity: one file per image, which suits a shared disk, and a writable overlay."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aem_exp.core import disk
from aem_exp.sandboxes import HOST, Image, Limits, Sandbox, SandboxLost, image_file_name

PROGRAMS: Final = ("apptainer", "singularity")


@dataclass(frozen=True)
class Apptainer:
    """Sandboxes with Apptainer.

    Args:
        images: folder of the image files, on a disk that all nodes see; by default in the cache.
        scratch: folder for the files that sandboxes write, on a local disk; by default $SLURM_TMPDIR or $TMPDIR.
    """

    images: str | None = None
    scratch: str | None = None

    def missing(self) -> str | None:
        return None if self._program() else "apptainer not found: load its module, or use bwrap"

    def lacks(self, image: str) -> str | None:
        if image == HOST:
            return "apptainer needs an image; use bwrap"
        return (
            None
            if self._image_file(image).is_file()
            else f"image {image} is not in {self._images_folder()}; run aem_exp.prepare"
        )

    def prepare(self, images: list[str], say: Callable[[str], None]) -> None:
        """Build missing images. Layers are downloaded once, by digest; an interrupted build leaves no image."""
        self._images_folder().mkdir(parents=True, exist_ok=True)
        for image in images:
            if self._image_file(image).is_file():
                continue
            say(f"build   {self._image_file(image)}")
            part = self._image_file(image).with_suffix(f".{os.getpid()}.part")
            subprocess.run([self._program() or PROGRAMS[0], *build_arguments(image, part)], check=True)
            part.replace(self._image_file(image))

    def open(self, image: Image, limits: Limits) -> Sandbox:
        scratch = self.scratch or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
        return _ApptainerSandbox(
            self._program() or PROGRAMS[0], self._image_file(image.name), Path(scratch), image, limits
        )

    def _program(self) -> str | None:
        return next((name for name in PROGRAMS if shutil.which(name)), None)

    def _images_folder(self) -> Path:
        return Path(self.images).expanduser() if self.images else disk.cache_dir() / "images"

    def _image_file(self, image: str) -> Path:
        return self._images_folder() / f"{image_file_name(image)}.sif"


def build_arguments(image: str, to: Path) -> list[str]:
    """The arguments of Apptainer that build an image file."""
    return ["build", "--force", str(to), image if "://" in image else f"docker://{image}"]


class _ApptainerSandbox(Sandbox):
    def __init__(self, program: str, file: Path, scratch: Path, image: Image, limits: Limits):
        self.limits, self._program, self._image_file, self._image, self._scratch = limits, program, file, image, scratch
        self.layer: Path | None = None
        passed_on = (
            "PATH",
            "HOME",
            "TMPDIR",
            *(name for name in os.environ if name.startswith(("APPTAINER_", "SINGULARITY_"))),
        )
        self.outer_env = {name: os.environ[name] for name in passed_on if name in os.environ}  # passes on no tokens

    def start(self) -> None:
        self.layer = Path(tempfile.mkdtemp(prefix="aem-exp-layer-", dir=self._scratch))

    def close(self) -> None:
        layer, self.layer = self.layer, None
        if layer is not None:
            shutil.rmtree(layer, ignore_errors=True)

    def is_alive(self) -> bool:
        layer = self.layer
        return layer is not None and layer.is_dir()

    def command(self, script: str) -> list[str]:
        if not self.is_alive():
            raise SandboxLost("the sandbox is gone")
        limits = self.limits
        env = [word for name, value in self._image.env.items() for word in ("--env", f"{name}={value}")]
        return [
            *("prlimit", f"--cpu={limits.cpu_seconds}", f"--data={limits.memory_mb << 20}"),
            *(f"--fsize={limits.disk_mb << 20}", "--core=0"),
            *(self._program, "--silent", "exec", "--containall", "--cleanenv", "--no-home", "--fakeroot"),
            *("--net", "--network", "none", "--overlay", str(self.layer), "--pwd", self.workdir, *env),
            *(str(self._image_file), "bash", "-c", f"ulimit -u {limits.processes}; {script}"),
        ]
