"""A run dir of somebody else's: nothing in it runs before it is trusted, in any command that takes one."""

import os
import shutil
import subprocess
import sys

import pytest

from aem_exp.core import trust
from aem_exp.core.errors import ConfigError

OTHER = 12345  # an owner
MARK = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")


@pytest.fixture
def run_dir(unbroken, tmp_path):
    """A copy of a finished run, with a module in its code that Python's `subprocess` tries to import; it leaves a mark."""
    copy = tmp_path / unbroken[0].name
    (copy / "code").mkdir(parents=True)
    for name in ("experiment.json", "result.json"):
        shutil.copy(unbroken[0] / name, copy)
    (copy / "code" / "msvcrt.py").write_text(MARK)
    return copy


def give_away(*paths):
    for path in paths:
        os.chown(path, OTHER, OTHER, follow_symlinks=False)


COMMANDS = {
    "run": ["aem_exp.run", "{}"],
    "evaluate": ["aem_exp.evaluate", "{}"],
    "proxy": ["aem_exp.proxy", "{}"],
    "serve": ["aem_exp.serve", "{}"],
    "trial": ["aem_exp.trial", "{}"],
    "from": ["aem_exp", "from={}", "trainer.steps=9", "plan=true"],
}


@root
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("how", ["all of it", "its code", "one module", "a linked experiment"])
def test_no_code_of_somebody_elses_runs_before_it_is_trusted(run_dir, command, how, tmp_path):
    if how == "all of it":
        give_away(run_dir, *run_dir.rglob("*"))
    elif how == "its code":
        give_away(run_dir / "code")
    elif how == "one module":
        give_away(run_dir / "code" / "msvcrt.py")
    else:
        real = tmp_path / "mine.json"
        (run_dir / "experiment.json").rename(real)
        (run_dir / "experiment.json").symlink_to(real)
        give_away(run_dir, run_dir / "experiment.json", *run_dir.glob("code/*"))
    words = [sys.executable, "-m", *(word.format(run_dir) for word in command)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 2, done.stderr
    assert "belongs to somebody else" in done.stderr and "--trust" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not (run_dir / "code" / "ran").exists()


@root
def test_trusted_its_modules_may_be_named(run_dir, tmp_path):
    """The standard library comes before them: `types.py` is not imported; what stands in for a missing module is refused."""
    (run_dir / "code" / "types.py").write_text(MARK)
    give_away(run_dir, *run_dir.rglob("*"))
    words = [sys.executable, "-m", "aem_exp", f"from={run_dir}", "trainer.steps=9", "plan=true", "--trust"]

    def ask():
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)

    refused = ask()
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "code/msvcrt.py would be taken for a module of Python's standard library" in refused.stderr
    (run_dir / "code" / "msvcrt.py").unlink()
    done = ask()
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "code" / "ran").exists()


@pytest.mark.parametrize("name", ["experiment.json", "code", "code/mine.py"])
def test_a_symbolic_link_is_refused_whosever_it_is(run_dir, name, tmp_path):
    (run_dir / "code" / "msvcrt.py").rename(run_dir / "code" / "mine.py")
    (run_dir / name).rename(tmp_path / "elsewhere")
    (run_dir / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"{name} is a symbolic link"):
        trust.check_run_dir(run_dir)
    trust.check_run_dir(run_dir, trusted=True)


@root
def test_the_users_own_link_to_a_run_is_as_good_as_where_it_leads(run_dir, tmp_path):
    (run_dir / "code" / "msvcrt.py").unlink()
    (tmp_path / "latest").symlink_to(run_dir)
    trust.check_run_dir(tmp_path / "latest")
    give_away(tmp_path / "latest")
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        trust.check_run_dir(tmp_path / "latest")
    give_away(run_dir)
    os.chown(tmp_path / "latest", os.getuid(), os.getgid(), follow_symlinks=False)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        trust.check_run_dir(tmp_path / "latest")
