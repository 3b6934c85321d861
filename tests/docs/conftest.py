"""The site, built once from the sources."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from support import ROOT
from support.runs import skip_or_fail


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site after a strict build, in which a warning is an error."""
    if any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")):
        skip_or_fail("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice about the next major version, on standard error
    before = source_files()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert source_files() == before, "the build writes into the sources"
    return folder


def source_files():
    """What a build could leave: files of docs/, and the folder that it writes to by default."""
    return {path for name in ("docs", "site") for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts}
