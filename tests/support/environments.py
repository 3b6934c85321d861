"""The wheel of this package, and an environment of only what it requires without extras."""

import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import ROOT


def build_wheel(folder):
    """Build the wheel into a folder; its path."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def make_base_environment(folder, wheel):
    """Make a virtual environment with the wheel and, as links, the installed files of all that it requires; its Python.

    Nothing else is on its path, so a requirement that pyproject.toml forgets is missing there.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (package,) = metadata.distributions(path=[str(site)])
    for name in required_distributions(package):
        link_files(metadata.distribution(name), site)
    return folder / "bin" / "python"


def required_distributions(package):
    """The names of the distributions that pip would install with a package without extras."""
    waiting, found = [(package, "")], set()
    while waiting:
        distribution, extra = waiting.pop()
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            for wanted in {(name, ""), *((name, each) for each in requirement.extras)} - found:
                found.add(wanted)
                waiting.append((metadata.distribution(name), wanted[1]))
    return {name for name, _ in found}


def link_files(distribution, site):
    """Link the installed files of a distribution, compiled modules included, but not its scripts."""
    for file in distribution.files:
        source, target = Path(distribution.locate_file(file)), site / file
        if ".." not in file.parts and source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve())
