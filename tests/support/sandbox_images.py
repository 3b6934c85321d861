"""Builds small container images from this machine's own programs, in place of images from a registry."""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from aem_exp.core.errors import MissingResource
from aem_exp.envs.swe import official
from aem_exp.sandboxes.bwrap import Bwrap
from support.runs import skip_or_fail

TOOLS = "bash sh cat mkdir dirname rm ls ln cp sleep head yes id touch dd seq env test chmod mv stat timeout setsid tr".split()
GIT = "git sort grep find tar".split()
LEFT_OUT = (
    "test",
    "idlelib",
    "tkinter",
    "ensurepip",
    "site-packages",
    "__pycache__",
    "lib2to3",
    "turtledemo",
    "config-*",
)


def needs_grading():
    """Skip a test if this machine cannot play and grade repositories; see `skip_or_fail`."""
    try:
        official.check_installed()
    except MissingResource as missing:
        skip_or_fail(str(missing))
    if reason := Bwrap().missing():
        skip_or_fail(reason)


def needs_skopeo():
    if absent := [name for name in ("bwrap", "skopeo", "umoci") if not shutil.which(name)]:
        skip_or_fail(f"{', '.join(absent)} not found: apt install bubblewrap skopeo umoci")


def oci(folder, root):
    """Make an image in OCI layout from the files in `root`, and return its name. All users may enter the folder."""
    for parent in (folder, *folder.parents[:3]):
        if parent != Path("/") and parent.owner() == folder.owner():
            parent.chmod(parent.stat().st_mode | 0o011)
    layout = folder / "layout"
    for words in (
        ["init", "--layout", layout],
        ["new", "--image", f"{layout}:t"],
        ["insert", "--rootless", "--image", f"{layout}:t", root, "/"],
        ["config", "--image", f"{layout}:t", "--config.env", "FROM_IMAGE=yes"],
    ):
        subprocess.run(["umoci", *map(str, words)], check=True, capture_output=True)
    return f"oci:{layout}:t"


def tree(root, programs=TOOLS):
    """Copy programs, with the libraries that they load, into a root folder."""
    for name in programs:
        place = shutil.which(name)
        program(root, Path(place).resolve(), f"bin/{name}")
    for name in ("testbed", "tmp", "root", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")


def program(root, source, target):
    _copy(source, root / target)
    for word in subprocess.run(["ldd", source], capture_output=True, text=True, check=False).stdout.split():
        if word.startswith("/"):
            _copy(Path(word).resolve(), root / word.lstrip("/"))


def python(root):
    """Copy git, this Python and pytest into a root folder, so that the tests of a repository can run."""
    tree(root, [*TOOLS, *GIT])
    base = Path(sys.base_prefix)
    name = f"python3.{sys.version_info.minor}"
    program(root, (base / "bin" / name).resolve(), f"{base}/bin/{name}".lstrip("/"))
    library = base / "lib" / name
    shutil.copytree(library, root / str(library).lstrip("/"), ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    for extension in (library / "lib-dynload").glob("*.so"):
        program(root, extension, str(extension).lstrip("/"))
    site = Path(sysconfig.get_path("purelib"))
    inside = root / str(library).lstrip("/") / "site-packages"
    for package in ("pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        for top in {file.parts[0] for file in importlib.metadata.distribution(package).files or ()} - {".."}:
            if (site / top).is_dir():
                shutil.copytree(
                    site / top, inside / top, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
                )
            elif (site / top).is_file():
                _copy(site / top, inside / top)
    (root / "usr" / "local" / "bin").mkdir(parents=True, exist_ok=True)
    (root / "usr" / "local" / "bin" / "python3").symlink_to(base / "bin" / name)
    (root / "usr" / "bin").mkdir(parents=True, exist_ok=True)
    (root / "usr" / "bin" / "env").symlink_to("/bin/env")


def _copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(source, target)
