"""The wheel contains the configs and works from any folder; the sdist contains the documentation."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from support import ROOT
from support.environments import build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_sdist_contains_the_documentation(tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "mkdocs.yml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/index.md",
        "docs/generate/__main__.py",
    } <= names
    assert not any(name.startswith("site/") for name in names)


def test_the_wheel_contains_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"aem_exp/_bundled/conf/{file.relative_to(ROOT / 'conf')}" in names
    assert not any(name.split("/")[0] in ("conf", "tests", "sweeps") for name in names)
    assert "aem_exp/py.typed" in names  # without it, type checkers ignore the annotations


@pytest.mark.slow
def test_the_wheel_works_from_any_folder_with_a_config_dir(wheel, tmp_path):
    site, mine = tmp_path / "site", tmp_path / "mine"
    zipfile.ZipFile(wheel).extractall(site)
    (mine / "baseline").mkdir(parents=True)
    text = "# @package _global_\n# mine\nbaseline:\n  name: wide\n  advantage: {_target_: aem_exp.advantages.leave_one_out}\n"
    (mine / "baseline" / "wide.yaml").write_text(text + "trainer: {loss_type: dapo, epsilon: 0.2, epsilon_high: 0.4}\n")
    where = [sys.executable, "-P", "-c", "import aem_exp; print(aem_exp.__file__)"]
    command = [sys.executable, "-P", "-m", "aem_exp", "--config-dir", str(mine), "baseline=wide", "--cfg", "job"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    outside = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "check": False}
    assert subprocess.run(where, **outside).stdout.startswith(str(site))
    done = subprocess.run(command, **outside)
    assert done.returncode == 0, done.stderr
    assert "epsilon_high: 0.4" in done.stdout
