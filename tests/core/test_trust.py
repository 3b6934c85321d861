"""A run dir of another user: no command runs code from it before it is trusted."""

import os
import shutil
import subprocess
import sys

import pytest

from aem_exp.core import trust
from aem_exp.core.errors import ConfigError

OTHER_USER = 12345
MARK = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the owner of a file needs root")


@pytest.fixture
def run_dir(unbroken, tmp_path):
    """A copy of a finished run. Python's `subprocess` tries to import the module in its code, which then leaves a file."""
    copy = tmp_path / unbroken[0].name
    (copy / "code").mkdir(parents=True)
    for name in ("experiment.json", "result.json"):
        shutil.copy(unbroken[0] / name, copy)
    (copy / "code" / "msvcrt.py").write_text(MARK)
    return copy


def change_owner(*paths):
    for path in paths:
        os.chown(path, OTHER_USER, OTHER_USER, follow_symlinks=False)


COMMANDS = {
    "run": ["aem_exp.run", "{}"],
    "evaluate": ["aem_exp.evaluate", "{}"],
    "proxy": ["aem_exp.proxy", "{}"],
    "branch": ["aem_exp.branch", "{}"],
    "serve": ["aem_exp.serve", "{}"],
    "trial": ["aem_exp.trial", "{}"],
    "from": ["aem_exp", "from={}", "trainer.steps=9", "plan=true"],
}


@pytest.mark.slow
@root
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("part", ["all", "code", "one module", "linked experiment"])
def test_code_of_another_user_does_not_run_before_it_is_trusted(run_dir, command, part, tmp_path):
    if part == "all":
        change_owner(run_dir, *run_dir.rglob("*"))
    elif part == "code":
        change_owner(run_dir / "code")
    elif part == "one module":
        change_owner(run_dir / "code" / "msvcrt.py")
    else:
        real = tmp_path / "mine.json"
        (run_dir / "experiment.json").rename(real)
        (run_dir / "experiment.json").symlink_to(real)
        change_owner(run_dir, run_dir / "experiment.json", *run_dir.glob("code/*"))
    words = [sys.executable, "-m", *(word.format(run_dir) for word in command)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 2, done.stderr
    assert "RUN_DIR=" in done.stderr and "--trust" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not (run_dir / "code" / "ran").exists()


@pytest.mark.slow
@root
def test_modules_of_a_trusted_run_dir_cannot_shadow_the_standard_library(run_dir, tmp_path):
    """`types.py` is not imported, since the standard library comes first; `msvcrt.py`, which Linux lacks, is refused."""
    (run_dir / "code" / "types.py").write_text(MARK)
    change_owner(run_dir, *run_dir.rglob("*"))
    words = [sys.executable, "-m", "aem_exp", f"from={run_dir}", "trainer.steps=9", "plan=true", "--trust"]

    def plan():
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)

    refused = plan()
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "code/msvcrt.py" in refused.stderr and "standard library" in refused.stderr
    (run_dir / "code" / "msvcrt.py").unlink()
    done = plan()
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "code" / "ran").exists()


@pytest.mark.parametrize("name", ["experiment.json", "code", "code/mine.py"])
def test_a_symbolic_link_is_refused_for_any_owner(run_dir, name, tmp_path):
    (run_dir / "code" / "msvcrt.py").rename(run_dir / "code" / "mine.py")
    (run_dir / name).rename(tmp_path / "elsewhere")
    (run_dir / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        trust.check_run_dir(run_dir)
    assert caught.value.remedy.startswith(f"{name} ") and "symbolic link" in caught.value.remedy
    trust.check_run_dir(run_dir, trusted=True)


@root
def test_a_link_to_a_run_dir_needs_both_to_belong_to_the_user(run_dir, tmp_path):
    (run_dir / "code" / "msvcrt.py").unlink()
    (tmp_path / "latest").symlink_to(run_dir)
    trust.check_run_dir(tmp_path / "latest")
    change_owner(tmp_path / "latest")
    with pytest.raises(ConfigError) as link:
        trust.check_run_dir(tmp_path / "latest")
    change_owner(run_dir)
    os.chown(tmp_path / "latest", os.getuid(), os.getgid(), follow_symlinks=False)
    with pytest.raises(ConfigError) as target:
        trust.check_run_dir(tmp_path / "latest")
    assert "--trust" in link.value.remedy and "--trust" in target.value.remedy
